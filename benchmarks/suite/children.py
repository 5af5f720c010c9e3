"""Child processes that answer jobs: one JSON object a line in, one a line out.

A suite's measurements happen in children, so that what kills one (a crash in a library, a hang) costs a single job; and few
of them, since importing torch and making a CUDA context take seconds. The parent needs neither torch nor a GPU.

A child is a module run as ``python -m MODULE ARGUMENTS`` whose ``main`` calls :func:`serve`. It first greets the parent with
an object that describes itself, and then answers each job. What it or a library prints goes to a log, whose end is told
when the child dies.
"""

import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from benchmarks.suite.frame import ROOT, Budget

Values = dict[str, Any]

START_SECONDS = 120.0
"""Long enough to import torch and DeepSpeed from a cold disk."""

GRACE_SECONDS = 15.0
"""A job that was begun in time may go on so long after the budget's end."""

LEFT_OUT = {"outcome": "left out", "reason": "the minutes were used up"}

_LOG_LINES = 8


class ChildGoneError(Exception):
    """A child died, or took too long and was ended; says how, and the last lines of its log."""


class Child:
    """A child process, from its greeting to its end.

    Args:
        module: what to run.
        arguments: its command line.
        seconds: how long it may take to greet.

    Raises:
        ChildGoneError: it did not come up.
    """

    def __init__(self, module: str, arguments: list[str], seconds: float = START_SECONDS) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed by close()
        self._unread = b""
        self._at_work = True
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        # A session of its own: an interrupt at the terminal is the parent's to deal with.
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,
        )
        try:
            self.greeting = self._hear(seconds)
        except BaseException:
            self.close()
            raise

    def ask(self, job: Values, seconds: float) -> Values:
        """Have a job done.

        Args:
            job: goes to the child as JSON.
            seconds: after so many the child is ended.

        Raises:
            ChildGoneError: the child died or was ended; it takes no more jobs.
        """
        assert self._process.stdin is not None
        self._at_work = True
        try:
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ChildGoneError(self._death()) from None
        return self._hear(seconds)

    def _hear(self, seconds: float) -> Values:
        assert self._process.stdout is not None
        until = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not selector.select(max(0.0, until - time.monotonic())):
                    self._process.kill()
                    raise ChildGoneError(f"no answer after {seconds:.0f} s{self._last_words()}")
                read = os.read(self._process.stdout.fileno(), 65536)
                if not read:
                    raise ChildGoneError(self._death())
                self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        answer: Values = json.loads(line)
        self._at_work = False
        return answer

    def _death(self) -> str:
        return f"the process ended with status {self._process.wait(GRACE_SECONDS)}{self._last_words()}"

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return "".join(f"\n    {line}" for line in lines[-_LOG_LINES:])

    def close(self) -> None:
        """Let it end; end it where it is at work."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if self._at_work:
            self._process.kill()
        try:
            self._process.stdin.close()
            self._process.wait(GRACE_SECONDS)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self._process.kill()
            self._process.wait()
        finally:
            self._process.stdout.close()
            self._log.close()


def work_through(
    jobs: Iterable[Values],
    start: Callable[[float], Child],
    budget: Budget,
    *,
    usual_seconds: Callable[[Values], float],
    most_seconds: Callable[[Values], float],
) -> Iterator[tuple[Values, Values]]:
    """Have jobs done one after another, as far as time goes.

    An answer with ``"restart": true`` says that the child is not fit for another job; a new one takes the rest. Answers that
    come from here have an ``outcome`` of ``failed`` (the child died or hung) or ``left out`` (the budget is used up), and a
    ``reason``.

    Args:
        jobs: in order. Each is asked for after the answer to the one before it was given out, so that it may depend on that.
        start: makes a child within so many seconds.
        budget: how long all may take.
        usual_seconds: what a job takes; it is not begun when less is left.
        most_seconds: when to end the child that is at it.

    Yields:
        Each job and its answer.
    """
    child: Child | None = None
    broken = ""
    try:
        for job in jobs:
            if budget.left < usual_seconds(job):
                yield job, LEFT_OUT
                continue
            if broken:
                yield job, {"outcome": "failed", "reason": broken}
                continue
            try:
                child = child or start(min(START_SECONDS, budget.left + GRACE_SECONDS))
            except ChildGoneError as gone:
                broken = f"no process could be started for it: {gone}"
                yield job, {"outcome": "failed", "reason": broken}
                continue
            if budget.left < usual_seconds(job):  # starting took the rest
                yield job, LEFT_OUT
                continue
            try:
                answer = child.ask(job, min(most_seconds(job), budget.left + GRACE_SECONDS))
            except ChildGoneError as gone:
                late = budget.left <= 0
                answer = {**(LEFT_OUT if late else {"outcome": "failed", "reason": str(gone)}), "restart": True}
            if answer.pop("restart", False):
                child.close()
                child = None
            yield job, answer
    finally:
        if child is not None:
            child.close()


def serve(greet: Callable[[], Values], answer: Callable[[Values], Values]) -> None:
    """Be a child: greet, then answer jobs until the parent has no more.

    Args:
        greet: called once, after the standard output was put out of the way of libraries that print: imports belong in it.
        answer: does one job. What it raises ends the child.
    """
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as replies:
        os.dup2(2, 1)
        replies.write(json.dumps(greet()) + "\n")
        replies.flush()
        for line in sys.stdin:
            replies.write(json.dumps(answer(json.loads(line))) + "\n")
            replies.flush()
