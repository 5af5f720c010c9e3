"""What a suite's command does around its measurements: arguments, the first child process, kinds of work in turn, remarks."""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from benchmarks.suite.children import Child, ChildGoneError, Values, work_through
from benchmarks.suite.frame import DONE, FAILED, INTERRUPTED, Budget, no_gpu, positive, regular_expression
from scalegpt.config.machine import MachineConfig
from scalegpt.hardware.detect import machine_at_hand
from scalegpt.hardware.gpus import find_card, known_card
from scalegpt.hardware.machine import Machine

MINUTES = 8.5
"""A suite is to take less than nine; starting and ending are not in these."""

IMAGINED = "H100 SXM"
"""The card that a dry run plans for."""


def add_arguments(parser: argparse.ArgumentParser, things: str) -> None:
    """The arguments that every suite has.

    Args:
        parser: the suite's.
        things: what its rows are, in the plural.
    """
    parser.add_argument(
        "--minutes",
        type=positive,
        default=MINUTES,
        help="leave out what does not fit in so many (default: %(default)s)",
    )
    parser.add_argument(
        "--only", type=regular_expression, help=f"only {things} in whose name this regular expression is found"
    )
    parser.add_argument(
        "--dry",
        action="store_true",
        help="take the same configurations through real steps, tiny and on the CPU; measure and write nothing",
    )


def matches(only: re.Pattern[str] | None, name: str) -> bool:
    """Whether ``--only`` leaves a row."""
    return only is None or only.search(name) is not None


def say(text: str) -> None:
    """Print a line at once: a suite takes minutes, and may be read through a pipe."""
    print(text, flush=True)


def counts(rows: Iterable[Values]) -> str:
    """How many rows ended how."""
    outcomes = [row["outcome"] for row in rows]
    return ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in dict.fromkeys(outcomes))


def exit_status(rows: Iterable[Values], *, interrupted: bool) -> int:
    """How the suite ended: a configuration that failed in a way that is no result fails it."""
    if interrupted:
        return INTERRUPTED
    return FAILED if any(row["outcome"] == "failed" for row in rows) else DONE


class Session:
    """A suite's child processes; the first has greeted already.

    Args:
        module: the child's.
        dry: on the CPU.

    Raises:
        ChildGoneError: no child comes up.
    """

    def __init__(self, module: str, *, dry: bool) -> None:
        self._module, self._mode = module, "dry" if dry else "cuda"
        first = Child(module, [self._mode])
        self._waiting = [first]
        self.gpu: Values | None = first.greeting["gpu"]
        self.torch: str = first.greeting["torch"]

    @classmethod
    def open(cls, suite: str, module: str, *, dry: bool) -> "Session | int":
        """The session of a suite, or the exit status where there can be none, after a line that says why."""
        try:
            session = cls(module, dry=dry)
        except ChildGoneError as gone:
            print(f"gpu_suite {suite}: error: the measuring process does not start: {gone}", file=sys.stderr)
            return FAILED
        if session.gpu is None and not dry:
            session.close()
            return no_gpu(suite, session.torch)
        return session

    @property
    def where(self) -> str:
        """What the configurations run on."""
        return "the CPU, tiny" if self.gpu is None else str(self.gpu["name"])

    def machine(self) -> Machine:
        """The machine at hand as the trainer would plan for it, by what the child has found; in a dry run an imagined one."""
        if self.gpu is None:
            return replace(Machine.with_card(find_card(IMAGINED)), torch=self.torch)
        at_hand = machine_at_hand(MachineConfig(gpus=1), torch=self.torch)
        return replace(
            at_hand,
            name=self.gpu["name"],
            usable_bytes=self.gpu["total_bytes"],
            card=known_card(self.gpu["name"]),
            capability=self.gpu["capability"],
            is_gpu=True,
            driver=self.gpu["driver"],
            notes=(),
        )

    def close(self) -> None:
        """End the first child where no work has taken it."""
        while self._waiting:
            self._waiting.pop().close()

    def work(
        self,
        kinds: Sequence[tuple[float, Iterable[Values]]],
        budget: Budget,
        *,
        usual_seconds: Callable[[Values], float],
        most_seconds: Callable[[Values], float],
    ) -> Iterator[tuple[Values, Values]]:
        """Have kinds of jobs done one after another, each by a child of its own, as far as time goes.

        Args:
            kinds: of each the seconds that it needs, by which the time is shared out, and its jobs.
            budget: for all of them.
            usual_seconds: as for :func:`~benchmarks.suite.children.work_through`.
            most_seconds: likewise.

        Yields:
            Each job and its answer.
        """
        for number, (need, jobs) in enumerate(kinds):
            part = budget.share(need / max(1.0, sum(each for each, _ in kinds[number:])))
            yield from work_through(jobs, self._start, part, usual_seconds=usual_seconds, most_seconds=most_seconds)

    def _start(self, seconds: float) -> Child:
        return self._waiting.pop() if self._waiting else Child(self._module, [self._mode], seconds)
