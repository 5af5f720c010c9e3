"""What a terminal can do, and how lines fit its width."""

import os
import re
import textwrap
from typing import TextIO

WITHOUT_CONTROL = frozenset({"dumb", "unknown"})
"""Values of ``TERM`` that name terminals on which a line cannot be rewritten."""

LABEL = 9
"""Width of the column of labels at the left of the lines at a run's start and end."""

LABELLED = re.compile(rf"(?=[a-z_]+ {{2}}|  )[a-z_ ]{{{LABEL}}}\S")
"""The beginning of such a line: a label and at least two spaces, or spaces alone."""

LEAST_TEXT = 30
"""On a terminal with fewer columns, lines are left for the terminal to break."""


def hanging(line: str, columns: int) -> str:
    """Break a line that begins with a label (``machine …``) between words, and indent its text to one column.

    Other lines, and those that fit, stay as they are.
    """
    if len(line) <= columns or not LABELLED.match(line) or columns < LEAST_TEXT:
        return line
    return textwrap.fill(line, columns, subsequent_indent=" " * LABEL, break_long_words=False, break_on_hyphens=False)


def terminal_columns(stream: TextIO) -> int:
    """The current width of a terminal; 80 if it is not known."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def takes_live_line(stream: TextIO) -> bool:
    """Whether the stream is a terminal on which a line can be rewritten."""
    return stream.isatty() and os.environ.get("TERM", "").lower() not in WITHOUT_CONTROL
