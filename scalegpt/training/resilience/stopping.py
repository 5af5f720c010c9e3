"""Being asked to stop: by a signal, because the launcher has gone, or because the time is up.

A request leaves a mark; after each step all ranks learn of each other's marks in the reduction that they make for the
loss anyway, finish the same step, save and end. So what a step, an evaluation or a save is doing when a signal comes is
finished first; a line says so at once. Until the ranks have met there is nothing to finish and nobody to agree with:
then a request ends the process at once.

======================  ===============================================================================================
SIGTERM                 batch systems and launchers: stop
SIGINT                  Ctrl-C: stop; a second one leaves at once, without a checkpoint
SIGHUP                  the terminal was closed: stop; under ``nohup``, which ignores it, go on
SIGUSR1                 Slurm's warning before the time is up (``--signal=USR1@120``): stop
the launcher has gone   nobody would end its workers: stop
max_minutes             the run's own limit
======================  ===============================================================================================

Exit statuses are those of a shell for a process that a signal ended: 128 and the signal's number.
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
"""How often the launcher is looked for."""

GRACE_SECONDS = 120.0
"""How long a rank whose launcher has gone may take to save before it ends by force: nobody else would end it."""

LAST_WORDS_SECONDS = 2.0
"""How long a process that leaves at once may take to say so; a disk that hangs must not keep it."""

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


class Stopped(RunError):  # noqa: N818 - being asked is no error
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
    """What this process was asked, if it was.

    Args:
        leave: ends the process at once.

    Attributes:
        reason: the first that was given; None: go on.
        last_words: called before the process leaves at once, in a thread of its own.
        course: what happens after a request, in words that follow the signal's name; the user reads it at once. Empty where
            the run is ending already.
    """

    def __init__(self, leave: Leave = os._exit) -> None:
        self.reason: Reason | None = None
        self.last_words: Callable[[], object] = lambda: None
        self.course: Callable[[], str] = lambda: "ending before the first step"
        self._leave, self._alone = leave, False
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Take the signals while it lasts; afterwards they do again what they did before.

        A thread reads them: Python itself would look at them only when the main thread returns from a collective, which may
        be never. Outside of the main thread nothing is taken, since Python allows that nowhere else.
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
        """Let requests end the process at once while it lasts: until the ranks have met, with torch still to be imported."""
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
        """Leave a mark, of which the first counts; the first rank reports what happens now, since a step may take long."""
        with self._lock:
            if self.reason is None:
                self.reason = reason
            alone = self._alone
        if alone:
            self._leave_alone(reason)
        elif reason is not Reason.TIME and ranks_or_alone().rank == 0:
            # In a thread of its own: a terminal that was stopped must not keep the next signal waiting.
            threading.Thread(target=_report, args=(reason, self.course), name="report", daemon=True).start()

    def _listen(self, reader: int) -> None:
        """Take numbers of signals, each a byte, until the pipe is closed."""
        interrupted = False
        while told := os.read(reader, 1):
            reason = SIGNALS.get(signal.Signals(told[0]))
            if reason is Reason.INT and interrupted:
                self._leave_at_once(reason)
            interrupted = interrupted or reason is Reason.INT
            if reason is not None:
                self.ask(reason)
        os.close(reader)

    def _leave_alone(self, reason: Reason) -> None:
        """End the process before the ranks have met."""
        self.last_words = lambda: _say_stopped(reason)
        self._leave_at_once(reason)

    def _leave_at_once(self, reason: Reason) -> None:
        """End the process. What is half written has no name yet, and is cleaned up by the next run."""
        speaker = threading.Thread(target=self.last_words, daemon=True)
        speaker.start()
        speaker.join(LAST_WORDS_SECONDS)
        self._leave(reason.exit_status)

    # --- among ranks -------------------------------------------------------------------------------------------------

    def marks(self, *, time_is_up: bool = False) -> list[float]:
        """This rank's mark as a number for each reason, to be summed over the ranks."""
        if time_is_up:
            self.ask(Reason.TIME)
        return [float(reason is self.reason) for reason in Reason]

    @staticmethod
    def agreed(counts: Sequence[float]) -> Reason | None:
        """What the summed marks mean, the same on every rank; a signal goes before what is no hurry."""
        return next((reason for reason, count in zip(Reason, counts, strict=True) if count), None)

    def check(self, world: "World") -> None:
        """Ask all ranks, where there is no loss to reduce yet; all ranks must call it together.

        Raises:
            Stopped: one of them was asked to stop.
        """
        reason = self.agreed(world.sum(world.numbers(self.marks())).tolist())
        if reason is not None:
            raise Stopped(reason)

    def check_alone(self) -> None:
        """Ask this rank alone, in work whose errors reach the other ranks.

        Raises:
            Stopped: it was asked to stop.
        """
        if self.reason is not None:
            raise Stopped(self.reason)


def _report(reason: Reason, course: Callable[[], str]) -> None:
    """Write one line to standard error, below ``^C`` and the live line of a terminal."""
    next_ = course()
    if not next_:
        return
    again = "; again: leave now, without a checkpoint" if reason is Reason.INT else ""
    with contextlib.suppress(OSError):  # the terminal was closed
        begin = "\n" if os.isatty(STDERR) else ""
        os.write(STDERR, f"{begin}scalegpt train: {reason.words}: {next_}{again}\n".encode())


def _is_ignored(number: signal.Signals) -> bool:
    """Whether whoever started this process wants a signal ignored, as ``nohup`` does."""
    return signal.getsignal(number) is signal.SIG_IGN


def _say_stopped(reason: Reason) -> None:
    """One line; of the ranks that a launcher has started, the first speaks."""
    if ranks_or_alone().rank != 0:
        return
    with contextlib.suppress(OSError):  # a terminal that was closed
        os.write(sys.stdout.fileno(), f"{Stopped(reason)}\n".encode())


def _noted(_number: int, _frame: FrameType | None) -> None:
    """Python wants a handler; the listener has the signal already."""


class LauncherWatch:
    """Looks whether the launchers of this process are still there, and asks to stop when one is not.

    Killing torchrun with SIGKILL, or DeepSpeed's runner with any signal, leaves their workers running. Ranks that srun or a
    user's shell has started are not watched: those end them, or are meant to end first.

    Args:
        request: whom to ask.
        leave: ends the process by force once the grace is over.
        seconds: how often to look.
        grace: seconds between the first sight and the end by force.
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
        """Begin to look, if there is a launcher; the first time before this returns."""
        if not self._launchers:
            return
        if not self._is_there():
            self.request.ask(Reason.LAUNCHER)
        threading.Thread(target=self._look, name="launcher watch", daemon=True).start()

    def stop(self) -> None:
        """Look no more."""
        self._over.set()

    def _is_there(self) -> bool:
        return all(lives() for lives in self._launchers)

    def _look(self) -> None:
        while self._is_there():
            if self._over.wait(self.seconds):
                return
        self.request.ask(Reason.LAUNCHER)
        if not self._over.wait(self._grace):
            self.leave(Reason.LAUNCHER.exit_status)
