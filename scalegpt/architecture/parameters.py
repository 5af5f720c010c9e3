"""Parameters, with dimensions in numbers and in symbols, and formulas for their numbers of elements."""

import math
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

Shape = tuple[int, ...]

_ORDER = "VTH"
"""The order of symbols in a product: vocabulary, block size, width."""

_POWERS = ("", "", "²", "³")


class Dim(NamedTuple):
    """One dimension of a tensor: its ``size``, which equals ``factor`` times ``symbol`` (V, T or H)."""

    size: int
    factor: int
    symbol: str

    def times(self, factor: int) -> "Dim":
        """A dimension ``factor`` times as large."""
        return Dim(self.size * factor, self.factor * factor, self.symbol)


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
    """The number of elements of several parameters in symbols, such as ``12·H² + 2·H``; ``0`` for none."""
    terms = Counter[str]()
    for parameter in parameters:
        symbols = "".join(sorted((dim.symbol for dim in parameter.dims), key=_ORDER.index))
        terms[symbols] += math.prod(dim.factor for dim in parameter.dims)
    ordered = sorted(terms.items(), key=lambda item: -len(item[0]))
    return " + ".join(_term(symbols, factor) for symbols, factor in ordered) or "0"


def _term(symbols: str, factor: int) -> str:
    powers = [symbol + _POWERS[symbols.count(symbol)] for symbol in dict.fromkeys(symbols)]
    return "·".join(([str(factor)] if factor != 1 else []) + powers)
