"""How a run ends that does not end by itself: which rank began it and why, told alike by all ranks."""

import time
from contextlib import suppress
from dataclasses import dataclass

from scalegpt.backends.capabilities import device_name
from scalegpt.errors import InputError, RunError
from scalegpt.planner.plan import Plan
from scalegpt.training.resilience import oom
from scalegpt.training.resilience.foreign import in_one_line
from scalegpt.training.resilience.heartbeat import Beat, Halt
from scalegpt.training.resilience.watchdog import Watchdog

INTERRUPTED_STATUS = 130

LOOKS = 20
LOOK_SECONDS = 0.1
"""How often, and how far apart, a rank whose connection broke looks for the one that has gone."""


@dataclass(frozen=True)
class Ending:
    """How a rank ends.

    Attributes:
        halt: what all ranks are told.
        error: what to raise; the original one where it is this rank's own and speaks for itself.
        is_ours: whether this rank began it, and so writes the status.
    """

    halt: Halt
    error: BaseException
    is_ours: bool


def end(error: BaseException, watchdog: Watchdog, memory: Plan, *, on_oom: str) -> Ending:
    """Find out what an exception in the loop means, and tell the other ranks, which may be waiting for this one.

    Args:
        error: what ended this rank's loop.
        watchdog: this rank's; it is stopped.
        memory: what was predicted for the run.
        on_oom: what is to be done about a lack of memory, ``stop`` or ``shrink``.
    """
    watchdog.stop()
    status = getattr(error, "exit_status", 1)
    if isinstance(error, KeyboardInterrupt):
        return _told(error, watchdog, "interrupted", INTERRUPTED_STATUS, "stopped")
    if oom.is_out_of_memory(error):
        failure: BaseException = RunError(_out_of_memory(error, watchdog, memory, on_oom))
        return _told(failure, watchdog, str(failure), status, "failed")
    lost = _lost(error, watchdog)
    if lost is not None:
        failure = RunError(
            f"the process of {lost.name} has ended; it was last heard of in step {lost.step}, {lost.place}"
        )
        return _told(failure, watchdog, str(failure), status, "failed")
    speaks_for_itself = isinstance(error, InputError | RunError)
    shortened = None if speaks_for_itself else in_one_line(error, watchdog.directory.path, watchdog.rank)
    if shortened is not None:
        return _told(RunError(shortened), watchdog, shortened, status, "failed")
    cause = str(error) if speaks_for_itself else f"{type(error).__name__}: {error}"
    return _told(error, watchdog, cause, status, "failed")


def _told(error: BaseException, watchdog: Watchdog, cause: str, status: int, state: str) -> Ending:
    halt = watchdog.halt(cause, status=status, state=state)
    if halt.rank == watchdog.rank:
        return Ending(halt, error, is_ours=True)
    failure = RunError(halt.cause)
    failure.exit_status = halt.status
    return Ending(halt, failure, is_ours=False)


def _out_of_memory(error: BaseException, watchdog: Watchdog, memory: Plan, on_oom: str) -> str:
    where = f"out of memory on rank {watchdog.rank} in step {watchdog.step}, {watchdog.place}"
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
    said = [f"{where} ({first_line})", oom.advice(memory)]
    if on_oom == "shrink":
        with suppress(RunError):  # then the next start is as this one was, and the advice stands
            said.append(oom.remember(watchdog.directory, memory, device_name(watchdog.beats.world.device)))
    else:
        said.append("or let --on_oom shrink do it at the next start")
    return "; ".join(said)


def _lost(error: BaseException, watchdog: Watchdog) -> Beat | None:
    """The rank whose end broke a collective of ours: all that we are told is that a connection was closed."""
    if watchdog.beats.world.size == 1 or isinstance(error, RunError) or not isinstance(error, RuntimeError):
        return None
    for _ in range(LOOKS):
        if watchdog.beats.read_halt() is not None:  # it said why before it went
            return None
        lost = watchdog.beats.lost()
        if lost is not None:
            return lost
        time.sleep(LOOK_SECONDS)
    return None
