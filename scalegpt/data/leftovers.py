"""Make unfinished folders under a lock, take over those of ended processes, and remove what is not taken over.

Tokens are written into a hidden folder beside their final folder. The writing process holds a lock on the hidden folder,
which the system releases when the process ends, for whatever reason. The folder of a preparation has a name of its own, by
which the same preparation finds it again.
"""

import hashlib
import json
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
from typing import Any

from scalegpt.errors import InputError
from scalegpt.storage import disk_errors, lock_file, read_text, write_atomic
from scalegpt.system.processes import birth_of, boot_id, has_ended

_DAY, _HOUR = 24 * 3600, 3600
_CACHED = re.compile(r"\.[0-9a-f]{64}\.tmp-.+")

HOLDER = ".holder.json"
"""The file in an unfinished folder that says which process writes it; some file systems have no locks."""


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


def claim_unfinished(out: Path, key: str) -> tuple[Path, int] | None:
    """The hidden folder in which the preparation ``key`` of the final folder ``out`` is written, locked.

    Returns:
        The folder, which is new or was left by a process that has ended, and the file descriptor that holds its lock until it
        is closed. None: another process may be writing into it.

    Raises:
        OSError: the parent folder cannot be written.
    """
    folder = out.with_name(f".{out.name}.tmp-{key[:16]}")
    try:
        folder.mkdir(parents=True)
        is_new = True
    except FileExistsError:
        is_new = False
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # removed meanwhile, or another user's
        return None
    with suppress(BlockingIOError):
        has_locks = lock_file(descriptor) is None
        is_ours = folder.exists() and os.fstat(descriptor).st_uid == os.geteuid()
        if is_ours and (is_new or _may_be_taken(folder, has_locks=has_locks)):
            holder = {"pid": os.getpid(), "birth": birth_of(os.getpid()), "node": platform.node()}
            try:
                write_atomic(folder / HOLDER, json.dumps(holder))
            except OSError:
                if is_new:
                    shutil.rmtree(folder, ignore_errors=True)
                os.close(descriptor)
                raise
            return folder, descriptor
    os.close(descriptor)
    return None


def _may_be_taken(folder: Path, *, has_locks: bool) -> bool:
    """Whether the process that wrote a folder has ended; ``has_locks``: its lock could be taken here.

    The lock of another machine may not be visible here. A folder of another machine must be unchanged for an hour.
    """
    holder = _holder(folder)
    if not holder:  # the process was killed before it wrote anything, or after it had written everything
        return has_locks
    if holder["boot"] == boot_id():
        return has_locks or has_ended(holder["pid"], holder["birth"])
    if holder["node"] == platform.node():  # this machine has been started again since
        return True
    return time.time() - _last_written(folder) >= _HOUR


def _holder(folder: Path) -> dict[str, Any]:
    """What :data:`HOLDER` says, and the id of the boot as ``boot``; empty if it is missing or damaged."""
    try:
        values = json.loads(read_text(folder / HOLDER))
        return {"pid": int(values["pid"]), "birth": str(values["birth"]), "node": values["node"],
                "boot": str(values["birth"]).partition(":")[0]}  # fmt: skip
    except (OSError, InputError, ValueError, TypeError, KeyError):
        return {}


def remove_folder(folder: Path) -> None:
    """Remove a folder of tokens; the folder is renamed first, so that no reader finds it partly removed."""
    aside = folder.with_name(unfinished_name(folder.name))
    with disk_errors(folder):
        try:
            folder.rename(aside)
        except FileNotFoundError:  # another process removed it first
            return
        shutil.rmtree(aside, ignore_errors=True)


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
        is_ours = f".tmp-{_machine()}-" in folder.name or _holder(folder).get("boot") == boot_id()
        patience = _DAY if not has_locks else 0 if is_ours else _HOUR
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
