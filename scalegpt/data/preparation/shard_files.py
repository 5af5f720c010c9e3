"""The token files of one split while they are written: files of a fixed number of tokens, and their digests."""

import errno
import hashlib
import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from scalegpt.data import token_file
from scalegpt.data.sidecar import Shard
from scalegpt.data.stored import Tokens
from scalegpt.storage import read_text, sync_file, write_atomic

DIGESTS = ".digests.json"
"""The ending of the file that keeps the digests of a whole shard until the folder is finished."""

_COPY_TOKENS = 4 << 20


class _Digests:
    """The digests of a shard whose tokens come in parts."""

    def __init__(self) -> None:
        self.bytes = 0
        self._whole, self._block = hashlib.sha256(), hashlib.sha256()
        self._blocks: list[str] = []

    @property
    def room(self) -> int:
        """The bytes that the present block lacks."""
        return token_file.BLOCK_BYTES - self.bytes % token_file.BLOCK_BYTES

    def update(self, part: bytes) -> None:
        """Add bytes, at most :attr:`room`."""
        self._whole.update(part)
        self._block.update(part)
        self.bytes += len(part)
        if self.bytes % token_file.BLOCK_BYTES == 0:
            self._end_block()

    def shard(self, name: str, tokens: int) -> Shard:
        """The digests of all that was added."""
        if self.bytes % token_file.BLOCK_BYTES:
            self._end_block()
        return Shard(name, tokens, self._whole.hexdigest(), self._blocks)

    def _end_block(self) -> None:
        self._blocks.append(self._block.hexdigest())
        self._block = hashlib.sha256()


class ShardFiles:
    """Writes the tokens of a split into files of ``shard_tokens`` tokens, of which the last may have fewer.

    Args:
        folder: where the files are made: ``train_00000.bin``, ``train_00001.bin``, …
        split: ``train`` or ``val``.
        dtype: the type of the ids in the files.
        shard_tokens: number of tokens in a file.
        count: number of tokens that an interrupted preparation wrote, and that are kept.

    Attributes:
        count: number of tokens so far.

    Raises:
        ValueError: there are fewer tokens than ``count``.
        OSError: in every method: a file cannot be read or written, or the disk is full.
    """

    def __init__(self, folder: Path, split: str, dtype: np.dtype[Any], shard_tokens: int, count: int = 0) -> None:
        self._folder, self._split, self._dtype, self._most = folder, split, dtype, shard_tokens
        self._file: BinaryIO | None = None
        self._digests = _Digests()
        self.count = count
        self._check_sizes()
        self.cut(count)
        self._shards = self._kept_digests()  # of the whole shards that are not changed any more

    def path(self, number: int) -> Path:
        """The path of a shard's file until the folder is finished."""
        return self._folder / f"{self._split}_{number:05}.bin"

    def _digests_path(self, number: int) -> Path:
        return self.path(number).with_suffix(DIGESTS)

    def _check_sizes(self) -> None:
        for first in range(0, self.count, self._most):
            path, tokens = self.path(first // self._most), min(self._most, self.count - first)
            if not path.exists() or path.stat().st_size < tokens * self._dtype.itemsize:
                raise ValueError(f"{path} has fewer than {tokens} tokens")

    def _kept_digests(self) -> list[Shard]:
        kept: list[Shard] = []
        while (path := self._digests_path(len(kept))).exists():
            kept.append(Shard(**json.loads(read_text(path))))
        return kept

    def append(self, ids: Tokens) -> None:
        """Append token ids."""
        ids = ids.astype(self._dtype, copy=False)
        while len(ids):
            number, there = divmod(self.count, self._most)
            if self._file is None:
                path = self.path(number)
                self._file = path.open("r+b" if there else "w+b")
                self._file.seek(there * self._dtype.itemsize)
            part, ids = ids[: self._most - there], ids[self._most - there :]
            self._file.write(part.data)
            self.count += len(part)
            if there + len(part) == self._most:
                self.sync()
                self._close()

    def _read(self, first: int, count: int) -> bytes:
        """Read at most ``count`` tokens from offset ``first``, those of one file."""
        number, there = divmod(first, self._most)
        wanted = min(count, self._most - there) * self._dtype.itemsize
        if self._file is not None:
            self._file.flush()
        path = self.path(number)
        with path.open("rb") as file:
            file.seek(there * self._dtype.itemsize)
            content = file.read(wanted)
        if len(content) != wanted:
            raise OSError(errno.EIO, "it has been cut short", str(path))
        return content

    def move_to(self, other: "ShardFiles", first: int) -> None:
        """Append the tokens from offset ``first`` on to another split; :meth:`cut` then removes them here."""
        while first < self.count:
            ids = np.frombuffer(self._read(first, min(self.count - first, _COPY_TOKENS)), self._dtype)
            other.append(ids)
            first += len(ids)

    def cut(self, count: int) -> None:
        """Remove all tokens from offset ``count`` on; they must not be settled."""
        self._close()
        whole, there = divmod(count, self._most)
        for path in self._folder.glob(f"{self._split}_*"):
            number = int(path.name.removeprefix(f"{self._split}_").partition(".")[0])
            if number >= whole + (there > 0) or (number == whole and path.name.endswith(DIGESTS)):
                path.unlink()
        if there:
            os.truncate(self.path(whole), there * self._dtype.itemsize)
        self.count = count

    def sync(self) -> None:
        """Sync all tokens so far to the disk; a whole file was synced when it was closed."""
        if self._file is not None:
            sync_file(self._file)

    def close(self) -> None:
        """Close the files, whether or not what is buffered can be written."""
        try:
            self._close()
        except OSError:  # closing flushes, which fails again on a full disk: already reported
            return

    def _close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    def settle(self, count: int) -> None:
        """Hash the tokens before offset ``count``, which are not changed any more."""
        width = self._dtype.itemsize
        while (first := len(self._shards) * self._most + self._digests.bytes // width) < count:
            self._digests.update(self._read(first, min(count - first, self._digests.room // width)))
            if self._digests.bytes == self._most * width:
                shard = self._end_shard()
                write_atomic(self._digests_path(len(self._shards) - 1), json.dumps(asdict(shard)), durable=True)

    def _end_shard(self) -> Shard:
        number, tokens = len(self._shards), self._digests.bytes // self._dtype.itemsize
        self._shards.append(self._digests.shard(self.path(number).name, tokens))
        self._digests = _Digests()
        return self._shards[-1]

    def finish(self) -> list[Shard]:
        """Sync all files; a split of one file is renamed to ``train.bin`` or ``val.bin``.

        Returns:
            The shards in order.
        """
        self.settle(self.count)
        if self._digests.bytes:
            self._end_shard()
        self.sync()
        self._close()
        if len(self._shards) > 1:
            return self._shards
        path = self.path(0)
        path.rename(path.with_name(f"{self._split}.bin"))
        return [replace(self._shards[0], name=f"{self._split}.bin")]
