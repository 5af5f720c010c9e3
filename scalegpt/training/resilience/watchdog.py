"""Finds a step that never ends, or a rank that ends alone, and ends all ranks, so that a launcher can start them again.

The trainer reports to its watchdog where it is (:meth:`Watchdog.at`), and a thread writes that into the rank's heartbeat
(:mod:`scalegpt.training.resilience.heartbeat`). Where a step exceeds its time-out, the first rank to see it makes all
ranks end and names the slow one. Every rank writes its stacks to ``stacks_rank_N.txt`` before its process ends: a rank
that waits in a collective cannot be resumed, and one that ends makes ``torchrun --max-restarts`` start again from the
last checkpoint.

The first step may take long: it compiles, and tunes kernels. Evaluating, sampling and saving have the same time-out.
"""

import faulthandler
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import TypeVar

from scalegpt.errors import RunError
from scalegpt.training.resilience.heartbeat import Halt, Heartbeats
from scalegpt.training.runs.directory import RunDirectory

HUNG_STATUS = 75
"""Exit status of ranks that their watchdog ended: EX_TEMPFAIL of sysexits.h, try again."""

BEATS_TO_END = 6
"""Heartbeats that a rank may take to end by itself after a halt; the rank that wrote the halt needs four to report why."""

Item = TypeVar("Item")


class Watchdog:
    """Watches one rank.

    Args:
        directory: the run's.
        beats: the files of all ranks.
        first: time-out in seconds of the first step, and of everything between steps; 0: none.
        later: time-out in seconds of each later step; 0: none.
        leave: ends the process.
        clock: seconds.

    Attributes:
        step: the current step, or the last one.
        place: where within it, or what is done between steps.
        is_within_step: whether a step is under way.
    """

    def __init__(
        self,
        directory: RunDirectory,
        beats: Heartbeats,
        *,
        first: float,
        later: float,
        leave: Callable[[int], object] = os._exit,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.directory, self.beats, self.rank = directory, beats, beats.world.rank
        self.first, self.later = first or math.inf, later or math.inf
        self.leave, self.clock = leave, clock
        self.step, self.taken, self.place, self.moves = 0, 0, "start", 0
        self.is_within_step = False
        self._began, self._limit, self._is_first = clock(), self.first, True
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self, taken: int) -> None:
        """Begin to watch; all ranks must call it together."""
        self.step = taken
        self.beats.open()
        self.outside("start")
        self._beat()
        self._thread.start()

    def stop(self) -> None:
        """Stop watching."""
        self._over.set()

    # --- called by the trainer ---------------------------------------------------------------------------------------

    def begin_step(self, step: int) -> None:
        """Begin a step with loading its data; the first step is number 1."""
        self.step, self.taken, self._began = step, step - 1, self.clock()
        self._limit, self._is_first, self.is_within_step = (self.first if self._is_first else self.later), False, True
        self.at("loader")

    def at(self, place: str) -> None:
        """Set the place within a step."""
        self.place = place
        self.moves += 1

    def outside(self, place: str) -> None:
        """Begin something between steps, such as saving."""
        self.taken, self._began, self._limit, self.is_within_step = self.step, self.clock(), self.first, False
        self.at(place)

    def loading(self, batches: Iterable[Item]) -> Iterator[Item]:
        """The batches; the place is the loader while one is waited for, then the model, and the optimizer at the end."""
        for batch in batches:
            self.at("forward and backward")
            yield batch
            self.at("loader")
        self.at("optimizer")

    def halt(self, cause: str, *, status: int, state: str = "failed") -> Halt:
        """Make all ranks end, and write the cause into ``run_status.json``; the first halt counts.

        Returns:
            The halt that counts: this one, or that of another rank that was first.
        """
        mine = Halt(self.rank, status, state, " ".join(cause.split()))
        first = self.beats.halt(mine)
        if first is mine:
            self._write_cause(state, mine.cause)
        elif first.rank == self.rank and self._thread.is_alive():
            self._thread.join()  # the time-out of this rank is over: its thread finds the cause, and ends this process
        return first

    # --- the thread --------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._over.wait(self.beats.seconds):
            self._beat()
            halt = self.beats.read_halt()
            if halt is not None:
                self._end_on_halt(halt)
                return
            if self.clock() - self._began > self._limit:
                self._time_out()
                return

    def _beat(self) -> None:
        self.beats.beat(self.step, self.place, self.moves)

    def _time_out(self) -> None:
        """End a step that takes too long: halt all ranks, and find the one to blame while they write their stacks."""
        late = f"step {self.step} takes more than {self._limit:g} s"
        halt = self.beats.halt(Halt(self.rank, HUNG_STATUS, "failed", late))
        if halt.rank != self.rank:
            self._end_on_halt(halt)
            return
        self._dump(late)
        who = self.beats.blame(self._wait_and_beat)
        cause = f"{late}: {who}"
        self._write_cause("failed", cause)
        _say(f"rank {self.rank}: {cause}; stacks in {self.directory.path}/stacks_rank_*.txt")
        self.leave(HUNG_STATUS)

    def _end_on_halt(self, halt: Halt) -> None:
        """End because another rank wrote a halt; write the stacks first if a step hangs."""
        if halt.status == HUNG_STATUS:
            self._dump(halt.cause)
        for _ in range(BEATS_TO_END if halt.status == HUNG_STATUS else 2):
            if self._over.wait(self.beats.seconds):
                return  # the main thread ends by itself, with its own error
            self._beat()
        if self.beats.world.is_first and halt.status != HUNG_STATUS:
            _say(f"rank {self.rank} ends: {halt.cause}")
        self.leave(halt.status)

    def say_if_first(self, line: str) -> None:
        """Print a line if the halt is this rank's: a signal to all ranks needs only one line."""
        halt = self.beats.read_halt()
        if halt is None or halt.rank == self.rank:
            _say(line)

    def _write_cause(self, state: str, cause: str) -> None:
        with suppress(RunError):  # the cause is printed too
            self.directory.amend_status(state=state, step=self.taken, cause=cause)

    def _wait_and_beat(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(self.beats.seconds / 2)
            self._beat()

    def _dump(self, why: str) -> None:
        """Write the stacks of all threads of this rank."""
        with (
            suppress(OSError),
            (self.directory.path / f"stacks_rank_{self.rank}.txt").open("w", encoding="utf-8") as file,
        ):
            file.write(f"rank {self.rank}, step {self.step}, {self.place}: {why}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)


def _say(line: str) -> None:
    with suppress(OSError, ValueError):
        sys.stderr.write(f"scalegpt train: {line}\n")  # in one piece, so that ranks' lines do not mix
        sys.stderr.flush()
