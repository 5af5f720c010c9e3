"""Which process is which, by facts that do not change when the wall clock is set.

A process number is used again, so it needs the time at which the process began. Most tools give that in seconds since the
epoch, computed from the time of the boot: when the wall clock is set, all processes seem to have begun at another time. Linux
itself counts from the boot.
"""

import os
from functools import cache
from pathlib import Path

import psutil

from scalegpt.system.cores import kernel_text

_STATE, _START_TICKS = 0, 19
"""Places of these fields in ``/proc/PID/stat``, counted from the first behind the process's name."""

_ENDED = frozenset("ZXx")


def birth_of(pid: int) -> str | None:
    """What distinguishes this process from every other that had or will have its number; None: there is no such process.

    On Linux: the boot, and the clock ticks from there to its start. Elsewhere: seconds since the epoch.
    """
    fields = _stat(pid)
    if fields:
        return f"{boot_id()}:{fields[_START_TICKS]}"
    try:
        return f"{psutil.Process(pid).create_time():.2f}"
    except psutil.Error:
        return None


def has_ended(pid: int, birth: str) -> bool:
    """Whether the process of this number and :func:`birth_of` has ended, even if its parent has not waited for it yet.

    A process of another boot is one of another machine: nothing is known of it here, so it counts as running.
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
    except psutil.Error:  # it exists, and belongs to another user
        return False


@cache
def boot_id() -> str:
    """The id of this boot of the system; empty where the system has none."""
    return kernel_text(Path("/proc/sys/kernel/random/boot_id"))


def _stat(pid: int) -> list[str]:
    """The fields of ``/proc/PID/stat`` behind the process's name; empty where there is no such file."""
    return kernel_text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()


def own_birth() -> str:
    """:func:`birth_of` this process."""
    birth = birth_of(os.getpid())
    assert birth is not None
    return birth
