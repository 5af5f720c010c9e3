"""Which tokenizer a run has: GPT-2's, bytes, characters, or a ``tokenizer.json``; and the size of its vocabulary."""

import json
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from scalegpt.errors import InputError, nearest
from scalegpt.storage import NotPlainError, read_bytes, read_text
from scalegpt.text import one_line, shown

TOKENS = {"gpt2": 50257, "byte": 257}
"""Tokenizer → the size of its vocabulary. For the char tokenizer the text decides it."""

NAMES = (*TOKENS, "char")
"""The tokenizers with a name. Any other value of the setting is a path."""

TOKENIZER_JSON, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"

FILE_LIMIT = 128 << 20
"""The largest ``tokenizer.json`` that is read, in bytes. The largest files in common use have 35 MB."""

SIDECAR, SIDECAR_LIMIT = "meta.json", 256 << 20
"""The file that describes prepared tokens; the largest that is read, in bytes: earlier releases listed every source in it."""

LARGEST_VOCABULARY = 10_000_000
PADDED_TO = 128
"""The model pads a learned vocabulary, for example one of byte-pair encoding, to a multiple of this."""

_OTHER_VOCABULARIES = {
    "tokenizer.model": "a SentencePiece model", "spiece.model": "a SentencePiece model", "vocab.json": "the older vocab.json",
    "vocab.txt": "the older vocab.txt",
}  # fmt: skip


def is_file(tokenizer: str) -> bool:
    """Whether the setting ``tokenizer`` is the path of a ``tokenizer.json`` or of its folder, not a name."""
    return tokenizer not in NAMES


def same_kind(one: Any, other: Any) -> bool:
    """Whether two values of the setting are the same name, or both are paths.

    The contents of the files are compared elsewhere.
    """
    return one == other or (isinstance(one, str) and isinstance(other, str) and is_file(one) and is_file(other))


def check_tokenizer(tokenizer: str) -> None:
    """Refuse a word that is close to a name and is not an existing path, since it was probably mistyped.

    Other paths are checked when they are read, since the run may have a copy of a file that is gone.

    Raises:
        InputError: the message has the name that was probably meant.
    """
    hint = nearest(tokenizer, NAMES)
    if is_file(tokenizer) and "/" not in tokenizer and "did you mean" in hint and not _exists(tokenizer):
        raise InputError(f"{shown(tokenizer)} is not a value of tokenizer, nor the path of a tokenizer.json{hint}")


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def tokenizer_file(tokenizer: str) -> Path:
    """The path of the ``tokenizer.json`` that the setting names, by itself or by its folder.

    Raises:
        InputError: there is no such file, or the folder holds a tokenizer in another form.
    """
    path = Path(tokenizer)
    try:
        if not path.is_dir():
            if path.exists():
                return path
            raise InputError(
                f"tokenizer {one_line(path)} does not exist; give {', '.join(NAMES)}, or the path of a "
                "tokenizer.json or "
                "of its folder (nothing is downloaded)"
            )
        if (path / TOKENIZER_JSON).exists():
            return path / TOKENIZER_JSON
        found = next((name for name in _OTHER_VOCABULARIES if (path / name).exists()), None)
    except OSError as error:
        raise InputError(f"tokenizer {one_line(path)} cannot be read: {error.strerror}; make it readable") from None
    if found is None:
        raise InputError(f"tokenizer {one_line(path)} is a folder without a tokenizer.json; name another")
    raise InputError(
        f"tokenizer {one_line(path)} holds {_OTHER_VOCABULARIES[found]} ({found}) and no tokenizer.json; make one with "
        "transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(OTHER)"
    )


def read_tokenizer(path: Path) -> bytes:
    """The content of a ``tokenizer.json``.

    Raises:
        InputError: the file is missing, cannot be read, or is larger than :data:`FILE_LIMIT`.
    """
    try:
        return read_bytes(path, FILE_LIMIT)
    except OSError as error:
        raise InputError(f"tokenizer {one_line(path)} cannot be read: {error.strerror}") from None
    except NotPlainError:
        raise InputError(f"tokenizer {one_line(path)} is not a plain file; name a tokenizer.json") from None


@lru_cache(maxsize=4)
def parse_tokenizer(content: bytes) -> dict[str, Any]:
    """The object in a ``tokenizer.json``, in which ``model`` is an object; do not change it.

    Raises:
        InputError: the content is something else. The message says what, and can follow the file's name.
    """
    try:
        document = json.loads(content)
    except RecursionError:
        raise InputError("is not a tokenizer.json: it nests too deep") from None
    except ValueError as error:  # not UTF-8, or not JSON
        raise InputError(f"is not JSON: {one_line(str(error))}; name a tokenizer.json") from None
    if not isinstance(document, dict) or not isinstance(document.get("model"), dict):
        raise InputError("is not a tokenizer.json: it has no object 'model'; name another file")
    return document


def vocabulary(document: dict[str, Any]) -> dict[str, int]:
    """Token → id, of all tokens in a ``tokenizer.json``, added ones included; there is at least one.

    Raises:
        InputError: the vocabulary is missing or malformed. The message says what, and can follow the file's name.
    """
    listed, added = document["model"].get("vocab"), document.get("added_tokens") or []
    try:
        # A Unigram model lists pairs of a token and its score; other models have an object of ids.
        pairs = (
            listed.items() if isinstance(listed, dict) else ((entry[0], number) for number, entry in enumerate(listed))
        )
        ids = dict(chain(pairs, ((token["content"], token["id"]) for token in added)))
        largest = max(ids.values())
        is_right = all(type(number) is int and number >= 0 for number in ids.values()) and all(
            isinstance(token, str) for token in ids
        )
    except (TypeError, KeyError, IndexError, ValueError):
        is_right, ids, largest = False, {}, 0
    if not is_right or largest >= LARGEST_VOCABULARY:
        raise InputError(
            f"has no vocabulary of tokens with ids from 0 to {LARGEST_VOCABULARY - 1:,}; name another tokenizer.json"
        )
    return ids


def vocabulary_size(tokenizer: str) -> int:
    """The number of ids of the ``tokenizer.json`` that the setting names: the largest id plus one.

    Raises:
        InputError: there is no such file, or it is malformed.
    """
    path = tokenizer_file(tokenizer)
    content = read_tokenizer(path)
    try:
        return 1 + max(vocabulary(parse_tokenizer(content)).values())
    except InputError as error:
        raise InputError(f"tokenizer {one_line(path)} {error}") from None


class PreparedWith(NamedTuple):
    """The tokenizer of prepared tokens.

    Attributes:
        setting: the setting ``tokenizer``: a name, or the folder of the tokens, which holds the ``tokenizer.json``.
        size: the number of its ids.
    """

    setting: str
    size: int


def prepared_with(folder: str) -> PreparedWith | None:
    """The tokenizer of the tokens that ScaleGPT prepared in a folder, from the sidecar ``meta.json`` alone.

    None for anything else: text, files of other programs, a folder of another machine, and a damaged sidecar, which the
    trainer reports.
    """
    try:
        meta = json.loads(read_text(Path(folder) / SIDECAR, SIDECAR_LIMIT))
        kind, size = meta["tokenizer"]["kind"], meta["tokenizer"]["vocab_size"]
        has_file = (Path(folder) / TOKENIZER_JSON).is_file()
    except (OSError, ValueError, KeyError, TypeError, RecursionError, InputError, NotPlainError):
        return None
    if type(size) is not int or not 0 < size <= LARGEST_VOCABULARY or not (kind in NAMES or has_file):
        return None
    return PreparedWith(kind if kind in NAMES else folder, size)


def padded_vocabulary(size: int) -> int:
    """The vocabulary of a model for a tokenizer of ``size`` ids: padded for a faster matmul of the head.

    The added ids never occur in data. GPT-2's 50,257 become 50,304. The vocabularies of bytes and characters are not padded.
    """
    return -(-size // PADDED_TO) * PADDED_TO
