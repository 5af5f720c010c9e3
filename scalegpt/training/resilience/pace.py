"""Finds a rank or a machine that computes more slowly than the others, and makes all of them wait.

The time of a step is the same on all ranks, since they wait for each other in collectives. Each rank therefore measures
its own work alone, and adds it to the message that the ranks exchange in each step.

- On a CPU it is the time in which the rank's thread computes or waits for a core during the forward and backward passes.
  The thread sleeps while it waits for other ranks, which does not count.
- On a GPU it is the time of fixed matrix products once in a while, between steps: what a step's kernels take there cannot
  be told from waiting.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from scalegpt.backends import World

SLOWER = 1.2
"""A rank is slow if its own work takes more than this multiple of the median rank's."""

LEAST_STEPS = 10
"""The fewest steps whose mean is compared. Fewer would report chance."""

IN_A_ROW = 3
"""How often in a row a rank or a machine must be slow before that is reported."""

PROBE_SIDE, PROBE_COUNT = 1024, 64
"""The products that a GPU times: fp16 matrices of this many rows and columns, this many times. They take about 1 ms."""

SCHEDSTAT = Path("/proc/thread-self/schedstat")
"""Linux's nanoseconds that the thread has run, and has waited for a core."""

Item = TypeVar("Item")


class Pace:
    """Measures this rank's own work, and compares all ranks'.

    Args:
        world: the ranks.
        log_every: steps between two logged lines; the ranks are compared as often, but at most every
            :data:`LEAST_STEPS` steps.
        clock: returns the seconds of this thread's own work so far.
    """

    def __init__(self, world: World, log_every: int, clock: Callable[[], float] | None = None) -> None:
        self.world, self.every = world, max(log_every, LEAST_STEPS)
        self._clock = clock or own_seconds
        self._mine, self._steps = 0.0, 0
        self._sums = [0.0] * world.size
        self._slow_for: dict[str, int] = {}
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    def timed(self, batches: Iterable[Item]) -> Iterator[Item]:
        """Yield the batches of a step, and time this rank's own work on each."""
        self._mine = 0.0
        for batch in batches:
            start = self._clock()
            yield batch
            self._mine += self._clock() - start

    def taken(self) -> float:
        """Seconds of this rank's own work in this step; on a GPU, those of the last timed products, or 0."""
        if self.world.device.type != "cuda":
            return self._mine
        if self._events is None or not self._events[1].query():  # type: ignore[no-untyped-call]
            return 0.0
        return float(self._events[0].elapsed_time(self._events[1]) / 1000)

    def compare(self, seconds: Sequence[float]) -> list[str]:
        """Add a step's seconds of all ranks, and return lines to print on ranks that have been slow for a while.

        A rank or a machine is reported when it has been slow :data:`IN_A_ROW` times, and again only after it was not.
        """
        self._steps += 1
        self._sums = [total + more for total, more in zip(self._sums, seconds, strict=True)]
        if self._steps < self.every:
            return []
        means, self._sums, self._steps = [total / self._steps for total in self._sums], [0.0] * len(self._sums), 0
        if self.world.device.type == "cuda":
            means = list(seconds)  # the products of the last comparison, which all ranks have finished by now
            self._events = _time_products(self.world.device)
        slow = self._find_slow(means)
        self._slow_for = {name: self._slow_for.get(name, 0) + 1 for name in slow}
        return [
            f"warning: {name} takes {slow[name]:.1f} times the median of the ranks for its own work, in the last "
            f"{IN_A_ROW * self.every} steps, and the others wait for it: see its clock, temperature and other programs"
            for name, times in self._slow_for.items()
            if times == IN_A_ROW
        ]

    def _find_slow(self, means: Sequence[float]) -> dict[str, float]:
        """Name → multiple of the median, for machines that are slow, and for single slow ranks of other machines."""
        if len(means) < 2 or min(means) <= 0:  # on a GPU nothing is timed yet
            return {}
        median = statistics.median_low(means)
        found, covered = {}, set()
        for machine in self.world.machines:
            ranks = range(machine.first, machine.first + machine.ranks)
            ratio = statistics.median_low([means[rank] for rank in ranks]) / median
            if ratio > SLOWER:
                found[str(machine)] = ratio
                covered |= set(ranks)
        for rank, mean in enumerate(means):
            if rank not in covered and mean / median > SLOWER:
                found[f"rank {rank}"] = mean / median
        return found


def own_seconds() -> float:
    """Seconds that this thread has computed or waited for a core; only the former if the system does not tell more."""
    try:
        ran, waited, _ = SCHEDSTAT.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return time.thread_time()
    return (int(ran) + int(waited)) / 1e9


def _time_products(device: torch.device) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    """Start the products, without waiting for them. They are between steps, where the step's own peak leaves room."""
    values = torch.ones(PROBE_SIDE, PROBE_SIDE, dtype=torch.float16, device=device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(PROBE_COUNT):
        torch.mm(values, values)
    end.record()
    return begin, end
