"""Text that is not ours, made safe to print."""

import unicodedata

_KEPT = frozenset("\n\t\u200c\u200d")
"""Line ends, tabs, and the joiners that scripts and emoji need."""
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode's categories of control characters, format characters (which reorder text), surrogates and line separators."""


def visible(text: object) -> str:
    r"""The text with its control characters written out, as ``\x1b`` or ``\u202e``: a terminal only shows it.

    File names, checkpoints, samples and error messages of others may hold escape sequences, which a terminal obeys. Line ends
    and tabs stay.
    """
    return "".join(c if c in _KEPT or unicodedata.category(c) not in _HIDDEN else _escaped(c) for c in str(text))


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def one_line(name: object) -> str:
    r"""A name that is not ours, for one line: as :func:`visible`, with line ends and tabs written out too."""
    return visible(name).replace("\n", "\\n").replace("\t", "\\t")
