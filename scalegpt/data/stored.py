"""Tokens in files, read on demand.

The files are read, not mapped into memory. If a mapped file became shorter or its disk failed, SIGBUS would kill the process
without a message; a failed read raises an error that names the cause.
"""

import os
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, SupportsIndex, overload

import numpy as np
import numpy.typing as npt

from scalegpt.errors import RunError
from scalegpt.storage import retried

DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
"""Name in the sidecar → the type of the ids in a token file, little-endian."""

MOST_OPEN = 64
"""The number of files that one array keeps open; a corpus may have thousands."""

NO_ID = 0xFFFF_FFFF
"""What a number that is no id, negative or of more than 32 bits, is read as: it is outside every vocabulary."""

Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Part:
    """A stretch of a file that holds tokens and nothing else.

    Attributes:
        path: path of the file.
        offset: where the first token begins, in bytes.
        count: number of tokens.
        dtype: the type of the ids in the file, any integer type.
    """

    path: Path
    offset: int
    count: int
    dtype: np.dtype[Any]

    @staticmethod
    def whole(path: Path, dtype: np.dtype[Any]) -> "Part":
        """All tokens of a file without a header.

        Raises:
            OSError: the file cannot be examined.
        """
        return Part(path, 0, path.stat().st_size // dtype.itemsize, dtype)

    def cut(self, first: int, count: int) -> "Part":
        """The ``count`` tokens from the part's token offset ``first`` on."""
        assert first >= 0
        assert count >= 0
        assert first + count <= self.count
        return Part(self.path, self.offset + first * self.dtype.itemsize, count, self.dtype)


class StoredTokens:
    """Tokens in one or several files as one read-only array with ``len``, indices, slices of step 1 and ``tolist``.

    Of at most :data:`MOST_OPEN` files all are opened at once and stay open; more are opened when they are read.

    Args:
        parts: where the tokens are, in their order.

    Attributes:
        parts: the parts.
        dtype: the type of the ids that are read, one of :data:`DTYPES`.

    Raises:
        OSError: a file cannot be opened.
    """

    def __init__(self, parts: Iterable[Part]) -> None:
        self.parts = tuple(parts)
        types = {part.dtype for part in self.parts}
        self.dtype = DTYPES["uint16" if types <= {np.dtype("u1"), DTYPES["uint16"]} else "uint32"]
        self._ends = list(accumulate(part.count for part in self.parts))
        self._count = self._ends[-1] if self._ends else 0
        self._open = lru_cache(maxsize=MOST_OPEN)(_opened)
        files = dict.fromkeys(part.path for part in self.parts)
        if len(files) <= MOST_OPEN:
            for path in files:
                self._open(path)

    @staticmethod
    def of_file(path: Path, dtype: np.dtype[Any] = DTYPES["uint16"]) -> "StoredTokens":
        """The tokens of a file without a header.

        Raises:
            OSError: the file cannot be opened.
        """
        return StoredTokens([Part.whole(path, dtype)])

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, where: SupportsIndex) -> int: ...
    @overload
    def __getitem__(self, where: slice) -> Tokens: ...
    def __getitem__(self, where: SupportsIndex | slice) -> "Tokens | int":
        if isinstance(where, slice):
            first, end, step = where.indices(self._count)
            assert step == 1
            return self.read(first, max(0, end - first))
        index = range(self._count)[where]  # a negative index counts from the end
        return int(self.read(index, 1)[0])

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        assert copy is not False
        return self.read(0, self._count).astype(dtype or self.dtype, copy=False)

    def tolist(self) -> list[int]:
        """All tokens, as a list."""
        return [int(token) for token in self.read(0, self._count)]

    def read(self, first: int, count: int) -> Tokens:
        """Read ``count`` tokens from token offset ``first``; the range must lie within the tokens as opened.

        Returns:
            ids [count] of type :attr:`dtype`, read-only.

        Raises:
            RunError: a file is missing or has become shorter, or reads still fail after retries.
        """
        pieces: list[npt.NDArray[Any]] = []
        number = bisect_right(self._ends, first) if len(self._ends) > 1 else 0
        while count > 0:
            part = self.parts[number]
            begin = first - (self._ends[number] - part.count)
            taken = min(count, part.count - begin)
            pieces.append(as_ids(self._read_part(part, begin, taken), self.dtype))
            first, count, number = first + taken, count - taken, number + 1
        if len(pieces) == 1:
            return pieces[0]
        joined = np.concatenate(pieces) if pieces else np.empty(0, dtype=self.dtype)
        joined.flags.writeable = False
        return joined

    def place(self, index: int) -> tuple[Path, int]:
        """The file that holds the token at an offset of the array, and the token's offset in that file's part."""
        number = bisect_right(self._ends, index)
        part = self.parts[number]
        return part.path, index - (self._ends[number] - part.count)

    def _read_part(self, part: Part, first: int, count: int) -> npt.NDArray[Any]:
        """Read ``count`` numbers of a part from its token offset ``first``, as they are in the file."""
        wanted, offset = count * part.dtype.itemsize, part.offset + first * part.dtype.itemsize
        try:
            file = self._open(part.path)
            content = _read_some(file, wanted, offset)
            while len(content) < wanted:
                more = _read_some(file, wanted - len(content), offset + len(content))
                if not more:
                    raise RunError(_cut_short(part, file.size()))
                content += more
        except OSError as error:
            raise RunError(
                f"token file {part.path} cannot be read at token offset {first:,}: {error.strerror}; check the disk, and "
                "start the run again"
            ) from error
        return np.frombuffer(content, dtype=part.dtype)


class _OpenFile:
    """An open file, which is closed when nobody uses it any more: another thread may read it while the cache drops it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)

    def size(self) -> int:
        """The size in bytes."""
        return os.fstat(self.descriptor).st_size


def _opened(path: Path) -> _OpenFile:
    return retried(lambda: _OpenFile(path))


def _read_some(file: _OpenFile, wanted: int, offset: int) -> bytes:
    """Read at most ``wanted`` bytes from byte offset ``offset``; empty at the end of the file."""
    return retried(lambda: os.pread(file.descriptor, wanted, offset))


def as_ids(numbers: npt.NDArray[Any], dtype: np.dtype[Any]) -> Tokens:
    """The numbers of a file as ids of type ``dtype``; a number that is no id becomes :data:`NO_ID`."""
    if numbers.dtype == dtype:
        return numbers
    if numbers.dtype.kind == "u" and numbers.dtype.itemsize <= dtype.itemsize:
        ids = numbers.astype(dtype)
    elif numbers.dtype == np.dtype("<i4"):
        return numbers.view(dtype)  # a negative number is 2^31 or more, outside every vocabulary
    else:
        wide = numbers.astype(np.int64)
        ids = np.where((wide < 0) | (wide > NO_ID), NO_ID, wide).astype(dtype)
    ids.flags.writeable = False
    return ids


def _cut_short(part: Part, size: int) -> str:
    there = max(0, size - part.offset) // part.dtype.itemsize
    return (
        f"token file {part.path} had {part.count:,} tokens when it was opened and has {there:,} now: something "
        "cut it short; restore it or prepare the data again, and start the run again"
    )
