"""Reads a checkpoint: first the manifest, then all files to verify their digests, and only then the tensors.

Only wrong content counts as damage (:class:`DamagedError`). A read that fails is retried (:data:`scalegpt.storage.RETRIED`).
If the read fails again or is not permitted, the checkpoint may be undamaged (:class:`UnreadableError`). The checkpoint's
directory may be a link, but its files must not be.
"""

import errno
import hashlib
import math
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
from scalegpt.checkpoint.address import ADVICE, Address, Place
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
from scalegpt.checkpoint.ranges import RemoteTensors, digest_at
from scalegpt.config.settings import Section
from scalegpt.errors import InputError
from scalegpt.storage import NotPlainError, open_plain, retried

Result = TypeVar("Result")
SectionT = TypeVar("SectionT", bound=Section)

_GONE = {errno.ENOENT, errno.ENOTDIR}
_NO_FILE = {errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.ENAMETOOLONG}
"""Error numbers from opening a path that is not a file: a link, a socket, or a name that no file can have."""


def read_manifest(checkpoint: Place) -> Manifest:
    """Read and check a checkpoint's manifest, and check that the directory holds no links. Other files are not read.

    Raises:
        DamagedError: the manifest is missing, differs from what was written, or has a value that is not allowed; or the
            directory holds a link.
        MisnamedError: the directory has the name of another step.
        UnreadableError: the directory or the manifest cannot be read now.
        InputError: there is no such directory, or the manifest is of another version.
    """
    path = checkpoint / MANIFEST
    if not is_folder(checkpoint):
        raise InputError(f"{checkpoint} is not a checkpoint: there is no such directory")
    if isinstance(checkpoint, Path):
        for entry in _entries(checkpoint):
            if entry.is_symlink():
                raise DamagedError(f"{entry.path} is a link, but a checkpoint must not contain links")
    content = read_limited(path, MANIFEST_LIMIT + 1)
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


def is_folder(path: Place) -> bool:
    """Whether a path is a directory, or a link to one; at an address, whether it is a committed checkpoint.

    Raises:
        UnreadableError: the path cannot be accessed now.
    """
    try:
        if isinstance(path, Address):
            return (path / MANIFEST).is_file()
        return stat.S_ISDIR(retried(path.stat).st_mode)
    except OSError as error:
        if error.errno in _GONE | _NO_FILE:
            return False
        raise unreadable(path, error) from error


def unreadable(path: Place, error: OSError) -> UnreadableError:
    """The error for a path that cannot be read, with advice to the user."""
    if isinstance(path, Address):
        return UnreadableError(f"{path} cannot be read: {error.strerror}; {ADVICE}")
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


def _check_name(checkpoint: Place, step: int) -> None:
    """Refuse a directory with the name of another step. A name without a step, which a copy may have, is accepted."""
    name, right = checkpoint.absolute().name, checkpoint_name(step)
    if NAME.fullmatch(name) and name != right:
        raise MisnamedError(
            f"{checkpoint} is damaged: its name does not match its step; rename it to {right} to use it"
        )


class Checkpoint:
    """A checkpoint opened for reading. Tensors are read only from files that :meth:`verify` has verified.

    Attributes:
        path: the checkpoint's directory.
        manifest: the checkpoint's manifest.
    """

    def __init__(self, path: Place, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self._verified: set[str] = set()
        self._open: dict[str, Any] = {}
        self._remote = RemoteTensors()

    @classmethod
    def open(cls, path: Place) -> "Checkpoint":
        """Open a checkpoint and read its manifest. Raises the same errors as :func:`read_manifest`."""
        return cls(path, read_manifest(path))

    def verify(self, kinds: Collection[str] = KINDS, *, rank: int = 0, size: int = 1) -> None:
        """Compare files with their sizes and digests in the manifest.

        Args:
            kinds: kinds of files to verify. Moments take twice as long as weights, and are needed only for training.
            rank: this rank, which verifies its share of the files.
            size: number of ranks that share the files. Call :meth:`accept` after all ranks have succeeded.

        Raises:
            DamagedError: a file is missing or differs from what was written.
            UnreadableError: a file cannot be read now.
        """
        for problem in self.problems(kinds, rank=rank, size=size):
            raise problem

    def problems(self, kinds: Collection[str] = KINDS, *, rank: int = 0, size: int = 1) -> Iterator[InputError]:
        """Verify files, and yield the error that :meth:`verify` would raise for each damaged or unreadable one."""
        named = [name for name in sorted(self.manifest.files) if kind_of(name) in kinds]
        for name in named[rank::size]:
            try:
                _check(self.path / name, self.manifest.files[name])
                self._verified.add(name)
            except (DamagedError, UnreadableError) as error:
                yield error

    def accept(self) -> None:
        """Mark all files as verified, after all ranks have verified their shares."""
        self._verified.update(self.manifest.files)

    def shape(self, name: str) -> tuple[int, ...]:
        """A parameter's shape.

        Raises:
            InputError: there is no such parameter.
        """
        return self._tensor(name, WEIGHT).shape

    def read(self, name: str, key: str, start: int, count: int) -> Tensor:
        """Read elements ``start`` to ``start + count`` of a flattened tensor: fp32 [count], on the CPU.

        Raises:
            InputError: the checkpoint has no such tensor, or the tensor has fewer elements.
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
                f"{self.path}: {key} of {name} has fewer than {end} elements; the checkpoint's model has another shape"
            )
        return result

    def weight(self, name: str) -> Tensor:
        """Read a parameter's whole weight, fp32, on the CPU.

        Raises:
            InputError: there is no such parameter.
        """
        shape = self.shape(name)
        return self.read(name, WEIGHT, 0, math.prod(shape)).view(shape)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each parameter's name and its whole fp32 weight, one at a time."""
        for name, _ in tensors_of(self.manifest, WEIGHT):
            yield name, self.weight(name)

    def section(self, part: str, kind: type[SectionT]) -> SectionT:
        """A part of the run's configuration, for example ``model``, as a section of settings.

        Raises:
            InputError: the part is missing, or a setting in it is not valid.
        """
        values = self.manifest.header.config.get(part)
        where = self.path / MANIFEST
        if not isinstance(values, dict):
            raise InputError(f"{where} is damaged: its configuration has no {part}; use another checkpoint")
        return kind.from_mapping(values, f"{where}, {part}")

    def _tensor(self, name: str, key: str) -> StoredTensor:
        stored = self.manifest.tensors.get(f"{key}/{name}")
        if stored is None:
            raise InputError(f"{self.path} has no {key} of {name}; the checkpoint's model has another shape")
        return stored

    def _slice(self, name: str, entry: str, first: int, last: int) -> Tensor:
        assert name in self._verified, f"{name} is used before it is verified"
        if isinstance(self.path, Address):
            return _asking(self.path / name, lambda file: self._remote.slice(file, entry, first, last))
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
    """Check that a file can be read now. A damaged or missing file is not an error here.

    Raises:
        UnreadableError: the file cannot be read now.
    """
    with suppress(DamagedError):  # the caller reports the damage
        _reading(path, lambda file: file.read(1))


def _check(path: Place, expected: StoredFile) -> None:
    """Refuse a file that differs from what was written.

    Raises:
        DamagedError: the file is missing, not a plain file, or has another size or digest than in the manifest.
        UnreadableError: the file cannot be read now.
    """
    if isinstance(path, Address):
        size, found = _asking(path, lambda file: digest_at(file, expected))
    else:
        size, found = _digest_of(path, expected)
    if size != expected.bytes:
        raise DamagedError(f"{path} is damaged: it has {size:,} bytes, not {expected.bytes:,}")
    if found != expected.sha256:
        raise DamagedError(f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}")


def _digest_of(path: Path, expected: StoredFile) -> tuple[int, str]:
    """The size of a file, and its digest if the size is the expected one."""

    def digest(file: BufferedReader) -> tuple[int, str]:
        size = os.fstat(file.fileno()).st_size
        if size != expected.bytes:
            return size, ""
        return size, hashlib.file_digest(file, "sha256").hexdigest()

    return _reading(path, digest)


def read_limited(path: Place, limit: int) -> bytes:
    """The first ``limit`` bytes of a file.

    Raises:
        DamagedError: the file is missing, or not a plain file.
        UnreadableError: the file cannot be read now.
    """
    if isinstance(path, Path):
        return _reading(path, lambda file: file.read(limit))
    return _asking(path, lambda file: file.read_whole(limit))


def _asking(file: Address, work: Callable[[Address], Result]) -> Result:
    """Call ``work`` with an object, and raise what :func:`_reading` raises."""
    try:
        return work(file)
    except FileNotFoundError:
        raise DamagedError(f"{file} is missing") from None
    except OSError as error:
        raise unreadable(file, error) from error


def _reading(path: Path, work: Callable[[BufferedReader], Result]) -> Result:
    """Open a plain file, not a link, and call ``work`` with it. Both are repeated after an error that may be temporary.

    Raises:
        DamagedError: the file is missing, or not a plain file.
        UnreadableError: the file cannot be read now.
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
