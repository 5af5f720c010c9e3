"""The lock on a run's folder, which ensures that only one process at a time trains the run."""

import os
import socket
from pathlib import Path
from typing import TextIO

from scalegpt.errors import InputError, RunError
from scalegpt.storage import lock_file
from scalegpt.system.processes import has_ended, own_birth
from scalegpt.text import visible

LOCK = ".lock"
"""Name of the lock file. It is never deleted: another process could then lock a new file of the same name."""

_MOST_READ = 1000
"""Largest number of characters that are read from a lock file."""


class RunLock:
    """The lock of a run's folder. The operating system releases it when the process ends in any way.

    On a file system without locks, the content of the lock file names its owner: process number, machine, and when the
    process began. This keeps out other processes of this machine, unless two start at the same moment, but not
    processes of other machines.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: TextIO | None = None
        self._is_weak = False

    def take(self) -> str | None:
        """Take the lock.

        Returns:
            A warning that other machines are not kept out; None where the file system has locks.

        Raises:
            InputError: another process is training this run.
            RunError: the folder cannot be written or locked.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = (self.folder / LOCK).open("a+", encoding="ascii", errors="replace")
        except OSError as error:
            reason = "it is a broken link" if isinstance(error, FileExistsError) else error.strerror
            raise RunError(f"{self.folder} cannot be written: {reason}; choose another --runs_dir") from None
        try:
            reason = lock_file(file)
        except BlockingIOError:
            owner = _read(file)[0]
            file.close()
            raise InputError(self._taken(f"process {owner or 'of another user'}")) from None
        except OSError as error:
            file.close()
            raise RunError(
                f"{self.folder / LOCK} cannot be locked: {error.strerror}; choose another --runs_dir"
            ) from None
        weakness = None if reason is None else self._without_lock(file, reason)
        whose = f"\n{socket.gethostname()}\n{own_birth()}\n" if weakness else ""
        file.truncate(0)
        file.write(f"{os.getpid()}{whose}")
        file.flush()
        self._file, self._is_weak = file, weakness is not None
        return weakness

    def release(self) -> None:
        """Release the lock, if this process holds it."""
        if self._file is not None:
            if self._is_weak:
                self._file.truncate(0)  # an empty file has no owner
            self._file.close()
            self._file = None

    def _without_lock(self, file: TextIO, reason: str) -> str:
        """Check the owner named in the lock file, where the file system has no locks.

        Args:
            file: the lock file.
            reason: why the file system cannot lock.

        Returns:
            A warning that other machines are not kept out.

        Raises:
            InputError: the owner is a process of this machine that still runs.
        """
        weakness = f"the file system has no locks (flock: {reason}): a run on another machine could write here too"
        owner = _read(file)
        if len(owner) < 3:
            return weakness
        pid, host, born = owner[:3]
        if host != socket.gethostname():
            return (
                f"{weakness}; process {pid} on {host} was the last to start or resume this run: make sure it has ended"
            )
        if _lives(pid, born):
            file.close()
            raise InputError(self._taken(f"process {pid}"))
        return weakness

    def _taken(self, owner: str) -> str:
        return f"{self.folder} is being trained by {owner}; wait for it, or choose another --model_name or --fresh"


def is_locked(folder: Path) -> bool:
    """Whether another process holds the lock of a run's folder; False without a lock file or without locks."""
    try:
        with (folder / LOCK).open("rb") as file:
            lock_file(file, shared=True)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _read(file: TextIO) -> list[str]:
    """The lines of a lock file: process number, and without locks also machine and when the process began."""
    file.seek(0)
    return visible(file.read(_MOST_READ)).split("\n")


def _lives(pid: str, born: str) -> bool:
    """Whether another process runs on this machine with this number and this start time."""
    return pid.isdecimal() and int(pid) != os.getpid() and bool(born) and not has_ended(int(pid), born)
