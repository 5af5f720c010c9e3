"""The host's memory and cores that a process may use: a container's or a job's limits count, not the machine's.

Planner, trainer and data preparation all ask here, so that they agree.
"""

import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def available_bytes(root: Path = ROOT) -> int:
    """Memory that can still be filled: what the kernel calls available, or the least room in a control group.

    Args:
        root: where ``proc`` and ``sys`` of the control groups are looked for.
    """
    import psutil

    return max(0, min([int(psutil.virtual_memory().available), *_rooms(root)]))


def usable_cores(root: Path = ROOT) -> int:
    """Cores that this process may run on, no more than its control groups grant it time on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *(int(quota) for quota in _quotas(root))]))


def _rooms(root: Path) -> Iterator[int]:
    """The room that each control group with a limit still has.

    What is in use counts the file cache too, which the kernel gives up before it ends a process; its inactive part is room.
    """
    for folder in _groups(root, ""):
        if (limit := _number(folder / "memory.max")) is not None:
            yield limit - (_number(folder / "memory.current") or 0) + _stat(folder, "inactive_file")
    for folder in _groups(root, "memory"):
        limit = _number(folder / "memory.limit_in_bytes")
        if limit is not None and limit < 2**60:  # no limit is written as the largest number of pages
            yield limit - (_number(folder / "memory.usage_in_bytes") or 0) + _stat(folder, "total_inactive_file")


def _quotas(root: Path) -> Iterator[float]:
    """The cores' worth of time that each control group with a limit grants."""
    for folder in _groups(root, ""):
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        if quota.isdecimal() and period.isdecimal() and int(period):
            yield int(quota) / int(period)
    for folder in _groups(root, "cpu"):
        given, each = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        if given and each:
            yield given / each


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of our control group and of those around it.

    Args:
        root: as above.
        controller: of version 1, such as ``memory``; empty: version 2, which has one tree for all.
    """
    base = root / "sys/fs/cgroup" / controller
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller not in controllers.split(","):
            continue
        folder = base / path.strip("/")
        while True:
            yield folder
            if folder == base or base not in folder.parents:
                break
            folder = folder.parent


def _read(path: Path) -> str:
    """The file's text; empty where it is not there, or not ours to read."""
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    """The number in a file; None where there is none: no such file, or ``max``."""
    text = _read(path)
    return int(text) if text.isdecimal() else None


def _stat(folder: Path, key: str) -> int:
    lines = (line.split() for line in _read(folder / "memory.stat").splitlines())
    return next((int(words[1]) for words in lines if words[0] == key), 0)
