"""What a run prints: a live line on a terminal, plain lines in a log file. Only the first rank prints."""

import sys
from dataclasses import dataclass
from typing import TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from scalegpt.system.streams import lasting
from scalegpt.text import visible
from scalegpt.units import human_count, human_time


@dataclass(frozen=True)
class StepLine:
    """The values that are printed for a step."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    mfu: float | None
    seconds_left: float
    skipped: int = 0

    def text(self) -> str:
        """The printed line, without the step's number."""
        parts = [f"loss {self.loss:.4f}", f"{human_count(self.tokens_per_second)} tok/s"]
        if self.mfu is not None:
            parts.append(f"MFU {self.mfu:.1%}")
        parts += [f"lr {self.learning_rate:.2e}", f"norm {self.grad_norm:.2f}"]
        if self.skipped:
            parts.append(f"{self.skipped} skipped")
        return "  ".join([*parts, f"{human_time(self.seconds_left)} left"])


class Logger:
    """Prints a run's messages and step lines on rank 0.

    Args:
        speaks: whether this rank prints.
        total: number of steps of the run.
        every: print every Nth step where the output is no terminal.
    """

    def __init__(self, *, speaks: bool, total: int, every: int) -> None:
        self.speaks, self.total, self.every = speaks, total, every
        self.console = Console(
            file=cast(TextIO, lasting(sys.stdout)), highlight=False, soft_wrap=True, quiet=not speaks
        )
        self._live: Progress | None = None
        self._task: TaskID | None = None
        self._first: int | None = None

    def say(self, message: str) -> None:
        """Print a message, with control characters made visible, above the live line if there is one."""
        self.console.print(visible(message), markup=False)

    def start(self, step: int) -> None:
        """Show the live line where the output is a terminal; ``step`` is the number of steps taken so far."""
        self._first = step + 1
        if self.speaks and self.console.is_terminal:
            self._live = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=24),
                TextColumn("{task.description}", markup=False),
                console=self.console,
                transient=True,
            )
            self._task = self._live.add_task(
                "first step: kernels are chosen, or compiled", total=self.total, completed=step
            )
            self._live.start()

    def step(self, line: StepLine) -> None:
        """Show a finished step in the live line; elsewhere print this process's first step, every Nth and the last."""
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=line.step, description=line.text())
        elif line.step % self.every == 0 or line.step in {self._first, self.total}:
            self.say(f"step {line.step}/{self.total}  {line.text()}")

    def stop(self) -> None:
        """Remove the live line."""
        if self._live is not None:
            self._live.stop()
            self._live = None
