"""Identifies a process by its number and its start time, a pair that is never reused.

A process number alone may be reused after the process has ended. Most tools report the start in seconds since the
epoch. They compute it from the time of the boot, so it changes when the wall clock is set. Linux itself records the
start as clock ticks since the boot, which never changes.
"""

import gc
import os
from functools import cache
from pathlib import Path

import psutil

from scalegpt.system.cores import kernel_text

_STATE, _START_TICKS = 0, 19
"""Positions of the fields in ``/proc/PID/stat``, counted from the first after the process's name."""

_ENDED = frozenset("ZXx")


def birth_of(pid: int) -> str | None:
    """The start of the process ``pid``, as a text that no other process with this number has; None if it has ended.

    On Linux the text is the boot's id and the clock ticks from boot to start, elsewhere the seconds since the epoch.
    """
    fields = _stat(pid)
    if fields:
        return f"{boot_id()}:{fields[_START_TICKS]}"
    try:
        return f"{psutil.Process(pid).create_time():.2f}"
    except psutil.Error:
        return None


def has_ended(pid: int, birth: str) -> bool:
    """Whether the process with number ``pid`` and start ``birth`` (:func:`birth_of`) has ended; a zombie counts as ended.

    If ``birth`` has another boot's id, the process may be on another machine. Since we cannot know, it counts as running.
    """
    if ":" in birth and birth.partition(":")[0] != boot_id():
        return False
    fields = _stat(pid)
    if fields and fields[_STATE] in _ENDED:
        return True
    try:
        return birth_of(pid) != birth or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:  # the process exists and belongs to another user
        return False


@cache
def boot_id() -> str:
    """The id that Linux gives to its current boot; empty on other systems."""
    return kernel_text(Path("/proc/sys/kernel/random/boot_id"))


def _stat(pid: int) -> list[str]:
    """The fields of ``/proc/PID/stat`` that follow the process's name; empty if there is no such file."""
    return kernel_text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()


def own_birth() -> str:
    """The start of this process, in the form of :func:`birth_of`."""
    birth = birth_of(os.getpid())
    assert birth is not None
    return birth


def freeze_gc() -> None:
    """Exempt all objects that exist after the first step from garbage collection, since they live as long as the run.

    A full collection visits every object, which takes tenths of a second in the middle of a step. The ranks do not collect at
    the same time, so each collection delays all of them.
    """
    gc.collect()
    gc.freeze()
