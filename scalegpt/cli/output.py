"""Printing for all commands: escapes control characters, so that no text can control a terminal or break a table."""

import json
import re
import sys
from collections.abc import Collection, Sequence
from typing import Any

from scalegpt.text import one_line, visible


def show(*texts: object) -> None:
    """Print text on standard output, with control characters escaped."""
    print(visible(" ".join(map(str, texts))))


def show_row(head: str, value: object) -> None:
    """Print a fixed label and a value on one line; control characters and line ends in the value are escaped."""
    print(head + one_line(value))


def note(text: str) -> None:
    """Print a line on standard error, with control characters escaped."""
    print(visible(text), file=sys.stderr, flush=True)


def show_json(values: Any) -> None:
    """Print a value as JSON."""
    print(json_text(values))


def json_text(values: Any) -> str:
    """A value as indented JSON; letters of all scripts stay as they are, control characters are escaped."""
    return re.sub(r"[^\x20-\x7e\n]", _escaped, json.dumps(values, indent=2, ensure_ascii=False))


def _escaped(match: re.Match[str]) -> str:
    character = match[0]
    return character if visible(character) == character else json.dumps(character)[1:-1]


def aligned(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> str:
    """A table in plain text: the first row is the heading, with a rule under it.

    Args:
        rows: the cells; every row has the same number of cells. Control characters and line ends are escaped.
        right: the indices of the columns to align to the right, such as columns of numbers.
    """
    rows = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = enumerate(zip(row, widths, strict=True))
        return "  ".join(cell.rjust(w) if column in right else cell.ljust(w) for column, (cell, w) in cells).rstrip()

    return "\n".join([line(rows[0]), line(["-" * width for width in widths]), *map(line, rows[1:])])
