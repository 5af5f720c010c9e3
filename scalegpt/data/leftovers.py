"""Unfinished folders of tokens: who is making them, and which of them are abandoned.

A folder in the making is a hidden one beside its place. Its maker holds a lock on it, which the system releases when the
process ends, however it ends.
"""

import hashlib
import math
import os
import platform
import re
import shutil
import time
import uuid
from contextlib import suppress
from functools import cache
from pathlib import Path

from scalegpt.storage import lock_file
from scalegpt.system.processes import boot_id

_DAY, _HOUR = 24 * 3600, 3600
_CACHED = re.compile(r"\.[0-9a-f]{64}\.tmp-.+")


def unfinished_name(name: str) -> str:
    """A new name for a folder in the making: hidden, and with a mark of this machine."""
    return f".{name}.tmp-{_machine()}-{uuid.uuid4().hex[:12]}"


def make_unfinished(out: Path) -> tuple[Path, int]:
    """Make a hidden folder beside its final place, and lock it.

    Returns:
        The folder, and a descriptor that holds the lock until it is closed.

    Raises:
        OSError: the place cannot be written.
    """
    while True:
        folder = out.with_name(unfinished_name(out.name))
        folder.mkdir()
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        # Between the two, another process may have locked it as abandoned, and removed it.
        with suppress(BlockingIOError):
            lock_file(descriptor)
            if folder.exists():
                return folder, descriptor
        os.close(descriptor)


def remove_abandoned(out: Path) -> None:
    """Remove what killed preparations left: those of the same place, and in a cache those of any entry.

    A folder is abandoned when its lock is free. Without that evidence nothing must have been written there for a while: a
    day on a file system without locks; an hour for a folder of another machine, whose locks may not be visible here.
    """
    own = f".{out.name}.tmp-"
    in_cache = re.fullmatch("[0-9a-f]{64}", out.name) is not None
    try:
        names = os.listdir(out.parent)  # noqa: PTH208
    except OSError:  # it does not exist yet, or cannot be read: writing there reports that
        return
    for name in names:
        if name.startswith(own) or (in_cache and _CACHED.fullmatch(name)):
            _remove_if_abandoned(out.parent / name)


def _remove_if_abandoned(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # removed meanwhile, or another user's
        return
    try:
        has_locks = lock_file(descriptor) is None
        patience = _DAY if not has_locks else 0 if f".tmp-{_machine()}-" in folder.name else _HOUR
        if time.time() - _last_written(folder) >= patience:
            shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:  # its maker is at work
        return
    finally:
        os.close(descriptor)


def _last_written(folder: Path) -> float:
    """When something was last written in a folder, in seconds since 1970; infinity where it cannot be read."""
    try:
        return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
    except OSError:
        return math.inf


@cache
def _machine() -> str:
    """A mark of this boot of this machine: only within it does a free lock prove that the maker has ended."""
    return hashlib.sha256((boot_id() or platform.node()).encode()).hexdigest()[:8]
