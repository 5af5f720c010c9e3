"""Takes away the locks that killed processes left where torch compiles extensions.

DeepSpeed compiles some of its parts at first use. ``torch.utils.cpp_extension`` then marks the folder of the build by a
file ``lock``, also for a look at whether there is anything to compile, and whoever finds one waits until it is gone. A
process that was killed meanwhile leaves it for good: all later runs of this user wait for ever, without a word. The file
does not say whose it is, but its owner keeps it open.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
from torch.utils.cpp_extension import get_default_build_root

from scalegpt.storage import file_system_time

LOCK = "lock"

OF_THIS_MACHINE = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "tmpfs", "overlay", "apfs", "hfs"})
"""File systems that no other machine writes to."""

QUIET = 300.0
"""Seconds without a new file after which a build that another machine may be at has ended: a source file takes a minute."""

POLL = 0.5


def clear_stale_locks(folders: Sequence[Path] | None = None, quiet: float = QUIET) -> list[Path]:
    """Remove locks that nobody holds any more.

    A lock whose owner lives is left to torch, which waits for it. Where the owner is gone but the compiler that it started is
    still at work, that is waited for first. On a file system that machines share, the owner may be on another one: then
    nothing may have been written for some time.

    Args:
        folders: what holds the extensions' folders; None: where torch builds them.
        quiet: seconds, see :data:`QUIET`.

    Returns:
        The locks removed.
    """
    removed = []
    for lock in _locks(build_folders() if folders is None else folders):
        while lock.exists() and not _is_open(lock):
            if not _is_worked_in(lock.parent) and (_is_local(lock) or _age(lock.parent) > quiet):
                lock.unlink(missing_ok=True)
                removed.append(lock)
            else:
                time.sleep(POLL)
    return removed


def build_folders() -> list[Path]:
    """What holds the folders of extensions, by torch's rule: the user's folder, or one for each Python and accelerator."""
    users_word = os.environ.get("TORCH_EXTENSIONS_DIR")
    return [Path(users_word)] if users_word else list(Path(get_default_build_root()).glob("*/"))


def _locks(folders: Sequence[Path]) -> list[Path]:
    """Torch's locks there: it writes nothing into one. A file of that name that is none of them is no business of ours."""
    found = [lock for folder in folders for lock in folder.glob(f"*/{LOCK}")]
    return [lock for lock in found if lock.stat().st_size == 0 and _is_build(lock.parent)]


def _is_build(folder: Path) -> bool:
    """Whether torch has written there how it builds; or is killed before it could."""
    return (folder / "build.ninja").exists() or [each.name for each in folder.iterdir()] == [LOCK]


def _is_open(lock: Path) -> bool:
    path = os.path.realpath(lock)
    return any(path in _open_files(process) for process in psutil.process_iter())


def _is_worked_in(folder: Path) -> bool:
    """Whether a process is at home there, as ninja and the compilers that it starts are."""
    path = os.path.realpath(folder)
    return any(_home(process) == path for process in psutil.process_iter())


def _open_files(process: psutil.Process) -> list[str]:
    try:
        return [each.path for each in process.open_files()]
    except psutil.Error:  # gone meanwhile, or another user's
        return []


def _home(process: psutil.Process) -> str | None:
    try:
        return process.cwd()
    except psutil.Error:
        return None


def _is_local(path: Path) -> bool:
    """Whether only this machine writes to the file system; False where that cannot be known."""
    real = os.path.realpath(path)
    mounts = {each.mountpoint: each.fstype for each in psutil.disk_partitions(all=True)}
    above = [each for each in mounts if each == "/" or real == each or real.startswith(each.rstrip("/") + "/")]
    return bool(above) and mounts[max(above, key=len)] in OF_THIS_MACHINE


def _age(folder: Path) -> float:
    """Seconds since something was written there, by the clock that dates its files."""
    newest = max((each.stat().st_mtime for each in folder.iterdir() if each.exists()), default=folder.stat().st_mtime)
    return file_system_time(folder) - newest
