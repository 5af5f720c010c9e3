"""The child process that takes the suite's rows, and the parent's side of it.

What crashes or hangs then costs one row, and the parent, which writes the results, needs neither torch nor a GPU. A child
first describes the card, then answers one row after another. What it or a library prints goes to a log, whose last lines are
part of the reason that is given when it dies.
"""

import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.suite.rows import Row, Values

START_SECONDS = 120.0
"""Enough to import torch and DeepSpeed from a cold disk."""

ROW_SECONDS, GRACE_SECONDS = 100.0, 15.0
"""A row that takes longer hangs; one that was begun in time may end this much later than the suite should."""

LOG_LINES = 20


class ChildGoneError(Exception):
    """The child died, or took too long and was killed; says how, with the last lines of its log."""


class Runner:
    """Has rows done, by one child process after another.

    Args:
        make: a module's function that makes, in the child, an object with ``greet()`` and ``answer(row)``. After an answer
            with ``restart`` a new child takes the next row.
        mode: its argument.
        seconds: how long all rows may take.

    Raises:
        ChildGoneError: there is no first child.
    """

    def __init__(self, make: Callable[[str], Any], mode: str, seconds: float) -> None:
        self._make, self._mode, self._end = make, mode, time.monotonic() + seconds
        self._process: Any = None
        self.greeting = self._start()

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self._end - time.monotonic()

    def take(self, row: Row) -> Values:
        """The answer to a row: what the child says, or how it died."""
        if row.skip:
            return {"outcome": "skipped", "reason": row.skip, "seconds": 0.0}
        start = time.monotonic()
        try:
            if self._process is None:
                self._start()
            self._pipe.send(row)
            answer = self._receive(min(ROW_SECONDS, max(0.0, self.left) + GRACE_SECONDS))
        except (ChildGoneError, BrokenPipeError) as gone:
            answer = {"outcome": "failed", "reason": str(gone), "restart": True}
        if answer.pop("restart", False):
            self.close()
        return {**answer, "seconds": round(time.monotonic() - start, 2)}

    def close(self) -> None:
        """End the child; the next row gets a new one."""
        if self._process is not None:
            self._process.kill()
            self._process.join(GRACE_SECONDS)
            self._pipe.close()
            self._log.close()
            self._process = None

    def _start(self) -> Values:
        context = multiprocessing.get_context("spawn")  # CUDA cannot be used in a forked process
        self._log = tempfile.NamedTemporaryFile()  # noqa: SIM115  # closed by close()
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(self._make, self._mode, theirs, self._log.name))
        self._process.start()
        theirs.close()
        try:
            return self._receive(START_SECONDS)
        except ChildGoneError:
            self.close()
            raise

    def _receive(self, seconds: float) -> Values:
        try:
            if self._pipe.poll(seconds):
                answer: Values = self._pipe.recv()
                return answer
            reason = f"no answer after {seconds:.0f} s"
        except (EOFError, ConnectionResetError):
            self._process.join(GRACE_SECONDS)
            reason = f"the process ended with status {self._process.exitcode}"
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        raise ChildGoneError("\n    ".join([reason, *lines[-LOG_LINES:]]))


def serve(make: Callable[[str], Any], mode: str, pipe: Connection, log: str) -> None:
    """Be a child: describe the card, then answer rows until the parent has no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt at the terminal is the parent's to handle
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    bench = make(mode)
    pipe.send(bench.greet())
    while True:
        pipe.send(bench.answer(pipe.recv()))
