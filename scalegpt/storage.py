"""File operations: bounded reads, retries, free space, atomic and durable writes, locks.

Lustre, some NFS servers, FUSE and FAT lack ``flock``, hard links, or ``fsync`` on folders. The functions here work
without these operations. A function whose guarantee this weakens returns the reason for the caller to report.
"""

import errno
import os
import re
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, TypeVar

from scalegpt.errors import InputError, NoSpaceError
from scalegpt.text import one_line, shown

Result = TypeVar("Result")

RETRIED = frozenset({errno.EIO, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT})
"""Error numbers of network file systems that may be transient. A full disk is not one of them."""

RETRY_SECONDS = (0.5, 2.0)
"""Seconds to wait before the second and before the third attempt."""

TEXT_LIMIT = 16 << 20
"""The largest text file that is read whole, in bytes, unless the caller sets another limit."""

_NAME_BYTES, _PATH_BYTES = 255, 4095  # Linux's limits
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})

# Error numbers by which a file system says that it lacks an operation: for any operation, then for particular ones.
_UNSUPPORTED = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL})
_NO_FOLDER_SYNC = _UNSUPPORTED | {errno.EBADF, errno.EISDIR, errno.EACCES, errno.EPERM}  # some cannot open a folder
_NO_LOCKS = _UNSUPPORTED | {errno.ENOLCK, errno.EBADF, errno.EISDIR}  # NFS raises the last two for a folder
_NO_LINKS = _UNSUPPORTED | {errno.EPERM, errno.EACCES, errno.EMLINK}  # FAT raises EPERM

_TEMPORARY = re.compile(r"\..+\.([0-9]{1,10})(?:-[0-9]+)?\.tmp")
_CLOCK_SECONDS = 2.0
"""The tolerance, in seconds, when times of files and processes are compared, for example with a file server's clock."""


def user_path(text: str) -> str:
    """A path that a user gave, with ``~`` or ``~user`` at its start replaced by that user's home folder.

    A shell replaces ``~`` only at the start of a word, not after ``--flag=`` and not in a configuration file. A file
    named ``~`` is reached as ``./~``.

    Raises:
        InputError: no file can have that path, or there is no such user.
    """
    if not text or re.search("[\0\ud800-\udc7f\udd00-\udfff]", text):  # JSON can hold halves of surrogate pairs
        raise InputError(f"{shown(text)} is not a valid path")
    path = os.path.expanduser(text)  # noqa: PTH111 - pathlib makes ./~ a ~ again
    if path.startswith("~"):
        user = path.split("/")[0]
        raise InputError(f"{shown(text)}: there is no user {shown(user[1:])}; for a file of that name give ./{user}")
    if len(os.fsencode(path)) > _PATH_BYTES or any(len(os.fsencode(part)) > _NAME_BYTES for part in path.split("/")):
        raise InputError(f"{shown(text)}: the path or a name in it is too long")
    return path


class DiskError(InputError):
    """An operation on a path failed. ``problem`` says which and why, in words that can follow the path."""

    subject, done, advice = "", "used", "check the disk"

    def __init__(self, path: Path, error: OSError) -> None:
        self.path, self.problem = path, f"cannot be {self.done}: {error.strerror}"
        super().__init__(f"{self.subject}{one_line(path)} {self.problem}; {self.advice}")
        self._error = error

    def __reduce__(self) -> Any:
        """Make the error picklable, since ranks send each other the errors that they raise."""
        return type(self), (self.path, self._error)


class PlaceError(DiskError):
    """A file or a folder cannot be written."""

    done, advice = "written", "choose another place"


class NotPlainError(InputError):
    """The path is that of a pipe, a socket or a device, not of a file."""


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Turn an ``OSError`` inside the block, which writes to ``out``, into an error with a message of one line.

    Raises:
        NoSpaceError: no disk space is left.
        PlaceError: ``out`` cannot be written.
    """
    try:
        yield
    except OSError as error:
        said = f"no disk space is left for {one_line(out)}; free some, or choose another disk"
        raise (NoSpaceError(said) if error.errno in _FULL else PlaceError(out, error)) from None


def retried(work: Callable[[], Result], waits: tuple[float, ...] | None = None) -> Result:
    """Call ``work`` and return its result. Call it again after an error that may be transient (:data:`RETRIED`).

    ``waits`` are the seconds before each further attempt; None: :data:`RETRY_SECONDS`.

    If ``work`` writes a file, each call must write the file from its start. After a failed sync the system drops the
    data that it could not write, and a second sync of the same file reports no error.

    Raises:
        OSError: the last attempt failed, or an attempt failed with an error that is not transient.
    """
    for seconds in RETRY_SECONDS if waits is None else waits:
        try:
            return work()
        except OSError as error:
            if error.errno not in RETRIED:
                raise
        time.sleep(seconds)
    return work()


def open_plain(path: Path, *, follow_link: bool = True) -> BufferedReader:
    """Open a plain file to read its bytes. If the path is a pipe, raise an error without waiting for a writer.

    Raises:
        NotPlainError: the path is a pipe, a socket or a device.
        OSError: the file is missing, is a folder, or cannot be read; or it is a link, and ``follow_link`` is false.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | (0 if follow_link else os.O_NOFOLLOW))
    except OSError as error:
        if error.errno == errno.ENXIO:  # the path is a socket
            raise NotPlainError(f"{path} is not a plain file") from None
        raise
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise NotPlainError(f"{path} is not a plain file")


def read_bytes(path: Path, limit: int = TEXT_LIMIT) -> bytes:
    """The content of a plain file of at most ``limit`` bytes.

    Raises:
        InputError: the path is not a plain file, or the file is larger.
        OSError: the file is missing or cannot be read, after retries.
    """

    def read() -> bytes:
        with open_plain(path) as file:
            return file.read(limit + 1)

    content = retried(read)
    if len(content) > limit:
        raise InputError(f"{path} has more than {limit:,} bytes, which is too large for a file of its kind")
    return content


def read_text(path: Path, limit: int = TEXT_LIMIT, *, errors: str = "strict") -> str:
    r"""The content of a UTF-8 file, without a byte order mark and with ``\n`` at line ends; see :func:`read_bytes`.

    Raises:
        UnicodeDecodeError: the file is not UTF-8, and ``errors`` is ``strict``.
    """
    return read_bytes(path, limit).decode("utf-8-sig", errors=errors).replace("\r\n", "\n")


def free_bytes(path: Path) -> int | None:
    """The free bytes on the disk of a path, which need not exist yet; None if the file system does not report them.

    Raises:
        OSError: the path or its disk cannot be examined.
    """
    place = path.absolute()
    while not place.exists():
        place = place.parent
    try:
        usage = retried(lambda: shutil.disk_usage(place))
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return None
    return None if usage.free == 0 and usage.total == 0 else usage.free


def check_space(out: Path, needed: int) -> None:
    """Refuse to write ``needed`` bytes to a path, which need not exist yet, if the disk has no room for them.

    Raises:
        NoSpaceError: the disk has too little room; the message names the bytes needed and the bytes free.
    """
    with disk_errors(out):
        free = free_bytes(out)
    if free is not None and free < needed:
        raise NoSpaceError(
            f"not enough disk space for {one_line(out)}: about {needed:,} bytes are needed and {free:,} are free there; "
            "free some, or choose another disk"
        )


def sync_file(file: IO[Any]) -> None:
    """Sync an open file, so that its content survives a power cut. If the file system cannot sync, only flush the file.

    Raises:
        OSError: the disk could not write the file.
    """
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def sync_folder(path: Path) -> str | None:
    """Sync a folder, so that its entries survive a power cut.

    Returns:
        None if the folder is synced; else why its file system cannot sync folders.

    Raises:
        OSError: the disk could not write the entries.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
        return str(error.strerror)
    return None


def write_atomic(path: Path, content: bytes | str, *, durable: bool = False) -> None:
    """Write a file (text as UTF-8) so that readers, even after a crash, find either the old or the new content.

    With ``durable``, the file is synced before it is renamed to ``path``, and its folder afterwards.

    Raises:
        OSError: the file cannot be written; the old content is unchanged.
    """
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if durable:
                sync_file(file)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def temporary_name(path: Path) -> Path:
    """The path of a file while it is written: ``.NAME.PID.tmp``, or ``.NAME.PID-THREAD.tmp`` outside the main thread."""
    thread, pid = threading.get_native_id(), os.getpid()
    return path.with_name(f".{path.name}.{pid}{'' if thread == pid else f'-{thread}'}.tmp")


def is_temporary(path: Path) -> bool:
    """Whether a file has the name of an unfinished file (:func:`temporary_name`)."""
    return _TEMPORARY.fullmatch(path.name) is not None


def remove_temporaries(folder: Path, name: str = "*") -> None:
    """Delete the unfinished files (:func:`temporary_name`) of processes that have ended.

    ``name`` is a glob pattern for the final names of the files. The caller makes sure that no other process begins to
    write in the folder at the same time.

    Raises:
        OSError: the folder cannot be read or written.
    """
    for path in folder.glob(f".{name}.*.tmp"):
        match = _TEMPORARY.fullmatch(path.name)
        if match and path.is_file() and not path.is_symlink() and not _may_be_writing(int(match[1]), path):
            path.unlink(missing_ok=True)


def _may_be_writing(pid: int, path: Path) -> bool:
    """Whether another process, with number ``pid``, may be writing the file: it runs, and began before the last write."""
    import psutil  # imported here, since most commands do not need it

    if pid == os.getpid():
        return False
    try:
        return float(psutil.Process(pid).create_time()) <= path.stat().st_mtime + _CLOCK_SECONDS
    except (psutil.NoSuchProcess, FileNotFoundError):
        return False


def give_name(temporary: Path, path: Path) -> None:
    """Rename a finished temporary file to ``path``, unless a file of that name exists.

    On a file system without hard links, an empty file is first created at ``path``, so a reader may see an empty file.

    Raises:
        FileExistsError: the name is taken.
        OSError: the folder cannot be written.
    """
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # succeeds for one process only
        try:
            temporary.replace(path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return
    temporary.unlink(missing_ok=True)


def lock_file(file: IO[Any] | int, *, shared: bool = False) -> str | None:
    """Lock an open file or folder, without waiting, until it is closed or the process ends.

    With ``shared``, other shared locks of the same file are allowed.

    Returns:
        None if the file is locked; else why its file system cannot lock.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    import fcntl  # imported here: Python in a browser does not have it

    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return str(error.strerror)
    return None
