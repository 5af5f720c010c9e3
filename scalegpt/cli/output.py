"""The doors through which commands print: what others wrote can neither command a terminal nor break a table or JSON."""

import json
import re
import sys
from typing import Any

from scalegpt.text import one_line, visible


def show(*texts: object) -> None:
    """Print a line or several on standard output, their control characters made visible."""
    print(visible(" ".join(map(str, texts))))


def show_row(head: str, value: object) -> None:
    """Print a name that is ours and what stands under it, on one line."""
    print(head + one_line(value))


def note(text: str) -> None:
    """Print a line on standard error, beside the answer, likewise."""
    print(visible(text), file=sys.stderr, flush=True)


def show_json(values: Any) -> None:
    """Print a value as JSON. Control characters, which may stand in names and samples, are escaped as JSON has it."""
    print(json_text(values))


def json_text(values: Any) -> str:
    """A value as JSON for readers: indented, letters of all scripts as they are, control characters escaped."""
    return re.sub(r"[^\x20-\x7e\n]", _escaped, json.dumps(values, indent=2, ensure_ascii=False))


def _escaped(match: re.Match[str]) -> str:
    character = match[0]
    return character if visible(character) == character else json.dumps(character)[1:-1]
