"""The sidecar, which describes the token files beside it: our ``meta.json``, or nanoGPT's ``meta.pkl``.

Both kinds may come from strangers, so sizes, types and bounds are checked before any value is used.
"""

import io
import json
import math
import pickle
import pickletools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from scalegpt.config.tokenizer import SIDECAR_LIMIT
from scalegpt.data.stored import DTYPES
from scalegpt.data.tokenizers import CharTokenizer
from scalegpt.errors import InputError
from scalegpt.storage import read_bytes, read_text
from scalegpt.text import one_line, shown

FORMAT = "scalegpt-tokens"
VERSION, SHARDED = 1, 2
"""Version of a sidecar whose splits have a file each, and of one that lists the shards of each split."""

SPLITS = ("train", "val")
FIRST_FILES = ("train.bin", "train_00000.bin")
"""The first training file of a folder of prepared tokens: of one in one file, and of one in several."""

_PICKLE_LIMIT = 16 << 20
_MOST_TOKENS = 1 << 48
_PLAIN_OPCODES = frozenset({
    "PROTO", "FRAME", "MARK", "STOP", "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1",
    "FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE",
    "BINUNICODE8", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "LIST", "APPEND", "APPENDS", "PUT", "BINPUT",
    "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET",
})  # fmt: skip
"""Pickle opcodes of dictionaries, lists, text and numbers. Tuples are excluded: hashing nested ones can take forever."""

_REMEDY = "prepare the data again"
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.bin")


@dataclass(frozen=True)
class Shard:
    """A token file beside the sidecar, as the sidecar describes it.

    Attributes:
        name: the file's name in the folder.
        tokens: number of tokens.
        sha256: SHA-256 of the file, in hex.
        blocks: SHA-256 of each block (:data:`scalegpt.data.token_file.BLOCK_BYTES`) of the file, in hex; None: not recorded.
    """

    name: str
    tokens: int
    sha256: str
    blocks: list[str] | None = None


def shards_of(meta: dict[str, Any]) -> dict[str, list[Shard]]:
    """The token files that a sidecar describes: split → its shards in order."""
    if meta["version"] == VERSION:
        blocks = meta.get("blocks", {})
        return {
            split: [Shard(f"{split}.bin", meta[f"{split}_tokens"], meta["files"][split], blocks.get(split))]
            for split in SPLITS
        }
    known = ("name", "tokens", "sha256", "blocks")
    return {
        split: [Shard(**{key: each[key] for key in known if key in each}) for each in meta["shards"][split]]
        for split in SPLITS
    }


def joined_digest(digests: Iterable[str]) -> str:
    """The digest of a split in several files from their SHA-256 in hex, in order; of one file, that file's SHA-256."""
    first, *others = digests
    return sha256(" ".join((first, *others)).encode()).hexdigest() if others else first


def recorded_digests(meta: dict[str, Any]) -> dict[str, str]:
    """Split → the digest of its tokens (:func:`joined_digest`), as a sidecar records it."""
    return {split: joined_digest(shard.sha256 for shard in shards) for split, shards in shards_of(meta).items()}


def read_sidecar(path: Path) -> dict[str, Any]:
    """Parse ``meta.json``, and check the type and bounds of every entry that is used.

    Raises:
        InputError: the file is not a sidecar of ScaleGPT, or an entry is wrong; the message names the entry.
        OSError: the file cannot be read.
    """
    name = one_line(path)
    try:
        meta = json.loads(read_text(path, SIDECAR_LIMIT))
    except RecursionError:
        raise InputError(f"{name} nests too deep for a sidecar; {_REMEDY}") from None
    except InputError:
        raise
    except ValueError as error:  # not UTF-8, or not JSON
        raise InputError(f"{name} is not JSON: {error}; {_REMEDY}") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise InputError(f"{name} is not the sidecar of {FORMAT}; {_REMEDY}")
    version = meta.get("version")
    if type(version) is not int or version not in {VERSION, SHARDED} or meta.get("dtype") not in tuple(DTYPES):
        raise InputError(
            f"{name} is of version {shown(version)} with {shown(meta.get('dtype'))}, where this ScaleGPT reads "
            f"versions {VERSION} and {SHARDED} with {' or '.join(DTYPES)}; {_REMEDY}"
        )
    needed = _NEEDED | {"shards" if version == SHARDED else "files"}
    for key, is_right in _PARTS.items():
        if (key in meta or key in needed) and not is_right(meta.get(key)):
            raise InputError(f"{name}: {key} is missing, of the wrong type or out of bounds; {_REMEDY}")
    for split, shards in shards_of(meta).items():
        if sum(shard.tokens for shard in shards) != meta[f"{split}_tokens"]:
            raise InputError(f"{name}: {split}_tokens is not the sum of the tokens of its shards; {_REMEDY}")
    return meta


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST_TOKENS


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list_of(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(is_right, value))


def _is_source(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _is_text(value.get("path"))
        and _is_count(value.get("bytes"))
        and _is_text(value.get("encoding", ""))
    )


def _is_split(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    fraction = value.get("val_fraction", 0.0)
    is_number = isinstance(fraction, int | float) and not isinstance(fraction, bool)
    return _is_text(value.get("method", "")) and is_number and math.isfinite(fraction) and 0 <= fraction <= 1


def _is_by_split(is_right: Callable[[Any], bool], *, whole: bool) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, dict)
        and set(value) <= set(SPLITS)
        and (not whole or set(value) == set(SPLITS))
        and all(map(is_right, value.values()))
    )


def _is_tally(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_count, value.values()))


def _is_shard(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _is_text(value.get("name"))
        and _SHARD_NAME.fullmatch(value["name"]) is not None
        and _is_count(value.get("tokens"))
        and _is_text(value.get("sha256"))
        and _is_list_of(_is_text)(value.get("blocks", []))
    )


def _is_shard_list(value: Any) -> bool:
    """Whether a value lists at least one shard, each file once."""
    is_list = _is_list_of(_is_shard)(value) and bool(value)
    return is_list and len({shard["name"] for shard in value}) == len(value)


_NEEDED = frozenset({*(f"{split}_tokens" for split in SPLITS), "tokenizer", "sources"})
_PARTS: dict[str, Callable[[Any], bool]] = {
    **{f"{split}_tokens": _is_count for split in SPLITS},
    "tokenizer": lambda value: isinstance(value, dict),
    "sources": _is_list_of(_is_source),
    "files": _is_by_split(_is_text, whole=True),
    "blocks": _is_by_split(_is_list_of(_is_text), whole=False),
    "shards": _is_by_split(_is_shard_list, whole=True),
    "skipped": _is_tally,
    "split": _is_split,
    "documents": _is_count,
    "bytes": _is_count,
    "encoding": _is_text,
    "encodings": _is_list_of(_is_text),
    "key": _is_text,
}
"""Entry of a sidecar that is used → the check of its value."""


class _PlainUnpickler(pickle.Unpickler):
    """Unpickles only dictionaries, lists, text and numbers, since classes and functions in a pickle could run code."""

    def find_class(self, module: str, name: str) -> Any:
        """Refuse every class and function."""
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_nanogpt_characters(path: Path) -> CharTokenizer:
    """Read the vocabulary of a character-level nanoGPT folder from its ``meta.pkl``.

    Raises:
        InputError: the file has no table of characters, or is not a pickle of plain data.
        OSError: the file cannot be read.
    """
    name = one_line(path)
    content = read_bytes(path, _PICKLE_LIMIT)
    try:
        _check_pickle(content)
        meta = _PlainUnpickler(io.BytesIO(content)).load()
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
        reason = one_line(str(error)[:200])
        raise InputError(f"{name} is not nanoGPT's character table: {reason}; prepare the text again") from None
    table = meta.get("itos") if isinstance(meta, dict) else None
    if not isinstance(table, dict) or not _is_character_table(table):
        raise InputError(f"{name} has no table 'itos' of single characters; prepare the text again")
    try:
        return CharTokenizer("".join(table[token] for token in range(len(table))))
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def _check_pickle(content: bytes) -> None:
    """Refuse a pickle with opcodes that plain data does not need, or with memo indices too large for its size."""
    texts = ["", ""]
    for opcode, argument, _ in pickletools.genops(io.BytesIO(content)):  # refuses lengths past the end
        if opcode.name not in _PLAIN_OPCODES:
            asked = str(argument).replace(" ", ".") if opcode.name == "GLOBAL" else ".".join(texts)
            what = f"asks for {asked}" if "GLOBAL" in opcode.name else f"holds the opcode {opcode.name}"
            raise ValueError(f"it {what}")
        if opcode.name.endswith("PUT") and not 0 <= (argument or 0) <= len(content):
            raise ValueError("it numbers more objects than it can hold")
        if isinstance(argument, str):
            texts = [texts[1], argument[:100]]


def _is_character_table(table: dict[Any, Any]) -> bool:
    return set(table) == set(range(len(table))) and all(
        isinstance(text, str) and len(text) == 1 for text in table.values()
    )
