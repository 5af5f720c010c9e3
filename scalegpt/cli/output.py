"""Printing for all commands: escapes control characters, so that no text can control a terminal or break a table."""

import json
import re
import sys
import time
from collections.abc import Callable, Collection, Sequence
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
    """Print a value as indented JSON."""
    print(json_text(values))


def json_text(values: Any) -> str:
    """A value as indented JSON. Letters of all scripts are kept, control characters are escaped."""
    return re.sub(r"[^\x20-\x7e\n]", _escaped, json.dumps(values, indent=2, ensure_ascii=False))


def json_line(values: Any) -> str:
    """A value as JSON on one line, with characters as :func:`json_text` writes them."""
    return re.sub(r"[^\x20-\x7e]", _escaped, json.dumps(values, ensure_ascii=False))


def _escaped(match: re.Match[str]) -> str:
    character = match[0]
    return character if visible(character) == character else json.dumps(character)[1:-1]


class ProgressLine:
    """A line on a terminal's standard error that is rewritten at most ten times a second."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._began, self._next = clock, clock(), 0.0

    def due(self, *, is_last: bool) -> float | None:
        """The seconds since the start (above 0) if it is time to rewrite the line, else None."""
        now = self._clock()
        if now < self._next and not is_last:
            return None
        self._next = now + 0.1
        return max(now - self._began, 1e-9)

    def show(self, line: str) -> None:
        """Replace the line on the terminal."""
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Erase the line from the terminal."""
        self.show("")


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
