"""Requests to stop a run: by a signal, because the launcher has ended, or because the time limit is reached.

A request is only recorded. In each step the ranks exchange their requests together with the loss
(:mod:`scalegpt.training.step_flags`), so all ranks finish the same step, save and end. A current evaluation or save is
finished first, and rank 0 prints at once that the run waits for it. Before the ranks have joined there is nothing to
finish, so a request ends the process at once.

======================  ===============================================================================================
SIGTERM                 sent by batch systems and launchers: stop
SIGINT                  Ctrl-C: stop; a second SIGINT ends the run at once, without a checkpoint
SIGHUP                  the terminal was closed: stop; under ``nohup``, which ignores SIGHUP, continue
SIGUSR1                 Slurm's warning before the time limit (``--signal=USR1@120``): stop
the launcher has ended  its workers must end by themselves: stop
max_minutes             the run's own time limit is reached: stop
======================  ===============================================================================================

The exit status after a signal is the one that a shell reports: 128 plus the signal's number. After ``max_minutes`` it is 0.
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

if TYPE_CHECKING:  # scalegpt.backends imports torch, and this module must work before torch is imported
    from scalegpt.backends import World

LAUNCHER_SECONDS = 1.0
"""Seconds between two checks of whether the launcher still runs."""

GRACE_SECONDS = 120.0
"""After its launcher has ended, a rank may take this many seconds to save.

Then it ends itself, since nobody else would.
"""

LEAVE_SECONDS = 2.0
"""A process that ends at once may take this many seconds to report it. Then it ends anyway, since the disk may hang."""

STDERR = 2
"""File descriptor of standard error.

It is written to directly, since another thread may hold the lock of Python's buffer.
"""

ERASE_LINE = "\n" if os.environ.get("TERM") == "dumb" else "\r\x1b[2K"
"""Written to a terminal before a line, to erase the live line, which is then drawn again below."""

Leave = Callable[[int], object]


class Reason(Enum):
    """Why a run stops before its last step. Each value is the reason in words and the exit status."""

    TERM = ("SIGTERM", 128 + signal.SIGTERM)
    INT = ("SIGINT", 128 + signal.SIGINT)
    HUP = ("SIGHUP", 128 + signal.SIGHUP)
    USR1 = ("SIGUSR1", 128 + signal.SIGUSR1)
    LAUNCHER = ("the launcher has gone", 128 + signal.SIGTERM)
    TIME = ("max_minutes reached", 0)

    @staticmethod
    def counts(given: "Reason | None") -> list[float]:
        """Encode a rank's reason as a one-hot list in the enum's order, which is summed over the ranks.

        None gives all zeros.
        """
        return [float(reason is given) for reason in Reason]

    @staticmethod
    def first(counts: Sequence[float]) -> "Reason | None":
        """Decode :meth:`counts` summed over the ranks: the first reason in the enum's order that some rank has, or None."""
        return next((reason for reason, count in zip(Reason, counts, strict=True) if count), None)

    @property
    def words(self) -> str:
        """The reason in words."""
        return self.value[0]

    @property
    def exit_status(self) -> int:
        """The exit status of the process."""
        return int(self.value[1])


SIGNALS = {
    signal.SIGTERM: Reason.TERM,
    signal.SIGINT: Reason.INT,
    signal.SIGHUP: Reason.HUP,
    signal.SIGUSR1: Reason.USR1,
}


class Stopped(RunError):  # noqa: N818 - a request is no error
    """The run was asked to stop before its first step. None of its files but the lock was changed.

    Attributes:
        reason: why the run was asked to stop.
        exit_status: the exit status for that reason.
    """

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason
        self.exit_status = reason.exit_status

    def __str__(self) -> str:
        return f"stopped before the first step: {self.reason.words}; nothing was changed, the same command starts again"


class StopRequest:
    """Records whether this process was asked to stop, and why.

    Args:
        leave: function that ends the process at once with an exit status.

    Attributes:
        reason: the reason of the first request; None: there was no request.
        before_leaving: called in a thread of its own before the process ends at once.
        what_next: returns what the run does after a request, in words that are printed at once after the reason. Empty where
            the run is already ending.
    """

    def __init__(self, leave: Leave = os._exit) -> None:
        self.reason: Reason | None = None
        self.before_leaving: Callable[[], object] = lambda: None
        self.what_next: Callable[[], str] = lambda: "ending before the first step"
        self._leave, self._alone = leave, False
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Handle the signals inside the block, and restore their former handlers afterwards.

        A thread reads the signals from a pipe. Python would run a handler only when the main thread returns from a
        collective, which may be never. If the caller is not the main thread, no signal is handled: Python does not allow it.
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
        """Make a request to stop end the process at once inside the block.

        Used while torch is imported and the ranks join.
        """
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
        """Record a request to stop; only the first one counts.

        Rank 0 prints at once what happens next, since the current step may take long.
        """
        with self._lock:
            if self.reason is None:
                self.reason = reason
            alone = self._alone
        if alone:
            self._leave_alone(reason)
        elif reason is not Reason.TIME and ranks_or_alone().rank == 0:
            # Report in a thread of its own: writing to a stopped terminal blocks, and must not hold up the next signal.
            threading.Thread(target=_report, args=(reason, self.what_next), name="report", daemon=True).start()

    def _listen(self, reader: int) -> None:
        """Read signal numbers from the pipe, one byte each, and record the requests, until the pipe is closed."""
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
        """End the process at once, before the ranks have joined, and print why."""
        self.before_leaving = lambda: _say_stopped(reason)
        self._leave_at_once(reason)

    def _leave_at_once(self, reason: Reason) -> None:
        """End the process at once. Unfinished files have temporary names, and the next start deletes them."""
        speaker = threading.Thread(target=self.before_leaving, daemon=True)
        speaker.start()
        speaker.join(LEAVE_SECONDS)
        self._leave(reason.exit_status)

    def check(self, world: "World") -> None:
        """End the set-up if any rank was asked to stop; all ranks must call it together.

        Raises:
            Stopped: a rank was asked to stop.
        """
        reason = Reason.first(world.sum(world.numbers(Reason.counts(self.reason))).tolist())
        if reason is not None:
            raise Stopped(reason)

    def check_alone(self) -> None:
        """End the set-up if this rank was asked to stop.

        Used in work that one rank does alone; its errors then end all ranks.

        Raises:
            Stopped: this rank was asked to stop.
        """
        if self.reason is not None:
            raise Stopped(self.reason)


def _report(reason: Reason, what_next: Callable[[], str]) -> None:
    """Write to standard error one line on the request and on what happens next.

    On a terminal it replaces the live line.
    """
    line = what_next()
    if not line:
        return
    again = "; a second SIGINT ends the run now, without a checkpoint" if reason is Reason.INT else ""
    with contextlib.suppress(OSError):  # the terminal was closed
        begin = ERASE_LINE if os.isatty(STDERR) else ""
        os.write(STDERR, f"{begin}scalegpt train: {reason.words}: {line}{again}\n".encode())


def _is_ignored(number: signal.Signals) -> bool:
    """Whether the parent process set a signal to be ignored, as ``nohup`` does."""
    return signal.getsignal(number) is signal.SIG_IGN


def _say_stopped(reason: Reason) -> None:
    """Print on rank 0 that the run was stopped before its first step."""
    if ranks_or_alone().rank != 0:
        return
    with contextlib.suppress(OSError):  # the terminal was closed before
        os.write(sys.stdout.fileno(), f"{Stopped(reason)}\n".encode())


def _noted(_number: int, _frame: FrameType | None) -> None:
    """Do nothing: Python writes signals to the pipe only if they have a handler, and the listening thread does the rest."""


class LauncherWatch:
    """Watches the launchers of this process, and requests a stop when one has ended.

    Killing torchrun with SIGKILL, or DeepSpeed's runner with any signal, leaves the workers running. Ranks that srun or a
    user's shell started do not watch their parent: srun ends its children, and a shell is allowed to end before its children.

    Args:
        request: where the request to stop is recorded.
        leave: function that ends the process at once with an exit status, when the grace period is over.
        seconds: seconds between two checks.
        grace: seconds from the request until the process is ended by force.
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
        """Check the launchers once, then keep watching them in a thread. Does nothing without a launcher."""
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
