"""The files of a ``tokenizer.json`` and those beside it: read, packed into a description, and which token ends a document."""

import base64
import json
import zlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from scalegpt.config.tokenizer import FILE_LIMIT, TOKENIZER_CONFIG, TOKENIZER_JSON
from scalegpt.errors import InputError
from scalegpt.storage import read_bytes
from scalegpt.text import shown

CHAT_TEMPLATE = "chat_template.jinja"

BESIDE = (TOKENIZER_CONFIG, "special_tokens_map.json", CHAT_TEMPLATE)
"""Files that are kept with a ``tokenizer.json`` where they lie beside it: they name special tokens."""

USUAL_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
"""The end-of-text tokens that are recognised where no file beside ``tokenizer.json`` names one."""

_BESIDE_LIMIT = 4 << 20


def files_in(file: Path) -> dict[str, bytes]:
    """A ``tokenizer.json`` and those of :data:`BESIDE` that lie in its folder: name → content.

    Raises:
        InputError: a file is too large.
        OSError: a file cannot be read.
    """
    beside = {name: file.with_name(name) for name in BESIDE}
    found = {name: read_bytes(path, _BESIDE_LIMIT) for name, path in beside.items() if path.exists()}
    return {TOKENIZER_JSON: read_bytes(file, FILE_LIMIT), **found}


def end_named_in(files: Mapping[str, bytes]) -> str | None:
    """The end-of-text token that the files beside ``tokenizer.json`` name; None if they name none."""
    return _named_in(files, "eos_token")


def begin_named_in(files: Mapping[str, bytes]) -> str | None:
    """The begin-of-text token that the files beside ``tokenizer.json`` name; None if they name none."""
    return _named_in(files, "bos_token")


def _named_in(files: Mapping[str, bytes], key: str) -> str | None:
    for name in BESIDE[:2]:
        try:
            values = json.loads(files.get(name, b"{}"))
        except (ValueError, RecursionError):
            raise InputError(f"has a {name} beside it that is not JSON; restore it") from None
        token = values.get(key) if isinstance(values, dict) else None
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str) and content:
            return content
    return None


def naming_end(files: Mapping[str, bytes], end_of_text: str, begin_of_text: str | None = None) -> dict[str, bytes]:
    """The files, with ``eos_token`` in ``tokenizer_config.json`` if they name another end-of-text token or none.

    If there is no ``tokenizer_config.json``, one is made, with ``begin_of_text`` as ``bos_token`` too.
    """
    if end_named_in(files) == end_of_text:
        return dict(files)
    known = json.loads(files.get(TOKENIZER_CONFIG, b"null"))
    config = {**known, "eos_token": end_of_text} if isinstance(known, dict) else config_of(end_of_text, begin_of_text)
    return {**files, TOKENIZER_CONFIG: as_json(config)}


def config_of(end_of_text: str | None, begin_of_text: str | None = None) -> dict[str, Any]:
    """The content of ``tokenizer_config.json``: the class that reads ``tokenizer.json`` as it is, and the special tokens."""
    special = {} if end_of_text is None else {"bos_token": begin_of_text or end_of_text, "eos_token": end_of_text}
    return {**special, "clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}


def as_json(values: dict[str, Any]) -> bytes:
    """A JSON file's content, in UTF-8."""
    return (json.dumps(values, ensure_ascii=False, indent=1) + "\n").encode()


def usual_end(document: dict[str, Any]) -> str:
    """The only one of :data:`USUAL_ENDS` among the special tokens.

    Raises:
        InputError: there is none, or there are several.
    """
    special = [token["content"] for token in document.get("added_tokens") or [] if token.get("special")]
    found = [token for token in USUAL_ENDS if token in special]
    if len(found) == 1:
        return found[0]
    listed = f"; its special tokens are {', '.join(map(shown, special[:8]))}" if special else ""
    raise InputError(
        f"has no eos_token in a {TOKENIZER_CONFIG} beside it, so which token ends a document is not known; name it with "
        f"--end_of_text TOKEN{listed}"
    )


@lru_cache(maxsize=8)
def packed(content: bytes) -> str:
    """A file's content as compressed text, for a description in JSON."""
    return base64.b64encode(zlib.compress(content, 9)).decode()


def unpacked(values: Mapping[Any, Any]) -> dict[str, bytes]:
    """The files in a description.

    Raises:
        InputError: they are not what :func:`packed` made.
    """
    files = {}
    for name in (TOKENIZER_JSON, *BESIDE):
        if name not in values and name != TOKENIZER_JSON:
            continue
        try:
            content = zlib.decompressobj()
            files[name] = content.decompress(base64.b64decode(values[name], validate=True), FILE_LIMIT + 1)
        except (KeyError, TypeError, ValueError, zlib.error) as error:
            raise InputError(f"the kept {name} is damaged ({type(error).__name__}); prepare the data again") from None
        if not content.eof:
            raise InputError(f"the kept {name} is cut short or too large; prepare the data again")
    return files
