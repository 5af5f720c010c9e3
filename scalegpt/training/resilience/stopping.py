"""Requests to stop: by a signal, because the launcher has gone, or because the time is up.

A request is recorded. In each step the ranks exchange their requests with the loss (:mod:`scalegpt.training.step_flags`), so
all of them finish the same step, save and end. An evaluation or a save that is under way is finished first; a line says so at
once. Before the ranks have met there is nothing to finish, and a request ends the process at once.

======================  ===============================================================================================
SIGTERM                 batch systems and launchers: stop
SIGINT                  Ctrl-C: stop; a second one leaves at once, without a checkpoint
SIGHUP                  the terminal was closed: stop; under ``nohup``, which ignores it, continue
SIGUSR1                 Slurm's warning before the time is up (``--signal=USR1@120``): stop
the launcher has gone   nobody would end its workers: stop
max_minutes             the run's own limit
======================  ===============================================================================================

Exit statuses are those of a shell for a process that a signal ended: 128 plus the signal's number.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from types import FrameType
from typing import TYPE_CHECKING

from scalegpt.errors import RunError
from scalegpt.system.launchers import launchers
from scalegpt.system.ranks import ranks_or_alone

if TYPE_CHECKING:  # it imports torch, and this module must work before that is there
    from scalegpt.backends import World

LAUNCHER_SECONDS = 1.0
"""Seconds between two checks of the launcher."""

GRACE_SECONDS = 120.0
"""Seconds that a rank may take to save after its launcher has gone; then it ends itself, since nobody else would."""

LEAVE_SECONDS = 2.0
"""Seconds that a process which leaves at once may take to report it; a disk that hangs must not hold it."""

STDERR = 2
"""Written to without Python's buffer, which another thread may hold."""

Leave = Callable[[int], object]


class Reason(Enum):
    """Why a run stops before its last step: in words, and the exit status."""

    TERM = ("SIGTERM", 128 + signal.SIGTERM)
    INT = ("SIGINT", 128 + signal.SIGINT)
    HUP = ("SIGHUP", 128 + signal.SIGHUP)
    USR1 = ("SIGUSR1", 128 + signal.SIGUSR1)
    LAUNCHER = ("the launcher has gone", 128 + signal.SIGTERM)
    TIME = ("max_minutes reached", 0)

    @staticmethod
    def counts(given: "Reason | None") -> list[float]:
        """A rank's reason as one number for each reason, to be summed over the ranks."""
        return [float(reason is given) for reason in Reason]

    @staticmethod
    def first(counts: Sequence[float]) -> "Reason | None":
        """The reason that summed :meth:`counts` mean, the same on every rank: the first that some rank has."""
        return next((reason for reason, count in zip(Reason, counts, strict=True) if count), None)

    @property
    def words(self) -> str:
        """The reason in words."""
        return self.value[0]

    @property
    def exit_status(self) -> int:
        """What the process returns."""
        return int(self.value[1])


SIGNALS = {
    signal.SIGTERM: Reason.TERM,
    signal.SIGINT: Reason.INT,
    signal.SIGHUP: Reason.HUP,
    signal.SIGUSR1: Reason.USR1,
}


class Stopped(RunError):  # noqa: N818 - a request is no error
    """The run was asked to stop before it began; nothing was written.

    Attributes:
        exit_status: that of the reason.
    """

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason
        self.exit_status = reason.exit_status

    def __str__(self) -> str:
        return f"stopped before the first step: {self.reason.words}; nothing was changed, the same command starts again"


class StopRequest:
    """Whether this process was asked to stop, and why.

    Args:
        leave: ends the process at once.

    Attributes:
        reason: of the first request; None: there was none.
        before_leaving: called before the process leaves at once, in its own thread.
        what_next: says what happens after a request; printed at once, after the signal's name. Empty where the run is ending
            already.
    """

    def __init__(self, leave: Leave = os._exit) -> None:
        self.reason: Reason | None = None
        self.before_leaving: Callable[[], object] = lambda: None
        self.what_next: Callable[[], str] = lambda: "ending before the first step"
        self._leave, self._alone = leave, False
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Handle the signals inside the block; their former handlers are restored afterwards.

        A thread reads them: Python would run a handler only when the main thread returns from a collective, which may be
        never. Outside of the main thread no signal is handled, since Python does not allow it.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        listener = threading.Thread(target=self._listen, args=(reader,), name="signals", daemon=True)
        listener.start()
        wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        taken = [number for number in SIGNALS if number != signal.SIGHUP or not _is_ignored(number)]
        before = {number: signal.signal(number, _noted) for number in taken}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)
            os.close(writer)
            listener.join()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Let requests end the process at once inside the block: before the ranks have met, while torch is imported."""
        with self._lock:
            self._alone, reason = True, self.reason
        if reason is not None:
            self._leave_alone(reason)
        try:
            yield
        finally:
            with self._lock:
                self._alone = False

    def ask(self, reason: Reason) -> None:
        """Record a request; the first one counts. The first rank reports what happens now, since a step may take long."""
        with self._lock:
            if self.reason is None:
                self.reason = reason
            alone = self._alone
        if alone:
            self._leave_alone(reason)
        elif reason is not Reason.TIME and ranks_or_alone().rank == 0:
            # In its own thread: a terminal that was stopped must not block the next signal.
            threading.Thread(target=_report, args=(reason, self.what_next), name="report", daemon=True).start()

    def _listen(self, reader: int) -> None:
        """Read the numbers of signals, each a byte, until the pipe is closed."""
        interrupted = False
        while byte := os.read(reader, 1):
            reason = SIGNALS.get(signal.Signals(byte[0]))
            if reason is Reason.INT and interrupted:
                self._leave_at_once(reason)
            interrupted = interrupted or reason is Reason.INT
            if reason is not None:
                self.ask(reason)
        os.close(reader)

    def _leave_alone(self, reason: Reason) -> None:
        """End the process before the ranks have met."""
        self.before_leaving = lambda: _say_stopped(reason)
        self._leave_at_once(reason)

    def _leave_at_once(self, reason: Reason) -> None:
        """End the process. Unfinished files have temporary names, and the next start deletes them."""
        speaker = threading.Thread(target=self.before_leaving, daemon=True)
        speaker.start()
        speaker.join(LEAVE_SECONDS)
        self._leave(reason.exit_status)

    def check(self, world: "World") -> None:
        """End the set-up where a rank was asked to stop; all ranks must call it together.

        Raises:
            Stopped: one of them was asked to stop.
        """
        reason = Reason.first(world.sum(world.numbers(Reason.counts(self.reason))).tolist())
        if reason is not None:
            raise Stopped(reason)

    def check_alone(self) -> None:
        """The same by this rank alone, in work whose errors reach the other ranks.

        Raises:
            Stopped: it was asked to stop.
        """
        if self.reason is not None:
            raise Stopped(self.reason)


def _report(reason: Reason, what_next: Callable[[], str]) -> None:
    """Write one line to standard error, below ``^C`` and the live line of a terminal."""
    line = what_next()
    if not line:
        return
    again = "; a second SIGINT ends the run now, without a checkpoint" if reason is Reason.INT else ""
    with contextlib.suppress(OSError):  # the terminal was closed
        begin = "\n" if os.isatty(STDERR) else ""
        os.write(STDERR, f"{begin}scalegpt train: {reason.words}: {line}{again}\n".encode())


def _is_ignored(number: signal.Signals) -> bool:
    """Whether the parent process set a signal to be ignored, as ``nohup`` does."""
    return signal.getsignal(number) is signal.SIG_IGN


def _say_stopped(reason: Reason) -> None:
    """Print one line, on the first rank."""
    if ranks_or_alone().rank != 0:
        return
    with contextlib.suppress(OSError):  # a terminal that was closed
        os.write(sys.stdout.fileno(), f"{Stopped(reason)}\n".encode())


def _noted(_number: int, _frame: FrameType | None) -> None:
    """Python needs a handler; the listening thread has the signal already."""


class LauncherWatch:
    """Watches the launchers of this process, and requests a stop when one has ended.

    Killing torchrun with SIGKILL, or DeepSpeed's runner with any signal, leaves their workers running. The parents of ranks
    that srun or a user's shell started are not watched: those end their children, or are meant to end first.

    Args:
        request: takes the request.
        leave: ends the process by force once the grace period is over.
        seconds: between two checks.
        grace: seconds between the request and the end by force.
    """

    def __init__(
        self,
        request: StopRequest,
        *,
        leave: Leave = os._exit,
        seconds: float = LAUNCHER_SECONDS,
        grace: float = GRACE_SECONDS,
    ) -> None:
        self.request, self.leave, self.seconds, self._grace = request, leave, seconds, grace
        self._over = threading.Event()
        self._launchers = launchers()

    def start(self) -> None:
        """Begin to watch, if there is a launcher; the first check is made before this returns."""
        if not self._launchers:
            return
        if not self._is_there():
            self.request.ask(Reason.LAUNCHER)
        threading.Thread(target=self._watch, name="launcher watch", daemon=True).start()

    def stop(self) -> None:
        """Stop watching."""
        self._over.set()

    def _is_there(self) -> bool:
        return all(lives() for lives in self._launchers)

    def _watch(self) -> None:
        while self._is_there():
            if self._over.wait(self.seconds):
                return
        self.request.ask(Reason.LAUNCHER)
        if not self._over.wait(self._grace):
            self.leave(Reason.LAUNCHER.exit_status)
