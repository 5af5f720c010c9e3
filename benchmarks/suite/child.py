"""The child process that measures the suite's rows, and the parent's interface to it.

With a child process, a crash or a hang costs only one row. The parent, which writes the results, needs neither torch
nor a GPU. A child first describes the card, then answers one row after another. Its output goes to a log. If the child
dies, the last lines of the log become part of the row's reason.
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
"""Seconds within which a child must start. They suffice to import torch and DeepSpeed from a slow disk."""

ROW_SECONDS, GRACE_SECONDS = 100.0, 15.0
"""Seconds after which a row counts as hanging, and seconds by which a row that began in time may exceed the suite's time."""

LOG_LINES = 20


class ChildGoneError(Exception):
    """The child died or took too long. The message says which, with the last lines of the child's log."""


class Runner:
    """Lets child processes measure rows, one child at a time.

    Args:
        make: a function that the child calls with ``mode`` to make an object with ``greet()`` and ``answer(row)``. It must be
            at the top level of a module. After an answer with ``restart`` a new child takes the next row.
        mode: the argument of ``make``.
        seconds: how long all rows may take in total.

    Raises:
        ChildGoneError: the first child does not start.
    """

    def __init__(self, make: Callable[[str], Any], mode: str, seconds: float) -> None:
        self._make, self._mode, self._end = make, mode, time.monotonic() + seconds
        self._process: Any = None
        self.greeting = self._start()

    @property
    def left(self) -> float:
        """The seconds left for further rows."""
        return self._end - time.monotonic()

    def take(self, row: Row) -> Values:
        """Return the child's answer to a row. If the child died, the answer says how."""
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
        """End the child. The next row starts a new one."""
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
    """The child's main function: describe the card, then answer rows until the parent kills the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt at the terminal is the parent's to handle
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    bench = make(mode)
    pipe.send(bench.greet())
    while True:
        pipe.send(bench.answer(pipe.recv()))
