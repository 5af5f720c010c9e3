"""The tokens of one split, in one or several files without headers, and the digests of such files."""

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scalegpt.config.tokenizer import SIDECAR
from scalegpt.data.sidecar import Shard, joined_digest
from scalegpt.data.stored import DTYPES, Part, StoredTokens, Tokens, as_ids
from scalegpt.errors import InputError
from scalegpt.storage import DiskError
from scalegpt.system.cores import usable_cores
from scalegpt.text import one_line

Progress = Callable[[int, int], None]

BLOCK_BYTES = 4 << 20
"""Each block of this many bytes has a digest of its own in the sidecar, so that a change can be located."""

_CHUNK_TOKENS = 1 << 22
_REPORT_SECONDS = 0.2


class UnreadableTokensError(DiskError):
    """Token files cannot be read now, because of permissions or the disk; they may be undamaged."""

    subject, done, advice = "token file ", "read", "make it readable"


class Scanned(NamedTuple):
    """What reading a part whole finds.

    Attributes:
        sha256: SHA-256 of its bytes, in hex.
        largest: its largest id; 0 without tokens.
    """

    sha256: str
    largest: int


@dataclass(frozen=True, eq=False)
class TokenFile:
    """The tokens of one split, in one or several files.

    Attributes:
        path: path of the file; of several, their folder.
        tokens: the content as a read-only array that reads the files on demand.
    """

    path: Path
    tokens: StoredTokens
    _scanned: list[Scanned] = field(default_factory=list, repr=False)

    @staticmethod
    def open(path: Path, expected: int | None = None, dtype: np.dtype[Any] = DTYPES["uint16"]) -> "TokenFile":
        """Open a token file.

        Args:
            path: path of the file.
            expected: the number of tokens that the sidecar states; None without a sidecar.
            dtype: the type of the ids.

        Raises:
            InputError: the file is missing or empty, does not hold ``expected`` tokens, or a part of one.
            UnreadableTokensError: the file cannot be read.
        """
        return opened(path, [_checked_part(path, expected, dtype)])

    @staticmethod
    def open_shards(folder: Path, shards: Sequence[Shard], dtype: np.dtype[Any]) -> "TokenFile":
        """Open the token files of one split, which a sidecar lists.

        Raises:
            InputError, UnreadableTokensError: as for :meth:`open`.
        """
        parts = [_checked_part(folder / shard.name, shard.tokens, dtype) for shard in shards]
        return opened(parts[0].path if len(parts) == 1 else folder, parts)

    def scanned(self, progress: Progress | None = None) -> list[Scanned]:
        """What reading the files whole finds, for each of the tokens' parts. They are read once, on all cores.

        Args:
            progress: called now and then, in this thread, with the bytes read so far and in all; if it raises, reading ends.

        Raises:
            UnreadableTokensError: a file cannot be read.
        """
        if not self._scanned:
            self._scanned.extend(_scan(self.tokens.parts, progress))
        return self._scanned

    def recall(self, found: Sequence[Scanned]) -> None:
        """Take what an earlier :meth:`scanned` found, in place of reading the files."""
        assert len(found) == len(self.tokens.parts)
        self._scanned[:] = found

    @property
    def digest(self) -> str:
        """The digest of all tokens (:func:`~.sidecar.joined_digest`), in hex; the files are read whole once.

        Raises:
            UnreadableTokensError: a file cannot be read.
        """
        return joined_digest(each.sha256 for each in self.scanned())

    def check_vocabulary(self, vocab_size: int) -> None:
        """Check that every id is below ``vocab_size``; the files are read whole once.

        Raises:
            InputError: an id is ``vocab_size`` or above; the message states the file, the token offset and the id.
        """
        if vocab_size > np.iinfo(self.tokens.dtype).max or max(each.largest for each in self.scanned()) < vocab_size:
            return
        for number, chunk in enumerate(chunks_of(self.tokens)):
            if chunk.max() >= vocab_size:
                index = int(np.argmax(chunk >= vocab_size))
                path, place = self.tokens.place(number * _CHUNK_TOKENS + index)
                raise InputError(
                    f"token file {one_line(path)} holds id {int(chunk[index])} at token offset {place}, outside "
                    f"the vocabulary of {vocab_size}; use --vocab_size auto, or prepare the data with its tokenizer"
                )


def opened(path: Path, parts: Sequence[Part]) -> TokenFile:
    """The tokens of one split, whose parts are known; ``path`` is the file, or the folder of several.

    Raises:
        UnreadableTokensError: a file cannot be opened.
    """
    try:
        return TokenFile(path, StoredTokens(parts))
    except OSError as error:
        raise UnreadableTokensError(Path(error.filename or path), error) from None


def _checked_part(path: Path, expected: int | None, dtype: np.dtype[Any]) -> Part:
    """All tokens of a file; see :meth:`TokenFile.open`."""
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise InputError(f"token file {one_line(path)}: {error.strerror}; prepare the data again") from None
    except OSError as error:
        raise UnreadableTokensError(path, error) from None
    width = dtype.itemsize
    if expected is not None and size != expected * width:
        raise InputError(
            f"token file {one_line(path)} holds {size} bytes where its {SIDECAR} says {expected * width}: it "
            f"{_how_much(size // width, expected)}; prepare the data again"
        )
    if size == 0:
        raise InputError(f"token file {one_line(path)} is empty; prepare the data again")
    if size % width:
        raise InputError(
            f"token file {one_line(path)} holds {size} bytes, no multiple of {width}, so it is cut short or does not hold "
            f"{dtype.name} tokens; prepare the data again"
        )
    return Part(path, 0, size // width, dtype)


def chunks_of(tokens: StoredTokens) -> Iterator[Tokens]:
    """All tokens, :data:`_CHUNK_TOKENS` at a time."""
    return (tokens[first : first + _CHUNK_TOKENS] for first in range(0, len(tokens), _CHUNK_TOKENS))


def digests_of(part: Part) -> tuple[str, list[str]]:
    """The SHA-256 of the bytes of a part, and the SHA-256 of each block of :data:`BLOCK_BYTES` bytes of them, in hex.

    Raises:
        UnreadableTokensError: the file cannot be read.
    """
    whole, blocks = hashlib.sha256(), []
    for block in _blocks(part):
        whole.update(block)
        blocks.append(hashlib.sha256(block).hexdigest())
    return whole.hexdigest(), blocks


def _scan(parts: Sequence[Part], progress: Progress | None) -> list[Scanned]:
    """Read all parts; see :meth:`TokenFile.scanned`."""
    total, over = sum(part.count * part.dtype.itemsize for part in parts), threading.Event()
    done: list[int] = []
    with ThreadPoolExecutor(max(1, min(len(parts), usable_cores()))) as pool:
        jobs = [pool.submit(_scan_part, part, done, over) for part in parts]
        try:
            while progress is not None and wait(jobs, _REPORT_SECONDS).not_done:
                progress(sum(done), total)
            return [job.result() for job in jobs]
        finally:
            over.set()
            pool.shutdown(cancel_futures=True)


def _scan_part(part: Part, done: list[int], over: threading.Event) -> Scanned:
    """Read a part, until ``over`` is set; the numbers of bytes read are appended to ``done``."""
    digest, largest, width = hashlib.sha256(), 0, part.dtype.itemsize
    target = part.dtype if part.dtype in DTYPES.values() else DTYPES["uint32"]
    for block in _blocks(part):
        if over.is_set():
            break
        digest.update(block)
        ids = as_ids(np.frombuffer(block, dtype=part.dtype, count=len(block) // width), target)
        largest = max(largest, int(ids.max(initial=0)))
        done.append(len(block))
    return Scanned(digest.hexdigest(), largest)


def _blocks(part: Part) -> Iterator[bytes]:
    """The bytes of a part, :data:`BLOCK_BYTES` at a time; fewer where the file has become shorter."""
    left = part.count * part.dtype.itemsize
    try:
        with part.path.open("rb") as file:
            file.seek(part.offset)
            while left and (block := file.read(min(BLOCK_BYTES, left))):
                yield block
                left -= len(block)
    except OSError as error:
        raise UnreadableTokensError(part.path, error) from None


def _how_much(tokens: int, expected: int) -> str:
    if tokens < expected:
        return f"was cut short at token offset {tokens}"
    return f"continues past token offset {expected}, where it ended"
