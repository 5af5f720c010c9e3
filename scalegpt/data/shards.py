"""Token files: nanoGPT's format with a JSON sidecar.

A folder of prepared tokens holds ``train.bin`` and ``val.bin``, headerless little-endian uint16, or uint32 if the vocabulary
has more than 65,536 ids, and ``meta.json``, which describes the tokens and how they were made. A large one has several such
files for a split, which ``meta.json`` lists in order. The ``tokenizer.json`` that made the tokens, if one did, lies beside
them. nanoGPT's own folders, with or without ``meta.pkl``, can be opened too.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scalegpt.config.tokenizer import TOKENIZER_JSON
from scalegpt.data.sidecar import (
    SIDECAR,
    SPLITS,
    Shard,
    joined_digest,
    read_nanogpt_characters,
    read_sidecar,
    recorded_digests,
    shards_of,
)
from scalegpt.data.stored import DTYPES, Part, StoredTokens
from scalegpt.data.tokenizers import Tokenizer, make_tokenizer
from scalegpt.errors import InputError
from scalegpt.storage import DiskError
from scalegpt.text import one_line

BLOCK_BYTES = 4 << 20
"""Each block of this many bytes has a digest of its own in the sidecar, so that a change can be located."""

_CHUNK_TOKENS = 1 << 22


class UnreadableTokensError(DiskError):
    """Token files cannot be read now, because of permissions or the disk; they may be undamaged."""

    subject, done, advice = "token file ", "read", "make it readable"


@dataclass(frozen=True, eq=False)
class TokenFile:
    """The tokens of one split, in one or several files.

    Attributes:
        path: path of the file; of several, their folder.
        tokens: the content as a read-only array that reads the files on demand.
    """

    path: Path
    tokens: StoredTokens

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
        return _opened(path, [_checked_part(path, expected, dtype)])

    @staticmethod
    def open_shards(folder: Path, shards: Sequence[Shard], dtype: np.dtype[Any]) -> "TokenFile":
        """Open the token files of one split, which a sidecar lists.

        Raises:
            InputError, UnreadableTokensError: as for :meth:`open`.
        """
        parts = [_checked_part(folder / shard.name, shard.tokens, dtype) for shard in shards]
        return _opened(parts[0].path if len(parts) == 1 else folder, parts)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Read all tokens, in chunks, and check that every id is below ``vocab_size``.

        Raises:
            InputError: an id is ``vocab_size`` or above; the message states the file, the token offset and the id.
        """
        if vocab_size > np.iinfo(self.tokens.dtype).max:
            return
        for first in range(0, len(self.tokens), _CHUNK_TOKENS):
            chunk = self.tokens[first : first + _CHUNK_TOKENS]
            if chunk.max() >= vocab_size:
                index = int(np.argmax(chunk >= vocab_size))
                path, place = self.tokens.place(first + index)
                raise InputError(
                    f"token file {one_line(path)} holds id {int(chunk[index])} at token offset {place}, outside "
                    f"the vocabulary of {vocab_size}; use --vocab_size auto, or prepare the data with its tokenizer"
                )

    def digests(self) -> tuple[str, list[str]]:
        """The digest of all tokens (:func:`~.sidecar.joined_digest`), and the SHA-256 of each block of each file, in hex.

        Raises:
            UnreadableTokensError: a file cannot be read.
        """
        found = [digests_of(part) for part in self.tokens.parts]
        return joined_digest(whole for whole, _ in found), [block for _, blocks in found for block in blocks]


def _opened(path: Path, parts: Sequence[Part]) -> TokenFile:
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
            f"token file {one_line(path)} holds {size} bytes, an odd number, so it is cut short or does not hold "
            f"{dtype.name} tokens; prepare the data again"
        )
    return Part(path, 0, size // width, dtype)


def digests_of(part: Part) -> tuple[str, list[str]]:
    """The SHA-256 of the bytes of a part, and the SHA-256 of each block of :data:`BLOCK_BYTES` bytes of them, in hex.

    Raises:
        UnreadableTokensError: the file cannot be read.
    """
    whole, blocks, left = hashlib.sha256(), [], part.count * part.dtype.itemsize
    try:
        with part.path.open("rb") as file:
            file.seek(part.offset)
            while left and (block := file.read(min(BLOCK_BYTES, left))):
                whole.update(block)
                blocks.append(hashlib.sha256(block).hexdigest())
                left -= len(block)
    except OSError as error:
        raise UnreadableTokensError(part.path, error) from None
    return whole.hexdigest(), blocks


def _how_much(tokens: int, expected: int) -> str:
    if tokens < expected:
        return f"was cut short at token offset {tokens}"
    return f"continues past token offset {expected}, where it ended"


@dataclass(frozen=True, eq=False)
class TokenSet:
    """A folder of prepared tokens.

    Attributes:
        path: the folder.
        files: split (``train`` or ``val``) → its token file.
        tokenizer: the tokenizer that made the ids.
        meta: content of ``meta.json``; empty for a folder that nanoGPT made.
    """

    path: Path
    files: dict[str, TokenFile]
    tokenizer: Tokenizer
    meta: dict[str, Any]

    @property
    def train(self) -> StoredTokens:
        """The training tokens."""
        return self.files["train"].tokens

    @property
    def val(self) -> StoredTokens:
        """The held-out tokens."""
        return self.files["val"].tokens

    @property
    def encodings(self) -> list[str]:
        """The encodings in which the text was read, sorted; empty if they are not known."""
        listed = {source["encoding"] for source in self.meta.get("sources", []) if "encoding" in source}
        return sorted(listed | set(self.meta.get("encodings", [])))

    @property
    def skipped(self) -> dict[str, int]:
        """Reason → number of files and folders that the preparation skipped for this reason."""
        return dict(self.meta.get("skipped", {}))

    @property
    def digest(self) -> str:
        """SHA-256 over the digests of the tokenizer and of both splits, in hex; equal digests mean equal tokens.

        Without a sidecar the files are read to compute it.
        """
        if self.meta:
            return digest_of(self.tokenizer.digest, recorded_digests(self.meta))
        return digest_of(self.tokenizer.digest, {split: self.files[split].digests()[0] for split in SPLITS})

    def check_vocabulary(self, vocab_size: int) -> None:
        """Read both splits and check that every id is below ``vocab_size``, so that the model has an embedding for it.

        Raises:
            InputError: an id is ``vocab_size`` or above; the message states the file, the token offset and the id.
        """
        for split in SPLITS:
            self.files[split].check_vocabulary(vocab_size)

    def check_block_size(self, block_size: int) -> None:
        """Check that each split fills at least one window of ``block_size + 1`` tokens.

        Raises:
            InputError: a split is too short; the message states the split, its number of tokens, and remedies.
        """
        for split, name in (("train", "training"), ("val", "held-out")):
            tokens = len(self.files[split].tokens)
            if tokens <= block_size:
                share = "larger" if split == "val" else "smaller"
                shorter = f"--block_size {tokens - 1} or less, " if tokens > 1 else ""
                raise InputError(
                    f"{self._origin()} gives {tokens} {name} tokens, fewer than block_size {block_size} + 1; "
                    f"use {shorter}more text, or a {share} --val_fraction"
                )

    def check_contents(self) -> None:
        """Read all files and compare their SHA-256 with those in the sidecar.

        Raises:
            InputError: a file has changed since it was prepared; the message states the file and where the change is.
        """
        for split, shards in (shards_of(self.meta) if self.meta else {}).items():
            for shard, part in zip(shards, self.files[split].tokens.parts, strict=True):
                whole, found = digests_of(part)
                if whole != shard.sha256:
                    place = _first_difference(found, shard.blocks, part.dtype.itemsize)
                    raise InputError(
                        f"token file {one_line(part.path)} has changed since{place}; prepare the data again"
                    )

    def _origin(self) -> str:
        sources = self.meta.get("sources", [])
        return one_line(sources[0]["path"] if len(sources) == 1 else self.path)


def digest_of(tokenizer: str, files: dict[str, str]) -> str:
    """Compute :attr:`TokenSet.digest` from a tokenizer's digest and ``files``: split → digest of its token files."""
    parts = [tokenizer, *(files[split] for split in SPLITS)]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def _first_difference(found: list[str], recorded: list[str] | None, width: int) -> str:
    """The token offsets of the first block whose digest differs, for a message; empty if no such block is known.

    ``width`` is the size of an id in bytes.
    """
    if recorded is None or len(recorded) != len(found) or found == recorded:
        return ""
    index = next(index for index, pair in enumerate(zip(found, recorded, strict=True)) if pair[0] != pair[1])
    tokens = BLOCK_BYTES // width
    return f", first between token offsets {index * tokens} and {(index + 1) * tokens}"


def open_tokens(path: str | Path) -> TokenSet:
    """Open a folder of prepared tokens and check its files' sizes.

    Args:
        path: a folder with ``train.bin`` and ``val.bin``, or with the files that its ``meta.json`` lists. Without
            ``meta.json``, nanoGPT is taken to have made it: the ids are of characters if there is a ``meta.pkl``, else
            GPT-2's.

    Raises:
        InputError: there is no such folder, the sidecar is malformed, or a token file is missing, cut short or of odd size.
    """
    path = Path(path)
    try:
        names = set(os.listdir(path))  # noqa: PTH208
    except (FileNotFoundError, NotADirectoryError):
        names = set()
    except OSError as error:
        raise UnreadableTokensError(path, error) from None
    if names.isdisjoint({SIDECAR, *(f"{split}.bin" for split in SPLITS)}):
        raise InputError(f"{one_line(path)} is not a folder of prepared tokens; make one with scalegpt data prepare")
    try:
        meta = read_sidecar(path / SIDECAR) if SIDECAR in names else {}
    except OSError as error:
        raise UnreadableTokensError(path / SIDECAR, error) from None
    if meta:
        dtype = DTYPES[meta["dtype"]]
        files = {split: TokenFile.open_shards(path, shards, dtype) for split, shards in shards_of(meta).items()}
    else:
        files = {split: TokenFile.open(path / f"{split}.bin") for split in SPLITS}
    return TokenSet(path, files, _tokenizer_of(path, names, meta), meta)


def _tokenizer_of(path: Path, names: set[str], meta: dict[str, Any]) -> Tokenizer:
    if meta:
        try:
            return Tokenizer.from_dict(meta["tokenizer"], path)
        except OSError as error:
            raise UnreadableTokensError(path / TOKENIZER_JSON, error) from None
        except InputError as error:
            raise InputError(f"{one_line(path / SIDECAR)}: {error}") from None
    if "meta.pkl" not in names:
        return make_tokenizer("gpt2")
    try:
        return read_nanogpt_characters(path / "meta.pkl")
    except OSError as error:
        raise UnreadableTokensError(path / "meta.pkl", error) from None
