"""Megatron: ids in ``PREFIX.bin``; where sequences and documents begin in ``PREFIX.idx``, as Megatron-LM writes both.

The index: 9 bytes of magic, version (u64), code of the ids' type (u8), numbers of sequences and of document bounds (u64),
then the sequences' lengths in tokens (int32), their places in bytes (int64), and the sequences at which documents begin
(int64).
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from scalegpt.data.foreign.found import Found, TokensOfFile, divided, names_in, read_at, size_of
from scalegpt.data.stored import Part
from scalegpt.errors import InputError
from scalegpt.text import one_line

NAME = "Megatron"

_MAGIC, _OLD_MAGIC = b"MMIDIDX\0\0", b"TNTIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")
_TYPES = {
    code: np.dtype(name)
    for code, name in ((1, "u1"), (2, "i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2"), (9, "<u4"), (10, "<u8"))
}
"""Code in the index → type of the ids; 9 and 10 are of Megatron-DeepSpeed. 6 and 7 are fractions, which are no ids."""

_CHUNK = 1 << 17
"""The number of entries of an index that are checked at a time."""

_MOST = 1 << 48


def is_ours(path: Path) -> bool:
    """Whether a path is a prefix or one of its two files, or a folder has an index; see :func:`find`."""
    if path.is_dir():
        return any(_has_magic(path / name) for name in names_in(path) if name.endswith(".idx"))
    prefix = _prefix(path)
    return prefix is not None and _has_magic(_named(prefix, ".idx"))


def find(path: Path) -> Found:
    """Read the header of the index of a prefix, or of all prefixes of a folder, in the order of their names.

    Raises:
        InputError: an index is malformed or does not fit its tokens, or one of the two files is missing.
    """
    if not path.is_dir():
        prefix = _prefix(path)
        assert prefix is not None
        return Found(NAME, path, (_read(prefix),))
    names = names_in(path)
    prefixes = sorted({name[:-4] for name in names if name.endswith(".idx")})
    alone = next((name for name in names if name.endswith(".bin") and name[:-4] not in prefixes), None)
    if alone is not None:
        raise InputError(f"{one_line(path / alone)} has no index (.idx); restore it, or move the file elsewhere")
    return Found(NAME, path, *divided([_read(path / prefix) for prefix in prefixes], path))


def _named(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(f"{prefix.name}{suffix}")


def _prefix(path: Path) -> Path | None:
    """The prefix that a path names, by itself or by one of its files; None if it names none."""
    prefix = path.with_suffix("") if path.suffix in {".bin", ".idx"} and path.is_file() else path
    return prefix if prefix.name and _named(prefix, ".idx").is_file() else None


def _has_magic(path: Path) -> bool:
    try:
        return read_at(path, 0, len(_MAGIC)).startswith((_MAGIC, _OLD_MAGIC))
    except InputError:
        return False


def _read(prefix: Path) -> TokensOfFile:
    path, tokens = _named(prefix, ".idx"), _named(prefix, ".bin")
    size, name = size_of(path), one_line(path)
    head = read_at(path, 0, _HEADER.size)
    if head.startswith(_OLD_MAGIC):
        raise InputError(
            f"{name} is in an older format of Megatron's indices; prepare the data with a newer Megatron-LM"
        )
    if len(head) < _HEADER.size or not head.startswith(_MAGIC):
        raise InputError(f"{name} has no whole header of Megatron's indices; prepare the data again")
    _, version, code, sequences, bounds = _HEADER.unpack(head)
    if version != 1 or code not in _TYPES:
        raise InputError(
            f"{name} is of version {version} with ids of type {code}, where version 1 with whole numbers is read; prepare "
            "the data again"
        )
    expected = _HEADER.size + 12 * sequences + 8 * bounds
    if not 0 < sequences < _MOST or not 1 < bounds < _MOST or size not in {expected, expected + sequences}:
        raise InputError(
            f"{name} has {size:,} bytes and says {sequences:,} sequences and {bounds:,} bounds of documents; it was cut "
            "short or is damaged: prepare the data again"
        )
    if size == expected + sequences:
        raise InputError(
            f"{name} is of sequences of several kinds (multimodal), which are not read here; give one of text"
        )
    index = _Index(path, sequences, bounds, _TYPES[code].itemsize)
    count = index.tokens()
    if (there := size_of(tokens)) != count * index.width:
        raise InputError(
            f"{one_line(tokens)} has {there:,} bytes, where its index says {count:,} tokens of {index.width} bytes; "
            "prepare the data again"
        )
    return TokensOfFile(Part(tokens, 0, count, _TYPES[code]), index, index.check)


@dataclass(frozen=True)
class _Index:
    """The index of a prefix, as the ends of its documents; see :class:`~scalegpt.data.foreign.found.Ends`.

    Attributes:
        path: path of the file.
        sequences: number of sequences.
        bounds: number of bounds of documents: one more than documents.
        width: size of an id in bytes.
    """

    path: Path
    sequences: int
    bounds: int
    width: int

    def __len__(self) -> int:
        return self.bounds - 1

    def __getitem__(self, index: int, /) -> int:
        return self._start(int(self._bounds(range(1, self.bounds)[index], 1)[0]))

    def tokens(self) -> int:
        """The number of tokens, after a look at the first and last entries.

        Raises:
            InputError: they contradict each other.
        """
        last = int(self._places(self.sequences - 1, 1)[0]) + int(self._lengths(self.sequences - 1, 1)[0]) * self.width
        ends = int(self._bounds(0, 1)[0]), int(self._bounds(self.bounds - 1, 1)[0])
        if ends != (0, self.sequences) or last <= 0 or last % self.width:
            raise self._damaged("its first or last entries do not fit its numbers of sequences and documents")
        return last // self.width

    def check(self) -> None:
        """Check that sequences follow each other without gaps, and that the bounds of documents ascend.

        Raises:
            InputError: they do not.
        """
        end = 0
        for first in range(0, self.sequences, _CHUNK):
            count = min(_CHUNK, self.sequences - first)
            lengths, places = self._lengths(first, count).astype(np.int64), self._places(first, count)
            ends = end + np.cumsum(lengths) * self.width
            if lengths.min() < 0 or not np.array_equal(places, ends - lengths * self.width):
                raise self._damaged("its sequences do not follow each other")
            end = int(ends[-1])
        last = 0
        for first in range(0, self.bounds, _CHUNK):
            bounds = self._bounds(first, min(_CHUNK, self.bounds - first))
            if bounds[0] < last or bounds[-1] > self.sequences or (bounds[1:] < bounds[:-1]).any():
                raise self._damaged("the bounds of its documents do not ascend")
            last = int(bounds[-1])

    def _start(self, sequence: int) -> int:
        """The token offset at which a sequence begins; for the number after the last sequence, the number of all tokens."""
        if not 0 <= sequence <= self.sequences:
            raise self._damaged("a bound of documents is not a sequence")
        if sequence == self.sequences:
            return self.tokens()
        place = int(self._places(sequence, 1)[0])
        if place < 0 or place % self.width:
            raise self._damaged("a sequence begins inside an id")
        return place // self.width

    def _lengths(self, first: int, count: int) -> npt.NDArray[Any]:
        return self._array(0, "<i4", first, count)

    def _places(self, first: int, count: int) -> npt.NDArray[Any]:
        return self._array(4 * self.sequences, "<i8", first, count)

    def _bounds(self, first: int, count: int) -> npt.NDArray[Any]:
        return self._array(12 * self.sequences, "<i8", first, count)

    def _array(self, offset: int, name: str, first: int, count: int) -> npt.NDArray[Any]:
        dtype = np.dtype(name)
        content = read_at(self.path, _HEADER.size + offset + first * dtype.itemsize, count * dtype.itemsize)
        if len(content) < count * dtype.itemsize:
            raise self._damaged("it became shorter while it was read")
        return np.frombuffer(content, dtype=dtype)

    def _damaged(self, why: str) -> InputError:
        return InputError(f"{one_line(self.path)} is damaged: {why}; prepare the data again")
