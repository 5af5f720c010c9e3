"""Read a file's bytes once, from beginning to end: unpack gzip and Zstandard, and hash what the file holds."""

import gzip
import hashlib
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from scalegpt.errors import InputError
from scalegpt.text import one_line

CHUNK_BYTES = 1 << 20
"""The size of the chunks of bytes in which files are read."""

GZIP, ZSTD = "gzip", "Zstandard"
"""The packings that are read."""

INSTALL = "install it: pip install 'scalegpt[data]'"

_ZSTD_INPUT = 2048
"""Bytes of Zstandard that are unpacked at once: 4 of them may stand for 128 KiB, so these give at most 64 MiB."""


class DamagedError(Exception):
    """A file does not unpack, or its form is broken; the error's text says how."""


class MissingPackageError(InputError):
    """A form of data needs a package that is not installed."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} is read with a package that is not installed; {INSTALL}")


class InputFile:
    """An open file that is read once and hashed as it is read. It is a context manager.

    Attributes:
        path: path of the file.
        packing: :data:`GZIP` or :data:`ZSTD`, which :meth:`chunks` unpacks; None: it reads the file as it is.
        position: the number of bytes of the file read so far. A reader that opens the file by itself sets it.
    """

    def __init__(self, path: Path, packing: str | None = None) -> None:
        self.path, self.packing, self.position = path, packing, 0
        self._file = path.open("rb")
        self._hashed = 0
        self._digest = hashlib.sha256()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self, size: int = -1) -> bytes:
        """Read at most ``size`` bytes of the file as it is; none at its end."""
        data = self._file.read(size)
        self._digest.update(data)
        self._hashed += len(data)
        self.position = self._hashed
        return data

    def chunks(self) -> Iterator[bytes]:
        """Yield the unpacked bytes, in chunks of :data:`CHUNK_BYTES` bytes, of which the last may be shorter.

        Raises:
            DamagedError: the file does not unpack, or ends too early.
            MissingPackageError: the packing needs a package that is not installed.
            OSError: the file cannot be read.
        """
        if self.packing is None:
            return iter(lambda: self.read(CHUNK_BYTES), b"")
        return _regular(_UNPACK[self.packing](self))

    def finish(self) -> tuple[int, str]:
        """Read what is left of the file; return its size in bytes and the SHA-256 of its bytes, in hex.

        Raises:
            OSError: the file cannot be read.
        """
        while self.read(CHUNK_BYTES):
            pass
        return self._hashed, self._digest.hexdigest()


def unpacked_head(path: Path, packing: str, size: int) -> bytes:
    """The first bytes of a packed file's content, at most ``size``.

    Raises:
        InputError: the file does not unpack. No reader skips a damaged file, wherever in it the damage is.
        MissingPackageError: its packing needs a package that is not installed.
        OSError: the file cannot be read.
    """
    try:
        with InputFile(path, packing) as file:
            return b"".join(islice(file.chunks(), -(-size // CHUNK_BYTES)))[:size]
    except DamagedError as error:
        raise InputError(damaged(path, packing, error)) from None


def damaged(path: Path, what: str | None, error: DamagedError) -> str:
    """The message for a damaged file; ``what`` is its packing or its form."""
    advice = "get an undamaged copy, or leave the file out (in a folder: --exclude)"
    return f"input {one_line(path)} is damaged {what}: {error}; {advice}"


def _regular(parts: Iterator[bytes]) -> Iterator[bytes]:
    """Join parts of any size into chunks of :data:`CHUNK_BYTES`, so that texts are cut alike wherever they are read."""
    held = bytearray()
    for part in parts:
        held += part
        while len(held) >= CHUNK_BYTES:
            yield bytes(held[:CHUNK_BYTES])
            del held[:CHUNK_BYTES]
    if held:
        yield bytes(held)


def _gzip(file: InputFile) -> Iterator[bytes]:
    reader: Any = file  # has the one method that gzip needs
    try:
        with gzip.GzipFile(fileobj=reader, mode="rb") as unpacking:
            yield from iter(lambda: unpacking.read(CHUNK_BYTES), b"")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DamagedError(_reason(error)) from None


def _zstd(file: InputFile) -> Iterator[bytes]:
    try:
        import zstandard  # imported here, since it is an extra
    except ImportError:
        raise MissingPackageError(ZSTD) from None
    unpacking = zstandard.ZstdDecompressor()
    frame: Any = None
    try:
        for chunk in iter(lambda: file.read(CHUNK_BYTES), b""):
            for first in range(0, len(chunk), _ZSTD_INPUT):
                packed = chunk[first : first + _ZSTD_INPUT]
                while packed:
                    frame = frame or unpacking.decompressobj()
                    yield frame.decompress(packed)
                    packed = frame.unused_data if frame.eof else b""
                    frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise DamagedError(_reason(error)) from None
    if frame is not None:
        raise DamagedError("it ends too early")


def _reason(error: Exception) -> str:
    return "it ends too early" if isinstance(error, EOFError) else one_line(error)


_UNPACK: dict[str, Callable[[InputFile], Iterator[bytes]]] = {GZIP: _gzip, ZSTD: _zstd}
