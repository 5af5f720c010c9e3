"""Identify processes across time by number and start, even if the wall clock is set meanwhile.

Process numbers are reused, so a process is identified by its number and its start time. Most tools compute the start time in
seconds since the epoch from the time of the boot, which changes when the wall clock is set. Linux itself records the start in
clock ticks since the boot, which does not.
"""

import os
from functools import cache
from pathlib import Path

import psutil

from scalegpt.system.cores import kernel_text

_STATE, _START_TICKS = 0, 19
"""Positions of the fields in ``/proc/PID/stat``, counted from the first after the process's name."""

_ENDED = frozenset("ZXx")


def birth_of(pid: int) -> str | None:
    """The start of a process, as a text that no other process of the same number has; None without such a process.

    On Linux it is the boot's id and the clock ticks from the boot to the start. Elsewhere it is seconds since the epoch.
    """
    fields = _stat(pid)
    if fields:
        return f"{boot_id()}:{fields[_START_TICKS]}"
    try:
        return f"{psutil.Process(pid).create_time():.2f}"
    except psutil.Error:
        return None


def has_ended(pid: int, birth: str) -> bool:
    """Whether the process with this number and :func:`birth_of` has ended; a zombie counts as ended.

    A process with another boot's id may be on another machine. Nothing is known of it here, so it counts as running.
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
    """The system's id of its present boot; empty if the system has no such id."""
    return kernel_text(Path("/proc/sys/kernel/random/boot_id"))


def _stat(pid: int) -> list[str]:
    """The fields of ``/proc/PID/stat`` after the process's name; empty if there is no such file."""
    return kernel_text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()


def own_birth() -> str:
    """The start of this process, as :func:`birth_of` gives it."""
    birth = birth_of(os.getpid())
    assert birth is not None
    return birth
