"""Reading a checkpoint: its manifest, then the digests of its files, and only then their content.

Only wrong content is damage. A read that fails is retried (:data:`scalegpt.storage.RETRIED`). A read that fails again, or is
not permitted, says nothing about the checkpoint: :class:`UnreadableError`. The checkpoint's directory may be a link, its
files may not.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scalegpt.backends.base import WEIGHT
from scalegpt.checkpoint.manifest import (
    KINDS,
    MANIFEST,
    MANIFEST_LIMIT,
    NAME,
    DamagedError,
    Manifest,
    MisnamedError,
    StoredFile,
    StoredTensor,
    UnreadableError,
    checkpoint_name,
    decode,
    entry_name,
    kind_of,
    tensors_of,
)
from scalegpt.errors import InputError
from scalegpt.storage import NotPlainError, open_plain, retried

Result = TypeVar("Result")

_GONE = {errno.ENOENT, errno.ENOTDIR}
_NO_FILE = {errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.ENAMETOOLONG}
"""The system's errors for a link, a socket, or a name that no file can have, in place of a file."""


def read_manifest(checkpoint: Path) -> Manifest:
    """Read and check a checkpoint's manifest, and that the directory holds no links; its files are not read.

    Raises:
        DamagedError: it is missing, not what was written, or names what it must not.
        MisnamedError: the directory has the name of another step.
        UnreadableError: it cannot be read now.
        InputError: not a checkpoint, or one of another version.
    """
    path = checkpoint / MANIFEST
    if not is_folder(checkpoint):
        raise InputError(f"{checkpoint} is not a checkpoint: there is no such directory")
    for entry in _entries(checkpoint):
        if entry.is_symlink():
            raise DamagedError(f"{entry.path} is a link, and a checkpoint has no links")
    content = _reading(path, lambda file: file.read(MANIFEST_LIMIT + 1))
    if len(content) > MANIFEST_LIMIT:
        raise DamagedError(f"{path} is damaged: it has more than {MANIFEST_LIMIT:,} bytes")
    try:
        manifest = decode(content)
    except DamagedError as error:
        raise DamagedError(f"{path} is damaged: {error}") from None
    except InputError as error:
        raise InputError(f"{path} {error}") from None
    _check_name(checkpoint, manifest.header.progress.step)
    return manifest


def is_folder(path: Path) -> bool:
    """Whether a path is a directory, or a link to one.

    Raises:
        UnreadableError: that cannot be read now.
    """
    try:
        return stat.S_ISDIR(retried(path.stat).st_mode)
    except OSError as error:
        if error.errno in _GONE | _NO_FILE:
            return False
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> UnreadableError:
    """The error for a path that could not be read, with what to do."""
    if error.errno in {errno.EACCES, errno.EPERM}:
        return UnreadableError(
            f"{path} cannot be read: {error.strerror}; make it readable for this user, and try again"
        )
    return UnreadableError(f"{path} cannot be read: {error.strerror}; check the disk or its connection, and try again")


def _entries(checkpoint: Path) -> list[os.DirEntry[str]]:
    try:
        return retried(lambda: list(os.scandir(checkpoint)))
    except OSError as error:
        if error.errno in _GONE:
            raise InputError(f"{checkpoint} is not a checkpoint: there is no such directory") from None
        raise unreadable(checkpoint, error) from error


def _check_name(checkpoint: Path, step: int) -> None:
    """Refuse a directory with the name of another step; a copy may have a name without a step."""
    name, right = checkpoint.absolute().name, checkpoint_name(step)
    if NAME.fullmatch(name) and name != right:
        raise MisnamedError(
            f"{checkpoint} is damaged: its name does not match its step; rename it to {right} to use it"
        )


class Checkpoint:
    """A checkpoint to be read; only files that :meth:`verify` has passed are used.

    Attributes:
        path: its directory.
        manifest: its manifest.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self._verified: set[str] = set()
        self._open: dict[str, Any] = {}

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Read the manifest; see :func:`read_manifest`."""
        return cls(path, read_manifest(path))

    def verify(self, kinds: Collection[str] = KINDS, *, rank: int = 0, size: int = 1) -> None:
        """Compare files with their sizes and digests.

        Args:
            kinds: those to be used. Moments take twice as long as weights, and only training needs them.
            rank: each of several ranks checks its share of the files …
            size: … of this many ranks; when all agree, call :meth:`accept`.

        Raises:
            DamagedError: a file is missing or not what was written.
            UnreadableError: a file cannot be read now.
        """
        for problem in self.problems(kinds, rank=rank, size=size):
            raise problem

    def problems(self, kinds: Collection[str] = KINDS, *, rank: int = 0, size: int = 1) -> Iterator[InputError]:
        """An error, as :meth:`verify` raises it, for each file that is damaged or cannot be read."""
        named = [name for name in sorted(self.manifest.files) if kind_of(name) in kinds]
        for name in named[rank::size]:
            try:
                _check(self.path / name, self.manifest.files[name])
                self._verified.add(name)
            except (DamagedError, UnreadableError) as error:
                yield error

    def accept(self) -> None:
        """Count all files as verified: other ranks have verified those that this one has not."""
        self._verified.update(self.manifest.files)

    def shape(self, name: str) -> tuple[int, ...]:
        """A parameter's shape.

        Raises:
            InputError: there is no such parameter.
        """
        return self._tensor(name, WEIGHT).shape

    def read(self, name: str, key: str, start: int, count: int) -> Tensor:
        """Elements ``start`` to ``start + count`` of a flattened tensor, fp32 on the CPU.

        Raises:
            InputError: the checkpoint has no such tensor, or a shorter one.
        """
        stored, end = self._tensor(name, key), start + count
        result, filled = torch.empty(count), 0
        for piece in stored.pieces:
            first, last = max(start, piece.start), min(end, piece.start + piece.count)
            if first < last:
                entry = entry_name(f"{key}/{name}", piece.start)
                result[first - start : last - start] = self._slice(
                    piece.file, entry, first - piece.start, last - piece.start
                )
                filled += last - first
        if filled != count:
            raise InputError(
                f"{self.path}: {key} of {name} has fewer than {end} elements; the checkpoint is of a model of another shape"
            )
        return result

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The whole fp32 weights by name, one at a time."""
        for name, stored in tensors_of(self.manifest, WEIGHT):
            yield name, self.read(name, WEIGHT, 0, sum(piece.count for piece in stored.pieces)).view(stored.shape)

    def _tensor(self, name: str, key: str) -> StoredTensor:
        stored = self.manifest.tensors.get(f"{key}/{name}")
        if stored is None:
            raise InputError(f"{self.path} has no {key} of {name}; the checkpoint is of a model of another shape")
        return stored

    def _slice(self, name: str, entry: str, first: int, last: int) -> Tensor:
        assert name in self._verified, f"{name} is used before it is verified"
        path = self.path / name
        try:
            if name not in self._open:
                self._open[name] = safe_open(path, framework="pt", device="cpu")
            values: Tensor = self._open[name].get_slice(entry)[first:last]
        except (SafetensorError, OSError) as error:
            _check_readable(path)
            if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                # The content was verified; perhaps the file system cannot map files into memory.
                raise UnreadableError(f"{path} cannot be read: {error}; copy the checkpoint to another disk") from error
            # safetensors ends some of its messages with the path.
            raise DamagedError(f"{path} cannot be read: {str(error).removesuffix(f': {path}')}") from None
        if (values.dtype, values.shape) != (torch.float32, (last - first,)):
            raise DamagedError(f"{path}: {entry} does not match {MANIFEST}")
        return values


def _check_readable(path: Path) -> None:
    """Raise only if a file cannot be read now.

    Raises:
        UnreadableError: it cannot be read now.
    """
    with suppress(DamagedError):  # the caller reports the damage
        _reading(path, lambda file: file.read(1))


def _check(path: Path, expected: StoredFile) -> None:
    """Refuse a file that is not what was written.

    Raises:
        DamagedError: it is missing, no plain file, or has changed.
        UnreadableError: it cannot be read now.
    """

    def digest(file: BufferedReader) -> tuple[int, str]:
        size = os.fstat(file.fileno()).st_size
        if size != expected.bytes:
            return size, ""
        return size, hashlib.file_digest(file, "sha256").hexdigest()

    size, found = _reading(path, digest)
    if size != expected.bytes:
        raise DamagedError(f"{path} is damaged: it has {size:,} bytes, not {expected.bytes:,}")
    if found != expected.sha256:
        raise DamagedError(f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}")


def _reading(path: Path, work: Callable[[BufferedReader], Result]) -> Result:
    """Do something with a plain file, not a link; from its beginning again after an error that may pass.

    Raises:
        DamagedError: it is missing, or not a plain file.
        UnreadableError: it cannot be read now.
    """

    def attempt() -> Result:
        with open_plain(path, follow_link=False) as file:
            return work(file)

    try:
        return retried(attempt)
    except (NotPlainError, IsADirectoryError):
        raise DamagedError(f"{path} is not a plain file") from None
    except OSError as error:
        if error.errno in _GONE:
            raise DamagedError(f"{path} is missing") from None
        if error.errno in _NO_FILE:
            raise DamagedError(f"{path} cannot be read: {error.strerror}") from None
        raise unreadable(path, error) from error
