"""Tokens in a file, read on demand.

The file is read, not mapped into memory. If a mapped file became shorter or its disk failed, SIGBUS would kill the process
without a message; a failed read raises an error that names the cause.
"""

import os
from pathlib import Path
from typing import Any, SupportsIndex, overload

import numpy as np
import numpy.typing as npt

from scalegpt.errors import RunError
from scalegpt.storage import retried

DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
"""Name in the sidecar → the type of the ids in a token file, little-endian."""

Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


class StoredTokens:
    """A file of tokens as a read-only array with ``len``, indices, slices of step 1 and ``tolist``.

    Args:
        path: path of the file; the file stays open.
        dtype: the type of the ids, one of :data:`DTYPES`.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any] = DTYPES["uint16"]) -> None:
        self.path, self.dtype = path, dtype
        self._file = path.open("rb", buffering=0)
        self._count = os.fstat(self._file.fileno()).st_size // dtype.itemsize

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
        """Read ``count`` tokens from token offset ``first``; the range must lie within the file as opened.

        Returns:
            ids [count] of type :attr:`dtype`, read-only.

        Raises:
            RunError: the file has become shorter, or reads still fail after retries.
        """
        wanted, offset = count * self.dtype.itemsize, first * self.dtype.itemsize
        try:
            content = self._read_some(wanted, offset)
            while len(content) < wanted:
                more = self._read_some(wanted - len(content), offset + len(content))
                if not more:
                    raise RunError(self._cut_short())
                content += more
        except OSError as error:
            raise RunError(
                f"token file {self.path} cannot be read at token offset {first:,}: {error.strerror}; check the disk, and "
                "start the run again"
            ) from error
        return np.frombuffer(content, dtype=self.dtype)

    def _read_some(self, wanted: int, offset: int) -> bytes:
        """Read at most ``wanted`` bytes from byte offset ``offset``; empty at the end of the file."""
        return retried(lambda: os.pread(self._file.fileno(), wanted, offset))

    def _cut_short(self) -> str:
        there = os.fstat(self._file.fileno()).st_size // self.dtype.itemsize
        return (
            f"token file {self.path} had {self._count:,} tokens when it was opened and has {there:,} now: something "
            "cut it short; restore it or prepare the data again, and start the run again"
        )
