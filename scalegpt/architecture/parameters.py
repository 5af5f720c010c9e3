"""Parameters, with dimensions in numbers and in symbols, and formulas for counting their elements."""

import math
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

Shape = tuple[int, ...]

SYMBOLS = {
    "V": "vocabulary",
    "T": "block",
    "H": "width",
    "F": "inner width",
    "a": "heads",
    "k": "heads of keys and values",
    "D": "head width",
}
"""Symbol of a size, a single letter → its meaning. Products name their symbols in this order."""

_ORDER = "".join(SYMBOLS)

_POWERS = ("", "", "²", "³")

Terms = tuple[tuple[str, int], ...]
"""A polynomial: (symbols of a product, its factor) of each term. ``(("aD", 1), ("kD", 2))`` is a·D + 2·k·D."""


class Dim(NamedTuple):
    """One dimension of a tensor: its ``size``, and ``terms``, the same size in symbols."""

    size: int
    terms: Terms

    @classmethod
    def of(cls, symbol: str, size: int) -> "Dim":
        """A dimension with its own symbol, one of :data:`SYMBOLS`."""
        return cls(size, ((symbol, 1),))

    def times(self, other: "int | Dim") -> "Dim":
        """The product of a dimension and a number, or of two dimensions."""
        size, terms = (other, (("", other),)) if isinstance(other, int) else other
        return Dim(self.size * size, _product(self.terms, terms))

    def plus(self, other: "Dim") -> "Dim":
        """The sum of two dimensions, for example the rows of two matrices that are stored as one."""
        return Dim(self.size + other.size, _collected([*self.terms, *other.terms]))


class Parameter(NamedTuple):
    """A parameter of the model.

    Attributes:
        name: the name of the parameter in the torch module, inside its part of the model.
        dims: the parameter's dimensions, as torch stores them.
        part: the line of the parameter count under which the parameter is counted.
    """

    name: str
    dims: tuple[Dim, ...]
    part: str

    @property
    def shape(self) -> Shape:
        """The sizes of the parameter's dimensions."""
        return tuple(dim.size for dim in self.dims)

    @property
    def numel(self) -> int:
        """The number of the parameter's elements."""
        return math.prod(self.shape)


def formula(parameters: Iterable[Parameter]) -> str:
    """The number of elements of several parameters in symbols, for example ``12·H² + 2·H``; ``0`` without parameters."""
    terms: list[tuple[str, int]] = []
    for parameter in parameters:
        numel: Terms = (("", 1),)
        for dim in parameter.dims:
            numel = _product(numel, dim.terms)
        terms += numel
    ordered = sorted(_collected(terms), key=lambda term: -len(term[0]))
    return " + ".join(_term(symbols, factor) for symbols, factor in ordered) or "0"


def _product(left: Terms, right: Terms) -> Terms:
    return _collected(
        ("".join(sorted(some + others, key=_ORDER.index)), factor * other)
        for some, factor in left
        for others, other in right
    )


def _collected(terms: Iterable[tuple[str, int]]) -> Terms:
    """The terms, with the factors of equal products added up."""
    factors = Counter[str]()
    for symbols, factor in terms:
        factors[symbols] += factor
    return tuple(factors.items())


def _term(symbols: str, factor: int) -> str:
    powers = [symbol + _POWERS[symbols.count(symbol)] for symbol in dict.fromkeys(symbols)]
    return "·".join(([str(factor)] if factor != 1 else []) + powers)
