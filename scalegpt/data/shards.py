"""Token files: nanoGPT's format with a JSON sidecar.

A folder of prepared tokens holds ``train.bin`` and ``val.bin``, headerless little-endian uint16, or uint32 if the vocabulary
has more than 65,536 ids, and ``meta.json``, which describes the tokens and how they were made. A large one has several such
files for a split, which ``meta.json`` lists in order. The ``tokenizer.json`` that made the tokens, if one did, lies beside
them. nanoGPT's own folders, with or without ``meta.pkl``, can be opened too.
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalegpt.config.tokenizer import SIDECAR, TOKENIZER_JSON
from scalegpt.data import token_file
from scalegpt.data.sidecar import (
    FIRST_FILES,
    SPLITS,
    read_nanogpt_characters,
    read_sidecar,
    recorded_digests,
    shards_of,
)
from scalegpt.data.stored import DTYPES, StoredTokens
from scalegpt.data.token_file import Progress, TokenFile, UnreadableTokensError, chunks_of, digests_of
from scalegpt.data.tokenizers import Tokenizer, make_tokenizer
from scalegpt.errors import InputError
from scalegpt.text import one_line


@dataclass(frozen=True, eq=False)
class TokenSet:
    """Prepared tokens.

    Attributes:
        path: their folder; of another program's tokens, the path that the user named.
        files: split (``train`` or ``val``) → its token file.
        tokenizer: the tokenizer that made the ids.
        meta: content of ``meta.json``; empty for tokens that another program made.
        origin: words on the other program's files and on what is held out of them; empty for ScaleGPT's and nanoGPT's.
        checks: what else :meth:`check_contents` calls: it reads what the other program's files say beside the tokens.
    """

    path: Path
    files: dict[str, TokenFile]
    tokenizer: Tokenizer
    meta: dict[str, Any]
    origin: str = ""
    checks: tuple[Callable[[], None], ...] = ()

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
        return digest_of(self.tokenizer.digest, {split: self.files[split].digest for split in SPLITS})

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

    def check_document_ends(self) -> None:
        """Check that the training tokens hold the tokenizer's end-of-text token; they are read up to the first.

        Raises:
            InputError: they do not, so that documents cannot be told apart.
        """
        end = self.tokenizer.end_of_text
        if not any((chunk == end).any() for chunk in chunks_of(self.train)):
            raise InputError(
                f"packing documents needs the token that ends a document (id {end}), and {one_line(self.path)} has none; "
                "write it after each document (Megatron: --append-eod), or use --packing contiguous"
            )

    def check_contents(self, progress: Progress | None = None) -> None:
        """Read all files whole, and compare their SHA-256 with those in the sidecar; of another program's, check the indices.

        Args:
            progress: called now and then with the bytes of a split read so far and in all; if it raises, reading ends.

        Raises:
            InputError: a file has changed since it was prepared; the message states the file and where the change is.
        """
        for check in self.checks:
            check()
        shards = shards_of(self.meta) if self.meta else {}
        for split, file in self.files.items():
            found = file.scanned(progress)
            for shard, part, (whole, _) in zip(shards.get(split, ()), file.tokens.parts, found, strict=bool(shards)):
                if whole != shard.sha256:
                    place = _first_difference(digests_of(part)[1], shard.blocks, part.dtype.itemsize)
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
    tokens = token_file.BLOCK_BYTES // width
    return f", first between token offsets {index * tokens} and {(index + 1) * tokens}"


def _gpt2() -> Tokenizer:
    return make_tokenizer("gpt2")


def open_tokens(path: str | Path, unnamed: Callable[[], Tokenizer] = _gpt2) -> TokenSet:
    """Open a folder of prepared tokens and check its files' sizes.

    Args:
        path: a folder with ``train.bin`` and ``val.bin``, or with the files that its ``meta.json`` lists. Without
            ``meta.json``, nanoGPT is taken to have made it: the ids are of characters if there is a ``meta.pkl``.
        unnamed: makes the tokenizer of nanoGPT's other folders, which do not say what it is; it decides the size of an id.

    Raises:
        InputError: there is no such folder, the sidecar is malformed, or a token file is missing, or not of whole ids.
    """
    path = Path(path)
    try:
        names = set(os.listdir(path))  # noqa: PTH208
    except (FileNotFoundError, NotADirectoryError):
        names = set()
    except OSError as error:
        raise UnreadableTokensError(path, error) from None
    if names.isdisjoint({SIDECAR, *FIRST_FILES, "val.bin"}):
        raise InputError(f"{one_line(path)} is not a folder of prepared tokens; make one with scalegpt data prepare")
    try:
        meta = read_sidecar(path / SIDECAR) if SIDECAR in names else {}
    except OSError as error:
        raise UnreadableTokensError(path / SIDECAR, error) from None
    if not meta:
        tokenizer = _characters_of(path) if "meta.pkl" in names else unnamed()
        files = {split: TokenFile.open(path / f"{split}.bin", dtype=tokenizer.dtype) for split in SPLITS}
        return TokenSet(path, files, tokenizer, {})
    dtype = DTYPES[meta["dtype"]]
    files = {split: TokenFile.open_shards(path, shards, dtype) for split, shards in shards_of(meta).items()}
    try:
        return TokenSet(path, files, Tokenizer.from_dict(meta["tokenizer"], path), meta)
    except OSError as error:
        raise UnreadableTokensError(path / TOKENIZER_JSON, error) from None
    except InputError as error:
        raise InputError(f"{one_line(path / SIDECAR)}: {error}") from None


def _characters_of(path: Path) -> Tokenizer:
    try:
        return read_nanogpt_characters(path / "meta.pkl")
    except OSError as error:
        raise UnreadableTokensError(path / "meta.pkl", error) from None
