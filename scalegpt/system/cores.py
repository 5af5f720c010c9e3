"""The host's memory and cores that a process may use: the limits of a container or a job count, not the machine's.

Planner, trainer and data preparation all ask here, so that they agree.
"""

import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
"""Under it ``proc`` and ``sys`` are looked for; tests give another."""


def available_bytes(root: Path = ROOT) -> int:
    """Memory that can still be filled: the kernel's available memory, or the least room in a control group."""
    import psutil

    return max(0, min([int(psutil.virtual_memory().available), *_rooms(root)]))


def usable_cores(root: Path = ROOT) -> int:
    """Cores that this process may run on, no more than the time that its control groups grant."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *(int(quota) for quota in _quotas(root))]))


def _rooms(root: Path) -> Iterator[int]:
    """The room that each control group with a limit still has.

    Usage includes the file cache, which the kernel drops before it ends a process; its inactive part is room.
    """
    for folder in _groups(root, ""):
        if (limit := kernel_number(folder / "memory.max")) is not None:
            yield limit - (kernel_number(folder / "memory.current") or 0) + _stat(folder, "inactive_file")
    for folder in _groups(root, "memory"):
        limit = kernel_number(folder / "memory.limit_in_bytes")
        if limit is not None and limit < 2**60:  # no limit is written as the largest number of pages
            used = kernel_number(folder / "memory.usage_in_bytes") or 0
            yield limit - used + _stat(folder, "total_inactive_file")


def _quotas(root: Path) -> Iterator[float]:
    """The cores' worth of time that each control group with a limit grants."""
    for folder in _groups(root, ""):
        quota, _, period = kernel_text(folder / "cpu.max").partition(" ")
        if quota.isdecimal() and period.isdecimal() and int(period):
            yield int(quota) / int(period)
    for folder in _groups(root, "cpu"):
        given, each = kernel_number(folder / "cpu.cfs_quota_us"), kernel_number(folder / "cpu.cfs_period_us")
        if given and each:
            yield given / each


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of our control group and of those around it.

    ``controller`` is one of version 1, such as ``memory``; empty: version 2, which has one tree for all.
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
    """The text of a small file of the kernel's; empty where it is missing or cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def kernel_number(path: Path) -> int | None:
    """The whole number in such a file; None where there is none: no such file, or ``max``."""
    text = kernel_text(path)
    return int(text) if text.isdecimal() else None
