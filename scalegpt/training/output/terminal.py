"""What a terminal can do, and how lines fit its width."""

import os
import re
import textwrap
from typing import TextIO

WITHOUT_CONTROL = frozenset({"dumb", "unknown"})
"""The values of ``TERM`` of terminals on which a line cannot be rewritten."""

LABEL = 9
"""Columns of the labels before the lines at a run's start and end."""

LABELLED = re.compile(rf"(?=[a-z_]+ {{2}}|  )[a-z_ ]{{{LABEL}}}\S")
"""How such a line begins: with a label and at least two spaces, or with spaces alone."""

LEAST_TEXT = 30
"""A terminal with fewer columns breaks lines itself."""


def hanging(line: str, columns: int) -> str:
    """A line that begins with a label, such as ``machine  …``, broken at words, with its text in one column.

    Other lines, and those that fit, stay as they are.
    """
    if len(line) <= columns or not LABELLED.match(line) or columns < LEAST_TEXT:
        return line
    return textwrap.fill(line, columns, subsequent_indent=" " * LABEL, break_long_words=False, break_on_hyphens=False)


def terminal_columns(stream: TextIO) -> int:
    """The width of a terminal now; 80 if it does not say."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def takes_live_line(stream: TextIO) -> bool:
    """Whether the stream is a terminal on which a line can be rewritten."""
    return stream.isatty() and os.environ.get("TERM", "").lower() not in WITHOUT_CONTROL
