"""Ends all ranks when a step hangs or another rank has ended, so that a launcher can restart the run.

The trainer tells its watchdog what it is doing (:meth:`Watchdog.at`), and the watchdog's thread writes that into the
rank's heartbeat (:mod:`scalegpt.training.resilience.heartbeat`). When a step exceeds its time-out, the first rank to
notice makes all ranks end and names the rank to blame. Every rank writes its stack traces to ``stacks_rank_N.txt``
before its process ends. The process must end, because a rank that waits in a collective cannot be resumed. Then
``torchrun --max-restarts`` starts all ranks again from the last checkpoint.

The first step has a time-out of its own, since it compiles and tunes kernels. Work between steps (evaluation, sampling,
saving) has the time-out of the first step.
"""

import faulthandler
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from scalegpt.backends.machines import silent
from scalegpt.errors import RunError
from scalegpt.training.resilience.heartbeat import Halt, Heartbeats
from scalegpt.training.runs.directory import RunDirectory

HUNG_STATUS = 75
"""Exit status of ranks whose watchdog ended them after a time-out: EX_TEMPFAIL of sysexits.h, which means "try again"."""

BEATS_TO_END = 6
"""Heartbeat intervals that a rank waits after a time-out before it ends. The rank that reports the cause needs four."""

Item = TypeVar("Item")


class Watchdog:
    """Watches this rank for time-outs, and for a halt that another rank has written.

    Args:
        directory: the run's directory.
        beats: the heartbeat files of all ranks.
        first: time-out in seconds of the first step, and of all work between steps; 0: no time-out.
        later: time-out in seconds of each later step; 0: no time-out.
        leave: function that ends the process at once with an exit status.
        clock: returns the time in seconds.

    Attributes:
        step: number of the current step; between steps, number of the last step.
        taken: number of steps that are complete.
        place: what the rank is doing, within the step or between steps.
        moves: how many places the rank has entered.
        is_within_step: whether a step is being taken.
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
        """Begin to watch, after this number of steps taken; all ranks must call it together."""
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
        """Note that a step begins, by loading its data, and start its time-out. Steps are counted from 1."""
        self.step, self.taken, self._began = step, step - 1, self.clock()
        self._limit, self._is_first, self.is_within_step = (self.first if self._is_first else self.later), False, True
        self.at("loader")

    def at(self, place: str) -> None:
        """Note what the rank is doing now, for example ``optimizer``."""
        self.place = place
        self.moves += 1

    def outside(self, place: str) -> None:
        """Note that work between steps begins, for example saving, and start its time-out."""
        self.taken, self._began, self._limit, self.is_within_step = self.step, self.clock(), self.first, False
        self.at(place)

    def loading(self, batches: Iterable[Item]) -> Iterator[Item]:
        """Yield the batches, and note what the rank does: it waits for a batch, then runs the model, then the optimizer."""
        for batch in batches:
            self.at("forward and backward")
            yield batch
            self.at("loader")
        self.at("optimizer")

    def halt(self, cause: str, *, status: int, state: str = "failed") -> Halt:
        """Make all ranks end, and write the cause into ``run_status.json``, unless a halt was written before.

        Returns:
            The halt that counts: the one just made, or the one that was written before it.
        """
        mine = Halt(self.rank, status, state, " ".join(cause.split()))
        first = self.beats.halt(mine)
        if first is mine:
            self._write_cause(state, mine.cause)
        elif first.rank == self.rank and self._thread.is_alive():
            self._thread.join()  # this rank's thread has halted all ranks: it finds the cause, and ends this process
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
        """End a step that takes too long: halt all ranks, write the stack traces, and report the rank to blame."""
        late = f"step {self.step} takes more than {self._limit:g} s"
        halt = self.beats.halt(Halt(self.rank, HUNG_STATUS, "failed", late))
        if halt.rank != self.rank:
            self._end_on_halt(halt)
            return
        self._dump(late)
        who = self.beats.blame(self._wait_and_beat)
        cause = f"{late}: {who}{self._silent()}"
        self._write_cause("failed", cause)
        _say(f"rank {self.rank}: {cause}; stacks in {self._stacks}/stacks_rank_*.txt")
        self.leave(HUNG_STATUS)

    def _end_on_halt(self, halt: Halt) -> None:
        """End this process because of a halt. If the cause is a time-out, write the stack traces first."""
        if halt.status == HUNG_STATUS:
            self._dump(halt.cause)
        for _ in range(BEATS_TO_END if halt.status == HUNG_STATUS else 2):
            if self._over.wait(self.beats.seconds):
                return  # the main thread ends this process by itself, with its own error
            self._beat()
        world, is_hung = self.beats.world, halt.status == HUNG_STATUS
        is_far = world.local_rank == 0 and not (world.rank <= halt.rank < world.rank + world.local_size)
        if (world.is_first and not is_hung) or (is_far and world.machines):
            _say(f"rank {self.rank} ends: {halt.cause}{self._silent() if is_hung else ''}")
        self.leave(halt.status)

    def _silent(self) -> str:
        """Words on the machines that do not answer this one; empty if all do, or for a job on one machine."""
        world = self.beats.world
        quiet = silent(world.machines, self.rank)
        if not quiet:
            return ""
        more = f" and {len(quiet) - 1} more do not answer" if len(quiet) > 1 else " does not answer"
        return f"; {quiet[0]}{more} {socket.gethostname()}: see whether it runs, and the link between them"

    def say_if_first(self, line: str) -> None:
        """Print a line, unless another rank wrote the halt: a signal that reaches all ranks needs only one line."""
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

    @property
    def _stacks(self) -> Path:
        """The folder of stack traces: the run's, or on a machine that does not see it the one of its heartbeats."""
        own = self.beats.folder
        return own if own is not None and not self.directory.path.is_dir() else self.directory.path

    def _dump(self, why: str) -> None:
        """Write the stack traces of all threads of this rank to ``stacks_rank_N.txt``, with the reason."""
        path = self._stacks / f"stacks_rank_{self.rank}.txt"
        with suppress(OSError), path.open("w", encoding="utf-8") as file:
            file.write(f"rank {self.rank}, step {self.step}, {self.place}: {why}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)


def _say(line: str) -> None:
    with suppress(OSError, ValueError):
        sys.stderr.write(f"scalegpt train: {line}\n")  # one write, so that the lines of several ranks do not mix
        sys.stderr.flush()
