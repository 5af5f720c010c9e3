"""Makes text from other sources safe to print: file names, samples, error messages of other programs."""

import unicodedata
from collections.abc import Sequence
from itertools import count

_JOINERS = frozenset("\u200c\u200d")  # zero-width joiners, which some scripts and emoji need between characters
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode's categories of control characters, format characters (which reorder text), surrogates and line separators."""

MOST_SHOWN = 60
"""The most characters of a value that a message quotes."""


def visible(text: object) -> str:
    r"""The text with its control characters escaped, as ``\x1b`` or ``\u202e``, so that a terminal does not obey them.

    Line ends and tabs are kept.
    """
    return _escaped(str(text), _JOINERS | {"\n", "\t"})


def one_line(text: object) -> str:
    """The text on one line, for a name or a table's cell: control characters, line ends and tabs are escaped."""
    return _escaped(str(text), _JOINERS)


def _escaped(text: str, kept: frozenset[str]) -> str:
    if text.isascii() and text.isprintable():
        return text

    def escape(character: str) -> str:
        return character.encode("unicode_escape", "surrogatepass").decode("ascii")

    return "".join(c if c in kept or unicodedata.category(c) not in _HIDDEN else escape(c) for c in text)


def shown(value: object, most: int = MOST_SHOWN) -> str:
    """A value for quoting in a message: the shortened ``repr`` of a scalar, else the words ``a list`` or ``an object``."""
    if isinstance(value, list | tuple | set):
        return "a list"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, int) and not -(10**most) < value < 10**most:
        return f"about {'-' if value < 0 else ''}1e{int(value.bit_length() * 0.30103)}"
    text = repr(value[: most + 1] if isinstance(value, str) else value)
    return text if len(text) <= most + 2 else shortened(text, most)


def shortened(text: str, most: int) -> str:
    """The text, with its middle replaced by ``…`` if it is longer than ``most`` characters."""
    if len(text) <= most:
        return text
    end = most // 3
    return f"{text[: most - end - 1]}…{text[len(text) - end :]}"


def brief(text: object, most: int = 300) -> str:
    """The text on one line, with control characters escaped, cut after ``most`` characters."""
    line = str(text)[: most + 1]
    words = " ".join(visible(line).split())
    return words if len(line) <= most and len(words) <= most else f"{words[:most]}…"


def distinct(names: Sequence[str], form: str) -> list[str]:
    """The names, each made unique: those that occur several times get a number from 1 on, as ``form`` joins both."""
    taken, found = set(names), []
    for name in names:
        unique = name
        if names.count(name) > 1:
            unique = next(each for number in count(1) if (each := form.format(name, number)) not in taken)
            taken.add(unique)
        found.append(unique)
    return found
