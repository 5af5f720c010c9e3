"""Prints a run's messages and steps: a live line on a terminal, plain lines elsewhere. Only the first rank prints."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO, cast

from scalegpt.system.streams import lasting
from scalegpt.text import visible
from scalegpt.training.output.step_line import StepLine
from scalegpt.training.output.terminal import hanging, takes_live_line, terminal_columns

if TYPE_CHECKING:  # imports rich, which plain output does not need
    from scalegpt.training.output.live import LiveLine


class Logger:
    """Prints a run's messages and steps on rank 0.

    Args:
        speaks: whether this rank prints.
        total: number of steps of the run.
        every: print every Nth step where there is no live line.
        plain: print plain lines on a terminal too.
    """

    def __init__(self, *, speaks: bool, total: int, every: int, plain: bool = False) -> None:
        self.speaks, self.total, self.every = speaks, total, every
        self._stream = cast(TextIO, lasting(sys.stdout))
        self._is_live = speaks and not plain and takes_live_line(self._stream)
        self._live: LiveLine | None = None
        self._first: int | None = None

    def say(self, message: str) -> None:
        """Print a message, with control characters made visible, above the live line if there is one."""
        if not self.speaks:
            return
        text = visible(message)
        if self._is_live:
            text = "\n".join(hanging(line, terminal_columns(self._stream)) for line in text.split("\n"))
        if self._live is not None:
            self._live.print(text)
        else:
            self._stream.write(f"{text}\n")  # one write, so that the lines of several processes do not mix
            self._stream.flush()

    def start(self, step: int, *, planned_bytes: int = 0, doing: Callable[[], str] = str) -> None:
        """Prepare to show steps: in a live line if the output is a terminal.

        Args:
            step: number of steps taken so far.
            planned_bytes: the predicted peak memory of this rank; 0: not known.
            doing: returns what the run does now, in a word or two; empty: nothing that needs to be shown.
        """
        self._first = step + 1
        if self._is_live:
            from scalegpt.training.output.live import LiveLine

            self._live = LiveLine(self._stream, total=self.total, taken=step, planned_bytes=planned_bytes, doing=doing)
            self._live.start()

    def step(self, line: StepLine) -> None:
        """Show a finished step in the live line; elsewhere print this process's first step, every Nth and the last."""
        if self._live is not None:
            self._live.update(line)
        elif line.step % self.every == 0 or line.step in {self._first, self.total}:
            self.say(f"step {line.step}/{self.total}  {line.text()}")

    def stop(self) -> None:
        """Remove the live line."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()
