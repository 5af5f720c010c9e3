"""A step that never ends, and a rank that ends alone: seen, told, and ended on all ranks, so that a launcher can start again.

The trainer tells its watchdog where it is (:meth:`Watchdog.at`). A thread of its own passes that on to the other ranks
(:mod:`scalegpt.training.resilience.heartbeat`). Where a step takes longer than it may, the rank that sees it first
tells all to end, names the slow one, and every rank writes its stacks to ``stacks_rank_N.txt`` before its process ends:
a rank that waits in a collective cannot be brought back, and one that ends makes ``torchrun --max-restarts`` begin
again from the last checkpoint.

The first step may take long: it compiles, and tunes kernels. Evaluating, sampling and saving are given as long.
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

FAREWELL_BEATS = 6
"""So many beats a rank that others told to end may take to end by itself; the one that told them needs four to say why."""

Item = TypeVar("Item")


class Watchdog:
    """Watches one rank.

    Args:
        directory: the run's.
        beats: the files of all ranks.
        first: seconds that the first step, and what is no step, may take; 0: endless.
        later: seconds that each later step may take; 0: endless.
        leave: ends the process.
        clock: seconds.

    Attributes:
        step: the step under way, or the last one.
        place: where within it, or what is done between steps.
        is_within_step: whether it is a step that is under way.
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
        """Begin to watch after so many steps; all ranks must call it together."""
        self.step = taken
        self.beats.open()
        self.outside("start")
        self._beat()
        self._thread.start()

    def stop(self) -> None:
        """Watch no more."""
        self._over.set()

    # --- what the trainer says ---------------------------------------------------------------------------------------

    def begin_step(self, step: int) -> None:
        """A step begins, with its data; the first is number 1."""
        self.step, self.taken, self._began = step, step - 1, self.clock()
        self._limit, self._is_first, self.is_within_step = (self.first if self._is_first else self.later), False, True
        self.at("loader")

    def at(self, place: str) -> None:
        """Say where we are within a step."""
        self.place = place
        self.moves += 1

    def outside(self, place: str) -> None:
        """Say that something begins that is no step, such as saving."""
        self.taken, self._began, self._limit, self.is_within_step = self.step, self.clock(), self.first, False
        self.at(place)

    def loading(self, batches: Iterable[Item]) -> Iterator[Item]:
        """The batches, with word of when the loader has the floor and when the model."""
        for batch in batches:
            self.at("forward and backward")
            yield batch
            self.at("loader")
        self.at("optimizer")

    def halt(self, cause: str, *, status: int, state: str = "failed") -> Halt:
        """Tell all ranks to end, and say so in ``run_status.json``; the first rank that does is heard.

        Returns:
            What all ranks are told: ours, or what another rank has said before.
        """
        mine = Halt(self.rank, status, state, " ".join(cause.split()))
        told = self.beats.halt(mine)
        if told is mine:
            self._tell(state, mine.cause)
        elif told.rank == self.rank and self._thread.is_alive():
            self._thread.join()  # it gave up, is finding out why, and will end this process
        return told

    # --- the thread --------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._over.wait(self.beats.seconds):
            self._beat()
            told = self.beats.read_halt()
            if told is not None:
                self._obey(told)
                return
            if self.clock() - self._began > self._limit:
                self._give_up()
                return

    def _beat(self) -> None:
        self.beats.beat(self.step, self.place, self.moves)

    def _give_up(self) -> None:
        """Our step takes too long: tell the others, and find out who is to blame while they write their stacks."""
        late = f"step {self.step} takes more than {self._limit:g} s"
        told = self.beats.halt(Halt(self.rank, HUNG_STATUS, "failed", late))
        if told.rank != self.rank:
            self._obey(told)
            return
        self._dump(late)
        who = self.beats.blame(self._wait_and_beat)
        cause = f"{late}: {who}"
        self._tell("failed", cause)
        _say(f"rank {self.rank}: {cause}; stacks in {self.directory.path}/stacks_rank_*.txt")
        self.leave(HUNG_STATUS)

    def _obey(self, told: Halt) -> None:
        """Another rank said that all must end: leave our stacks if it is for a step that hangs, and end."""
        if told.status == HUNG_STATUS:
            self._dump(told.cause)
        for _ in range(FAREWELL_BEATS if told.status == HUNG_STATUS else 2):
            if self._over.wait(self.beats.seconds):
                return  # the main thread ends by itself, with an error of its own
            self._beat()
        if self.beats.world.is_first and told.status != HUNG_STATUS:
            _say(f"rank {self.rank} ends: {told.cause}")
        self.leave(told.status)

    def say_first(self, line: str) -> None:
        """Say a line where this rank is the one that told all to end; a signal to all ranks needs one line, not many."""
        told = self.beats.read_halt()
        if told is None or told.rank == self.rank:
            _say(line)

    def _tell(self, state: str, cause: str) -> None:
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
