"""How a run ends by an error: find the cause on the rank that failed first, and report it on all ranks."""

import re
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from scalegpt.backends.capabilities import device_name
from scalegpt.backends.machines import Machine, named_in
from scalegpt.errors import InputError, RunError
from scalegpt.planner.plan import Plan
from scalegpt.text import visible
from scalegpt.training.resilience import oom
from scalegpt.training.resilience.heartbeat import Beat, Halt
from scalegpt.training.resilience.watchdog import Watchdog
from scalegpt.training.runs.files import write_whole

INTERRUPTED_STATUS = 130

CHECKS = 20
CHECK_SECONDS = 0.1
"""A rank whose connection broke looks for the rank that has ended: ``CHECKS`` times, every ``CHECK_SECONDS``."""

LONGEST_MESSAGE = 300
"""Longest error message, in characters, that is printed in full."""

COMPILERS = ("torch._inductor", "torch._dynamo", "triton")
"""Modules whose errors come from compiling the model."""


@dataclass(frozen=True)
class Failure:
    """How this rank ends after an error.

    Attributes:
        halt: the content of ``halt.json``, which ends all ranks. The rank that failed first wrote it.
        error: the exception to raise: this rank's original error if it is the cause and has a clear message, else a
            ``RunError`` with the cause.
        is_ours: whether this rank failed first. That rank writes ``run_status.json``.
    """

    halt: Halt
    error: BaseException
    is_ours: bool


def handle_failure(error: BaseException, watchdog: Watchdog, plan: Plan, *, on_oom: str) -> Failure:
    """Find the cause of an exception in the training loop, and end the other ranks, since they may wait for this one.

    Args:
        error: the exception that ended this rank's loop.
        watchdog: this rank's watchdog. This function stops it.
        plan: the run's predicted memory, for advice after an out-of-memory error.
        on_oom: the setting ``on_oom``: ``stop`` or ``shrink``.
    """
    watchdog.stop()
    status = getattr(error, "exit_status", 1)
    if isinstance(error, KeyboardInterrupt):
        return _halted(error, watchdog, "interrupted", INTERRUPTED_STATUS, "stopped")
    cause: str | None = None
    if oom.is_out_of_memory(error):
        cause = _out_of_memory(error, watchdog, plan, on_oom)
    elif (lost := _lost(error, watchdog)) is not None:
        cause = f"the process of {lost.name} has ended; its last heartbeat was in step {lost.step}, {lost.place}"
    elif (peer := _peer(error, watchdog)) is not None:
        cause = f"the connection to {peer} broke ({_reason(error)}); see what it reports, and whether it runs"
    elif isinstance(error, InputError | RunError):
        return _halted(error, watchdog, str(error), status, "failed")
    else:
        cause = in_one_line(error, watchdog.directory.path, watchdog.rank)
    if cause is not None:
        return _halted(RunError(cause), watchdog, cause, status, "failed")
    return _halted(error, watchdog, f"{type(error).__name__}: {error}", status, "failed")


def _halted(error: BaseException, watchdog: Watchdog, cause: str, status: int, state: str) -> Failure:
    halt = watchdog.halt(cause, status=status, state=state)
    if halt.rank == watchdog.rank:
        return Failure(halt, error, is_ours=True)
    failure = RunError(halt.cause)
    failure.exit_status = halt.status
    return Failure(halt, failure, is_ours=False)


def _out_of_memory(error: BaseException, watchdog: Watchdog, plan: Plan, on_oom: str) -> str:
    where = f"out of memory on rank {watchdog.rank} in step {watchdog.step}, {watchdog.place}"
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
    parts = [f"{where} ({first_line})", oom.advice(plan)]
    if on_oom == "shrink":
        with suppress(RunError):  # without the note the next start is the same as this one, and the advice still helps
            parts.append(oom.remember(watchdog.directory, plan, device_name(watchdog.beats.world.device)))
    else:
        parts.append("or let --on_oom shrink do it at the next start")
    return "; ".join(parts)


def _lost(error: BaseException, watchdog: Watchdog) -> Beat | None:
    """The last heartbeat of the rank whose end broke this rank's collective; None where no such rank is found.

    The collective's error says only that a connection was closed, not which rank ended.
    """
    if watchdog.beats.world.size == 1 or isinstance(error, RunError) or not isinstance(error, RuntimeError):
        return None
    for _ in range(CHECKS):
        if watchdog.beats.read_halt() is not None:  # the other rank wrote the cause before it ended
            return None
        lost = watchdog.beats.lost()
        if lost is not None:
            return lost
        time.sleep(CHECK_SECONDS)
    return None


def _peer(error: BaseException, watchdog: Watchdog) -> Machine | None:
    """The other machine that the error of a collective names by its address; None where it names none."""
    if isinstance(error, RunError) or not isinstance(error, RuntimeError):
        return None
    return named_in(watchdog.beats.world.machines, str(error), watchdog.rank)


def _reason(error: BaseException) -> str:
    """The first sentence of a library's error, without the place in its source with which gloo's begin."""
    first = str(error).strip().splitlines()[0]
    return visible(re.sub(r"^\[[^\]]*\] ", "", first).split(". ")[0][:160])


def in_one_line(error: BaseException, folder: Path, rank: int) -> str | None:
    """Shorten a library's long error to one line, and write the full text to ``error_rank_N.txt``.

    Returns:
        The line; None if the message is short and does not come from compiling.
    """
    text = str(error).strip()
    from_compiling = type(error).__module__.startswith(COMPILERS)
    if len(text) <= LONGEST_MESSAGE and not from_compiling:
        return None
    first = next((line for line in text.splitlines() if line.strip()), "")[:LONGEST_MESSAGE]
    parts = [visible(f"{type(error).__name__}: {first}".rstrip(": "))]
    path = folder / f"error_rank_{rank}.txt"
    try:
        write_whole(path, visible("".join(traceback.format_exception(error))))
        parts.append(f"the full message is in {path}")
    except OSError:  # the disk fails too; --debug shows the error on the terminal
        parts.append("--debug shows the full message")
    if from_compiling:
        parts.append("--compile off trains without compiling")
    return "; ".join(parts)
