"""Token files: nanoGPT's format with a JSON sidecar.

A folder of prepared tokens holds ``train.bin`` and ``val.bin``, headerless little-endian uint16, or uint32 if the vocabulary
has more than 65,536 ids, and ``meta.json``, which describes the tokens and how they were made. The ``tokenizer.json`` that
made them, if one did, lies beside them. nanoGPT's own folders, with or without ``meta.pkl``, can be opened too.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scalegpt.config.tokenizer import TOKENIZER_JSON
from scalegpt.data.sidecar import SIDECAR, SPLITS, read_nanogpt_characters, read_sidecar
from scalegpt.data.stored import DTYPES, StoredTokens
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
    """The token file of one split.

    Attributes:
        path: path of the file.
        tokens: the content as a read-only array that reads the file on demand.
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
        try:
            return TokenFile(path, StoredTokens(path, dtype))
        except OSError as error:
            raise UnreadableTokensError(path, error) from None

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
                place = int(np.argmax(chunk >= vocab_size))
                raise InputError(
                    f"token file {one_line(self.path)} holds id {int(chunk[place])} at token offset {first + place}, outside "
                    f"the vocabulary of {vocab_size}; use --vocab_size auto, or prepare the data with its tokenizer"
                )

    def digests(self) -> tuple[str, list[str]]:
        """The SHA-256 of the whole file, and the SHA-256 of each block of :data:`BLOCK_BYTES` bytes, in hex.

        Raises:
            UnreadableTokensError: the file cannot be read.
        """
        whole, blocks = hashlib.sha256(), []
        try:
            with self.path.open("rb") as file:
                while block := file.read(BLOCK_BYTES):
                    whole.update(block)
                    blocks.append(hashlib.sha256(block).hexdigest())
        except OSError as error:
            raise UnreadableTokensError(self.path, error) from None
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
        """SHA-256 over the digests of the tokenizer and both token files, in hex; equal digests mean equal tokens.

        Without a sidecar the files are read to compute it.
        """
        recorded = self.meta.get("files") or {split: self.files[split].digests()[0] for split in SPLITS}
        return digest_of(self.tokenizer.digest, recorded)

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
        """Read both files and compare their SHA-256 with those in the sidecar.

        Raises:
            InputError: a file has changed since it was prepared; the message states the file and where the change is.
        """
        blocks = self.meta.get("blocks", {})
        for split, recorded in self.meta.get("files", {}).items():
            whole, found = self.files[split].digests()
            if whole != recorded:
                width = self.files[split].tokens.dtype.itemsize
                path, place = self.files[split].path, _first_difference(found, blocks.get(split), width)
                raise InputError(f"token file {one_line(path)} has changed since{place}; prepare the data again")

    def _origin(self) -> str:
        sources = self.meta.get("sources", [])
        return one_line(sources[0]["path"] if len(sources) == 1 else self.path)


def digest_of(tokenizer: str, files: dict[str, str]) -> str:
    """Compute :attr:`TokenSet.digest` from a tokenizer's digest and ``files``: split → SHA-256 of its token file."""
    parts = [tokenizer, *(files[split] for split in SPLITS)]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def _first_difference(found: list[str], recorded: Any, width: int) -> str:
    """The token offsets of the first block whose digest differs, for a message; empty if no such block is known.

    ``width`` is the size of an id in bytes.
    """
    if not isinstance(recorded, list) or len(recorded) != len(found) or found == recorded:
        return ""
    index = next(index for index, pair in enumerate(zip(found, recorded, strict=True)) if pair[0] != pair[1])
    tokens = BLOCK_BYTES // width
    return f", first between token offsets {index * tokens} and {(index + 1) * tokens}"


def open_tokens(path: str | Path) -> TokenSet:
    """Open a folder of prepared tokens and check its files' sizes.

    Args:
        path: a folder with ``train.bin`` and ``val.bin``. Without ``meta.json``, nanoGPT is taken to have made it: the
            ids are of characters if there is a ``meta.pkl``, else GPT-2's.

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
    dtype = DTYPES[meta.get("dtype", "uint16")]
    files = {split: TokenFile.open(path / f"{split}.bin", meta.get(f"{split}_tokens"), dtype) for split in SPLITS}
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
