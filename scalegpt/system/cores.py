"""The host memory and the cores that this process may use, within the limits of its container or job.

Planner, trainer and data preparation all use these functions, so that they agree.
"""

import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
"""The folder that contains ``proc`` and ``sys``. Tests pass another one."""


def available_bytes(root: Path = ROOT) -> int:
    """Bytes of host memory that can still be allocated: the least of the kernel's available memory and the cgroup limits."""
    import psutil

    return max(0, min([int(psutil.virtual_memory().available), *_rooms(root)]))


def usable_cores(root: Path = ROOT) -> int:
    """Number of cores that this process may use: the least of its CPU affinity and its cgroups' CPU quotas, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *(int(quota) for quota in _quotas(root))]))


def _rooms(root: Path) -> Iterator[int]:
    """The bytes that can still be allocated in each cgroup of this process that has a memory limit.

    A cgroup's usage includes the file cache. The inactive part of the cache counts as free, since the kernel drops it when
    memory is short.
    """
    for folder in _groups(root, ""):
        if (limit := kernel_number(folder / "memory.max")) is not None:
            yield limit - (kernel_number(folder / "memory.current") or 0) + _stat(folder, "inactive_file")
    for folder in _groups(root, "memory"):
        limit = kernel_number(folder / "memory.limit_in_bytes")
        if limit is not None and limit < 2**60:  # a larger number means that there is no limit
            used = kernel_number(folder / "memory.usage_in_bytes") or 0
            yield limit - used + _stat(folder, "total_inactive_file")


def _quotas(root: Path) -> Iterator[float]:
    """The CPU quotas of this process's cgroups, in cores."""
    for folder in _groups(root, ""):
        quota, _, period = kernel_text(folder / "cpu.max").partition(" ")
        if quota.isdecimal() and period.isdecimal() and int(period):
            yield int(quota) / int(period)
    for folder in _groups(root, "cpu"):
        given, each = kernel_number(folder / "cpu.cfs_quota_us"), kernel_number(folder / "cpu.cfs_period_us")
        if given and each:
            yield given / each


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's cgroup and of the cgroups that contain it, the innermost first.

    ``controller`` is a controller of cgroup version 1, for example ``memory``. It is empty for version 2, which has one
    tree for all controllers.
    """
    base = root / "sys/fs/cgroup" / controller
    for line in kernel_text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            folder = base / path.strip("/")
            yield folder
            yield from (parent for parent in folder.parents if parent == base or base in parent.parents)


def _stat(folder: Path, key: str) -> int:
    lines = (line.split() for line in kernel_text(folder / "memory.stat").splitlines())
    return next((int(words[1]) for words in lines if words[0] == key), 0)


def kernel_text(path: Path) -> str:
    """The text of a file in ``/proc`` or ``/sys``; empty if the file is missing or cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def kernel_number(path: Path) -> int | None:
    """The whole number in a file in ``/proc`` or ``/sys``; None if there is no such file, or its text is not a number."""
    text = kernel_text(path)
    return int(text) if text.isdecimal() else None
