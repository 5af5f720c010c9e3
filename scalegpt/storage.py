"""Reading small files that others may have written: bounded in size, retried where an error may pass."""

import errno
import os
import stat
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from scalegpt.errors import InputError

Result = TypeVar("Result")

RETRIED = frozenset({errno.EIO, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT})
"""What a network's disk may answer once and not again; a full disk is none of them."""

RETRY_SECONDS = (0.5, 2.0)
"""How long to wait before each further attempt."""

TEXT_LIMIT = 16 << 20
"""Bytes of the largest configuration, status or catalogue that is read; what is larger is no such file."""


def retried(work: Callable[[], Result]) -> Result:
    """Do something with a disk, again after an error that may pass (:data:`RETRIED`).

    Raises:
        OSError: of the last attempt, or at once an error that does not pass.
    """
    for seconds in RETRY_SECONDS:
        try:
            return work()
        except OSError as error:
            if error.errno not in RETRIED:
                raise
        time.sleep(seconds)
    return work()


def read_bytes(path: Path, limit: int = TEXT_LIMIT) -> bytes:
    """The content of a plain file of at most ``limit`` bytes.

    Raises:
        InputError: it is no plain file, or larger.
        OSError: it is missing or cannot be read; an error that may pass was retried.
    """
    return retried(lambda: _read(path, limit))


def read_text(path: Path, limit: int = TEXT_LIMIT, *, errors: str = "strict") -> str:
    """The content of a UTF-8 file of at most ``limit`` bytes, without a byte order mark; see :func:`read_bytes`.

    Raises:
        UnicodeDecodeError: it is not UTF-8, and ``errors`` is ``strict``.
    """
    return read_bytes(path, limit).decode("utf-8-sig", errors=errors).replace("\r\n", "\n")


def _read(path: Path, limit: int) -> bytes:
    # A pipe in the file's place must not keep us waiting.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        status = os.fstat(file.fileno())
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path} is not a plain file")
        content = file.read(limit + 1)
    if len(content) > limit:
        raise InputError(f"{path} has more than {limit:,} bytes: too large for a file of its kind")
    return content


def file_system_time(folder: Path) -> float:
    """The time by the clock that dates the folder's files, in seconds since the epoch; a file server has its own.

    Raises:
        OSError: the folder cannot be written.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b".")
        file.flush()
        return os.fstat(file.fileno()).st_mtime
