"""Make unfinished folders of prepared tokens under a lock, and remove the folders that killed processes left.

Tokens are written into a hidden folder beside their final folder. The writing process holds a lock on the hidden folder,
which the system releases when the process ends, for whatever reason.
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
    """A new name for an unfinished folder: hidden, with an id of this machine's boot and a random part."""
    return f".{name}.tmp-{_machine()}-{uuid.uuid4().hex[:12]}"


def make_unfinished(out: Path) -> tuple[Path, int]:
    """Make a hidden folder beside the final folder ``out``, and lock it.

    Returns:
        The hidden folder, and the file descriptor that holds its lock until it is closed.

    Raises:
        OSError: the parent folder cannot be written.
    """
    while True:
        folder = out.with_name(unfinished_name(out.name))
        folder.mkdir(parents=True)  # another process may have removed a parent folder that it had made
        # Before the lock is taken, another process may lock the folder as abandoned, and remove it.
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        with suppress(BlockingIOError):
            lock_file(descriptor)
            if folder.exists():
                return folder, descriptor
        os.close(descriptor)


def remove_abandoned(out: Path) -> None:
    """Remove unfinished folders that killed processes left beside ``out``: in the cache for any entry, else for ``out``.

    A folder that was made on this machine is abandoned if its lock is free. A folder of another machine, whose locks may not
    be visible here, must also be unchanged for an hour. On a file system without locks, a folder must be unchanged for a day.
    """
    own = f".{out.name}.tmp-"
    in_cache = re.fullmatch("[0-9a-f]{64}", out.name) is not None
    try:
        names = os.listdir(out.parent)  # noqa: PTH208
    except OSError:  # the parent is missing or unreadable: the later write reports that
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
    except BlockingIOError:  # locked: a process is still writing into it
        return
    finally:
        os.close(descriptor)


def _last_written(folder: Path) -> float:
    """The time of the last write in a folder, in seconds since the epoch; infinity if the folder cannot be read."""
    try:
        return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
    except OSError:
        return math.inf


@cache
def _machine() -> str:
    """An id of this machine's present boot, 8 hex digits.

    A free lock proves that the writing process has ended only if the folder's name has this id: another machine's locks may
    not be visible here.
    """
    return hashlib.sha256((boot_id() or platform.node()).encode()).hexdigest()[:8]
