"""A terminal for tests: runs a command on a real pseudo-terminal, and keeps the screen that it draws."""

import fcntl
import os
import pty
import struct
import sys
import termios
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

pyte = pytest.importorskip("pyte", reason="pip install pyte")

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Screen:
    """What a command left on its terminal.

    Attributes:
        lines: the lines of the screen up to the last that is not empty.
        raw: all bytes that were written.
        shows_cursor: whether the cursor is visible.
        column: the cursor's column.
        status: the command's exit status.
    """

    lines: list[str]
    raw: bytes
    shows_cursor: bool
    column: int
    status: int


def run_on_terminal(
    command: Sequence[str], *, columns: int, cwd: Path = ROOT, rows: int = 60, typed: Mapping[bytes, bytes] | None = None,
    **environment: str,
) -> Screen:  # fmt: skip
    """Run Python with these arguments on a terminal; type each value of ``typed`` once its key has been written."""
    waiting = dict(typed or {})
    child, terminal = pty.fork()
    if child == 0:
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        os.chdir(cwd)
        kept = {key: value for key, value in os.environ.items() if key not in {"COLUMNS", "NO_COLOR", "FORCE_COLOR"}}
        os.execve(
            sys.executable,
            [sys.executable, *command],
            {**kept, "TERM": "xterm", "PYTHONPATH": str(ROOT), **environment},
        )
    screen, raw = pyte.Screen(columns, rows), b""
    stream = pyte.ByteStream(screen)
    while data := _read(terminal):
        raw += data
        stream.feed(data)
        for seen in [seen for seen in waiting if seen in raw]:
            os.write(terminal, waiting.pop(seen))
    os.close(terminal)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    lines = "\n".join(line.rstrip() for line in screen.display).rstrip().split("\n")
    return Screen(lines, raw, not screen.cursor.hidden, screen.cursor.x, status)


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # Linux reports the end of a terminal as an input/output error
        return b""
