"""Token files: nanoGPT's format with a JSON sidecar.

A folder of prepared tokens holds ``train.bin`` and ``val.bin``, headerless little-endian uint16, and ``meta.json``,
which says what they hold and how they were made. nanoGPT's own folders, with ``meta.pkl`` or without, open as well.
"""

import hashlib
import json
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scalegpt.data.stored import DTYPE, StoredTokens
from scalegpt.data.tokenizers import CharTokenizer, Tokenizer, make_tokenizer
from scalegpt.errors import InputError

FORMAT = "scalegpt-tokens"
VERSION = 1
SPLITS = ("train", "val")
SIDECAR = "meta.json"

BLOCK_BYTES = 4 << 20
"""Each so many bytes of a file have a digest of their own in the sidecar, so that a change can be found."""

_CHUNK_TOKENS = 1 << 22
_MAX_PICKLE_BYTES = 64 << 20
_PLAIN_TYPES = {"dict", "list", "tuple", "set", "frozenset", "str", "int"}


@dataclass(frozen=True, eq=False)
class TokenFile:
    """One split's tokens.

    Attributes:
        path: of the file.
        tokens: what is asked for is read from the disk.

    """

    path: Path
    tokens: StoredTokens

    @staticmethod
    def open(path: Path, expected: int | None = None) -> "TokenFile":
        """Open a file of tokens.

        Args:
            path: of the file.
            expected: how many tokens the sidecar says it holds, where there is one.

        Raises:
            InputError: it is missing, empty, or not of the size that it should be.

        """
        try:
            size = path.stat().st_size
        except OSError as error:
            raise InputError(f"token file {path}: {error.strerror}; prepare the data again") from None
        if expected is not None and size != expected * DTYPE.itemsize:
            raise InputError(
                f"token file {path} holds {size} bytes where its {SIDECAR} says {expected * DTYPE.itemsize}: it "
                f"{_how_much(size // DTYPE.itemsize, expected)}; prepare the data again"
            )
        if size == 0:
            raise InputError(f"token file {path} is empty; prepare the data again")
        if size % DTYPE.itemsize:
            raise InputError(
                f"token file {path} holds {size} bytes, an odd number: it is not uint16 tokens, or cut short"
            )
        try:
            return TokenFile(path, StoredTokens(path))
        except OSError as error:
            raise InputError(f"token file {path} cannot be read: {error.strerror}") from None

    def check_vocabulary(self, vocab_size: int) -> None:
        """Read all tokens, in chunks, and refuse the first that is not below ``vocab_size``.

        Raises:
            InputError: names the file, the token's place and the id.

        """
        if vocab_size > np.iinfo(DTYPE).max:
            return
        for first in range(0, len(self.tokens), _CHUNK_TOKENS):
            chunk = self.tokens[first : first + _CHUNK_TOKENS]
            if chunk.max() >= vocab_size:
                place = int(np.argmax(chunk >= vocab_size))
                raise InputError(
                    f"token file {self.path} holds id {int(chunk[place])} at token offset {first + place}, past the "
                    f"vocabulary of {vocab_size}; use --vocab_size auto, or prepare the data with its tokenizer"
                )

    def sha256(self) -> str:
        """Return the SHA-256 of the file's bytes, in hex."""
        return self.digests()[0]

    def digests(self) -> tuple[str, list[str]]:
        """Return the SHA-256 of the file's bytes, and one of each :data:`BLOCK_BYTES` of them, in hex.

        Raises:
            RunError: the file cannot be read any more.

        """
        whole, blocks, tokens = hashlib.sha256(), [], BLOCK_BYTES // DTYPE.itemsize
        for first in range(0, len(self.tokens), tokens):
            block = self.tokens[first : first + tokens].data
            whole.update(block)
            blocks.append(hashlib.sha256(block).hexdigest())
        return whole.hexdigest(), blocks


def _how_much(tokens: int, expected: int) -> str:
    if tokens < expected:
        return f"was cut short at token offset {tokens}"
    return f"goes on past token offset {expected}, where it ended"


@dataclass(frozen=True, eq=False)
class TokenSet:
    """A folder of prepared tokens.

    Attributes:
        path: the folder.
        files: ``train`` and ``val``.
        tokenizer: what made the ids.
        meta: the sidecar; empty for a folder of nanoGPT's.

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
    def skipped(self) -> dict[str, int]:
        """How many files of the folders given were left out, by reason."""
        return dict(self.meta.get("skipped", {}))

    @property
    def digest(self) -> str:
        """SHA-256 over the tokenizer and both files: equal digests mean equal tokens. nanoGPT's are read for it."""
        recorded = self.meta.get("files") or {split: self.files[split].sha256() for split in SPLITS}
        parts = [self.tokenizer.digest, *(recorded[split] for split in SPLITS)]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse tokens that a model of that vocabulary has no embedding for.

        Raises:
            InputError: names the file, the token's place and the id.

        """
        for split in SPLITS:
            self.files[split].check_vocabulary(vocab_size)

    def check_block_size(self, block_size: int) -> None:
        """Refuse data that does not fill one window of ``block_size + 1`` tokens in each split.

        Raises:
            InputError: names the split, its tokens, and what would help.

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
        """Read both files and compare them with what the sidecar recorded.

        Raises:
            InputError: a file has changed since it was prepared; names the file, and where the change lies.

        """
        blocks = self.meta.get("blocks", {})
        for split, recorded in self.meta.get("files", {}).items():
            whole, found = self.files[split].digests()
            if whole != recorded:
                path, place = self.files[split].path, _first_difference(found, blocks.get(split))
                raise InputError(f"token file {path} has changed since{place}; prepare the data again")

    def _origin(self) -> str:
        sources = self.meta.get("sources", [])
        return str(sources[0]["path"]) if len(sources) == 1 else str(self.path)


def _first_difference(found: list[str], recorded: Any) -> str:
    """Where the first block lies that is not what was recorded, in words; nothing where blocks were not recorded."""
    if not isinstance(recorded, list) or len(recorded) != len(found) or found == recorded:
        return ""
    index = next(index for index, pair in enumerate(zip(found, recorded, strict=True)) if pair[0] != pair[1])
    tokens = BLOCK_BYTES // DTYPE.itemsize
    return f", first between token offsets {index * tokens} and {(index + 1) * tokens}"


def open_tokens(path: str | Path) -> TokenSet:
    """Open a folder of prepared tokens and check its files' sizes.

    Args:
        path: a folder with ``train.bin`` and ``val.bin``. Without our sidecar it is nanoGPT's: characters where it has
            a ``meta.pkl``, else GPT-2's ids.

    Raises:
        InputError: no such folder, a malformed sidecar, or a file that is missing, cut short, or not tokens.

    """
    path = Path(path)
    if not path.is_dir() or not any(
        (path / name).exists() for name in (SIDECAR, *(f"{split}.bin" for split in SPLITS))
    ):
        raise InputError(f"{path} is not a folder of prepared tokens; make one with scalegpt data prepare")
    meta = _read_sidecar(path / SIDECAR) if (path / SIDECAR).exists() else {}
    files = {split: TokenFile.open(path / f"{split}.bin", meta.get(f"{split}_tokens")) for split in SPLITS}
    return TokenSet(path, files, _tokenizer_of(path, meta), meta)


def _tokenizer_of(path: Path, meta: dict[str, Any]) -> Tokenizer:
    if meta:
        try:
            return Tokenizer.from_dict(meta["tokenizer"])
        except InputError as error:
            raise InputError(f"{path / SIDECAR}: {error}") from None
    pickled = path / "meta.pkl"
    return read_nanogpt_characters(pickled) if pickled.exists() else make_tokenizer("gpt2")


def _read_sidecar(path: Path) -> dict[str, Any]:
    """Parse ``meta.json`` and check the parts that opening needs."""
    remedy = "prepare the data again"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; {remedy}") from None
    except ValueError as error:  # not UTF-8, or not JSON
        raise InputError(f"{path} is not JSON: {error}; {remedy}") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise InputError(f"{path} is not the sidecar of {FORMAT}; {remedy}")
    if meta.get("version") != VERSION or meta.get("dtype") != DTYPE.name:
        raise InputError(
            f"{path} is of version {meta.get('version')} with {meta.get('dtype')}, where this ScaleGPT reads version "
            f"{VERSION} with {DTYPE.name}; {remedy}"
        )
    counts = {f"{split}_tokens": int for split in SPLITS}
    for key, kind in {**counts, "tokenizer": dict, "sources": list, "files": dict}.items():
        if not isinstance(meta.get(key), kind):
            raise InputError(f"{path}: {key} is missing or of the wrong type; {remedy}")
    return meta


class _PlainUnpickler(pickle.Unpickler):
    """Makes containers, text and whole numbers; anything else in a pickle could run code."""

    def find_class(self, module: str, name: str) -> Any:
        """Refuse every class and function except the plain types."""
        if module in {"builtins", "__builtin__"} and name in _PLAIN_TYPES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_nanogpt_characters(path: Path) -> CharTokenizer:
    """Read the vocabulary of a character-level nanoGPT folder from its ``meta.pkl``.

    Raises:
        InputError: it is not such a pickle, or holds more than plain data.

    """
    try:
        if path.stat().st_size > _MAX_PICKLE_BYTES:
            raise InputError(f"{path} is too large for nanoGPT's character table; prepare the text again")
        with path.open("rb") as file:
            meta = _PlainUnpickler(file).load()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    # A damaged pickle can raise nearly anything, by its documentation.
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ImportError,
        ArithmeticError,
        RecursionError,
    ) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not nanoGPT's character table: {error}; prepare the text again") from None
    table = meta.get("itos") if isinstance(meta, dict) else None
    if not isinstance(table, dict) or not _is_character_table(table):
        raise InputError(f"{path} has no table 'itos' of single characters; prepare the text again")
    return CharTokenizer("".join(table[token] for token in range(len(table))))


def _is_character_table(table: dict[Any, Any]) -> bool:
    ids: Iterable[int] = range(len(table))
    return set(table) == set(ids) and all(isinstance(text, str) and len(text) == 1 for text in table.values())
