"""The live line of a run on a terminal: progress, losses, speed, memory and times, shortened to the terminal's width."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum, auto
from typing import TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from scalegpt.training.output.step_line import StepLine
from scalegpt.training.output.terminal import terminal_columns
from scalegpt.units import GIB, human_count, human_time

NARROWEST_BAR, WIDEST_BAR = 8, 24
"""Columns of the bar."""

FREE_COLUMNS = 2
"""Columns at the right that stay empty, so that the ``^C`` that a terminal echoes does not begin a new line."""

PER_SECOND = 4
"""Times per second that the line is drawn."""

SLOW_SECONDS = 1.0
"""Work between steps is shown if it takes longer than this many seconds."""

GAP = "  "


class Rank(IntEnum):
    """The parts of the line. If the line is too narrow, the last of these are dropped first."""

    STEP = auto()
    LOSS = auto()
    DOING = auto()
    LEFT = auto()
    SPEED = auto()
    BAR = auto()
    HELD_OUT = auto()
    SKIPPED = auto()
    MFU = auto()
    MEMORY = auto()
    SAVE = auto()


@dataclass(frozen=True)
class Part:
    """A part of the line.

    Attributes:
        text: what is shown.
        rank: which part it is, which also says how important it is.
        style: the style in which rich shows it.
    """

    text: str
    rank: Rank
    style: str = ""


class _Terminal(Console):
    """A console that never hides the cursor, since a process that is killed could not show it again."""

    def show_cursor(self, show: bool = True) -> bool:  # noqa: ARG002
        """Do nothing; the cursor stays as it is."""
        return False


class LiveLine:
    """A line that is drawn again a few times a second, below all that is printed.

    Args:
        stream: the terminal.
        total: number of steps of the run.
        taken: number of steps taken so far.
        planned_bytes: the predicted peak memory of this rank; 0: not known.
        doing: returns what the run does now, for example ``evaluation``; empty: nothing that needs to be shown.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        total: int,
        taken: int,
        planned_bytes: int,
        doing: Callable[[], str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.taken, self.planned_bytes = total, taken, planned_bytes
        self._doing, self._clock, self._since = doing, clock, clock()
        self._line: StepLine | None = None
        self._stream = stream
        self._console = _Terminal(file=stream, force_terminal=True, highlight=False, soft_wrap=True)
        self._live = Live(
            self,
            console=self._console,
            refresh_per_second=PER_SECOND,
            transient=True,
            redirect_stderr=sys.stderr.isatty(),  # standard error may be a file
        )

    def start(self) -> None:
        """Draw the line, and start the thread that redraws it."""
        self._live.start()

    def stop(self) -> None:
        """Remove the line."""
        self._live.stop()

    def update(self, line: StepLine) -> None:
        """Show the values of a step that has finished."""
        self._line, self.taken, self._since = line, line.step, self._clock()

    def print(self, text: str) -> None:
        """Print text above the line."""
        self._console.print(text, markup=False, style="yellow" if text.startswith("warning") else None)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the line for rich."""
        # Rich believes COLUMNS, which does not follow a window that is resized.
        width = terminal_columns(self._stream) - FREE_COLUMNS
        yield self.text(max(1, width), ascii_only=options.ascii_only)

    def text(self, width: int, *, ascii_only: bool = False) -> Text:
        """The line in at most ``width`` columns: the most important parts that fit, and a bar in the remaining columns."""
        parts, rest = list(self._parts()), width + len(GAP)
        kept: list[Part] = []
        for part in sorted(parts, key=lambda part: part.rank):
            rest -= len(part.text) + len(GAP)
            if rest < 0 and kept:
                rest += len(part.text) + len(GAP)
                break
            kept.append(part)
        line = Text(no_wrap=True, overflow="crop", end="")
        for part in [part for part in parts if part in kept]:
            line.append(GAP if line else "")
            if part.rank == Rank.BAR:
                line.append_text(self._bar(min(WIDEST_BAR, len(part.text) + rest), ascii_only=ascii_only))
            else:
                line.append(part.text, style=part.style or None)
        line.truncate(width)
        return line

    def _bar(self, width: int, *, ascii_only: bool) -> Text:
        """The share of the run's steps that are done, as a bar of ``width`` columns."""
        full = round(width * min(1.0, self.taken / max(1, self.total)))
        done, left = ("#", ".") if ascii_only else ("━", "─")
        return Text.assemble((done * full, "green"), (left * (width - full), "dim"))

    def _parts(self) -> Iterator[Part]:
        """The parts of the line, from left to right."""
        line, passed = self._line, self._clock() - self._since
        doing = self._doing() if line is None or passed >= SLOW_SECONDS else ""
        yield Part(f"step {self.taken}/{self.total}", Rank.STEP, "bold")
        yield Part(" " * NARROWEST_BAR, Rank.BAR)
        if doing:
            yield Part(f"{doing} {human_time(passed)}", Rank.DOING, "cyan")
        if line is not None:
            yield from self._values(line, passed)

    def _values(self, line: StepLine, passed: float) -> Iterator[Part]:
        """The values of the last step, which was ``passed`` seconds ago."""
        yield Part(f"loss {line.loss:.4f}", Rank.LOSS)
        if line.val_loss is not None:
            yield Part(f"held-out {line.val_loss:.4f}", Rank.HELD_OUT)
        yield Part(f"{human_count(line.tokens_per_second)} tok/s", Rank.SPEED)
        if line.mfu is not None:
            yield Part(f"MFU {line.mfu:.1%}", Rank.MFU)
        if line.used_bytes:
            planned = f"/{self.planned_bytes / GIB:.1f}" if self.planned_bytes else ""
            yield Part(f"{line.used_bytes / GIB:.1f}{planned} GiB", Rank.MEMORY)
        if line.skipped:
            yield Part(f"{line.skipped} skipped", Rank.SKIPPED, "yellow")
        if line.seconds_to_save is not None:
            yield Part(f"save in {_until(line.seconds_to_save, passed)}", Rank.SAVE, "dim")
        yield Part(f"{_until(line.seconds_left, passed)} left", Rank.LEFT)


def _until(seconds: float, passed: float) -> str:
    """The remaining time in words, after ``passed`` seconds; ``?`` if the time is not known."""
    return human_time(seconds if math.isnan(seconds) else max(0.0, seconds - passed))
