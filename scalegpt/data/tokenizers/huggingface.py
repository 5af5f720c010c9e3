"""A ``tokenizer.json`` of Hugging Face, encoded and decoded by the package ``tokenizers``, an optional extra."""

import hashlib
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Any

import numpy as np

from scalegpt.config.tokenizer import (
    TOKENIZER_JSON,
    padded_vocabulary,
    parse_tokenizer,
    read_tokenizer,
    tokenizer_file,
    vocabulary,
)
from scalegpt.data.tokenizers.base import REPLACEMENT, StreamDecoder, TokenIds, Tokenizer, without_surrogates
from scalegpt.data.tokenizers.fast import FastEncoder, fast_encoder
from scalegpt.data.tokenizers.kept import end_named_in, files_in, naming_end, packed, unpacked, usual_end
from scalegpt.data.tokenizers.letters import LETTERS, bytes_of
from scalegpt.errors import InputError
from scalegpt.text import brief, one_line, shown

CONTEXT = 64
"""Characters of the text before a piece that a tokenizer may need to encode the piece as a part of its document."""

FAST_FROM = 1 << 18
"""From this many characters of text on it pays to look whether tiktoken gives the same ids (:mod:`~.fast`)."""

_PARALLELISM = "TOKENIZERS_PARALLELISM"
_log = logging.getLogger(__name__)
_making = Lock()


class HFTokenizer(Tokenizer):
    """The tokenizer of a ``tokenizer.json``.

    Args:
        files: ``tokenizer.json``, and those of :data:`BESIDE` that there are: name → content.
        end_of_text: the token that ends a document; None: the one that the files name.
        begins: whether the token that the files put before every text is used; earlier releases of ScaleGPT left it out.

    Attributes:
        leaves_out_begin: whether the files put a token before every text that is not used.

    Raises:
        InputError: the files are malformed, name no end-of-text token, or need a package that is not installed. The message
            can follow the name of the file.
    """

    kind = "hf"

    def __init__(self, files: Mapping[str, bytes], end_of_text: str | None = None, *, begins: bool = True) -> None:
        content = files[TOKENIZER_JSON]
        document = parse_tokenizer(content)
        ids = vocabulary(document)
        self.vocab_size = 1 + max(ids.values())
        self.ids_per_byte = 0.5 if self.vocab_size >= 4096 else 1.0
        self.end_token = end_of_text or end_named_in(files) or usual_end(document)
        if self.end_token not in ids:
            raise InputError(
                f"has no token {shown(self.end_token)}, which should end documents; name one of its tokens with --end_of_text"
            )
        self.end_of_text: int | None = ids[self.end_token]
        self._sha256 = hashlib.sha256(content).hexdigest()
        self._library = library_of(content)
        self._content, self._seen = content, 0
        self._added = {token["id"]: str(token["content"]) for token in document.get("added_tokens") or []}
        first = self._put_first()
        self.begin_of_text: int | None = first if begins else None
        self.leaves_out_begin = self.begin_of_text != first
        self.files = MappingProxyType(naming_end(files, self.end_token, self.begin_token))
        decoder = document.get("decoder") or {}
        self._is_byte_level = decoder.get("type") == "ByteLevel"
        # Whether a piece of a document needs the text before it: some tokenizers put a space in front of every text.
        self._marks_begin = any(
            self._ids(first + second) != [*self._ids(first), *self._ids(second)]
            for first, second in (("a", " b"), ("a\n", "b"))
        )

    def _put_first(self) -> int | None:
        """The id that the post-processor puts before every text, as transformers does too; None: it puts none there."""
        alone, whole = self._ids("a"), [int(token) for token in self._library.encode("a").ids]
        before = next((whole[:at] for at in range(len(whole)) if whole[at : at + len(alone)] == alone), [])
        if len(before) > 1:
            raise InputError(
                f"puts {len(before)} tokens before every text, where models have one; leave one of them in its "
                "post_processor, or none"
            )
        return before[0] if before else None

    @property
    def begin_token(self) -> str | None:
        """The token of :attr:`begin_of_text`."""
        return None if self.begin_of_text is None else str(self._library.id_to_token(self.begin_of_text))

    @property
    def padded_vocab_size(self) -> int:
        """See :meth:`Tokenizer.padded_vocab_size`."""
        return padded_vocabulary(self.vocab_size)

    def encode(self, text: str) -> TokenIds:
        """See :meth:`Tokenizer.encode`; threads encode in parallel, since ``tokenizers`` releases Python's global lock."""
        return self.encode_after("", text)

    def encode_after(self, before: str, text: str) -> TokenIds:
        """See :meth:`Tokenizer.encode_after`."""
        if not before or not self._marks_begin:
            return self.encode_batch([text])[0]
        text, context = without_surrogates(text), without_surrogates(before[-CONTEXT:])
        known, ids = self._arrays([context, context + text])
        if np.array_equal(ids[: len(known)], known):
            return ids[len(known) :]
        return self._arrays([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[TokenIds]:
        """See :meth:`Tokenizer.encode_batch`."""
        texts = [without_surrogates(text) for text in texts]
        self._seen += sum(map(len, texts))
        encoder = _encoder_of(self._content) if self._seen >= FAST_FROM else None
        found = None if encoder is None else encoder.encode_batch(texts)
        if found is not None:
            return [ids.astype(self.dtype) for ids in found]
        if encoder is None or len(texts) == 1:
            return self._arrays(texts)
        return [ids for text in texts for ids in self.encode_batch([text])]

    def _ids(self, text: str) -> list[int]:
        return [int(token) for token in self._arrays([text])[0]]

    def _arrays(self, texts: list[str]) -> list[TokenIds]:
        try:
            encoded = self._library.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # the package raises no other class; a model without an unknown token refuses words
            raise InputError(f"tokenizer.json cannot encode the text: {brief(error)}") from None
        return [np.array(each.ids, dtype=self.dtype) for each in encoded]

    def token_bytes(self, token: int) -> bytes:
        """See :meth:`Tokenizer.token_bytes`. If ids are not bytes of text in this tokenizer, the text of this one alone."""
        name = self._added.get(token)
        if name is not None:
            return name.encode()
        name = self._library.id_to_token(token) if 0 <= token < self.vocab_size else None
        if name is None:
            return REPLACEMENT.encode()
        return bytes_of(name) if self._is_byte_level else self._text([token]).encode()

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """See :meth:`Tokenizer.decode_bytes`."""
        return super().decode_bytes(ids) if self._is_byte_level else self._text(ids).encode()

    def stream(self) -> StreamDecoder:
        """See :meth:`Tokenizer.stream`."""
        return super().stream() if self._is_byte_level else _TextStream(self)

    def _text(self, ids: Iterable[int]) -> str:
        text: str = self._library.decode([int(token) for token in ids], skip_special_tokens=False)
        return text

    def as_dict(self) -> dict[str, Any]:
        """See :meth:`Tokenizer.as_dict`; the entry ``files`` has the compressed files, so that a checkpoint is complete."""
        files = {name: packed(content) for name, content in self.files.items()}
        start = {} if self.begin_token is None else {"begin_of_text": self.begin_token}
        return {**super().as_dict(), "end_of_text": self.end_token, **start, "files": files}

    def _identity(self) -> dict[str, Any]:
        return {"kind": self.kind, "tokenizer.json": self._sha256, "end_of_text": self.end_of_text}

    @classmethod
    def _from_values(cls, values: dict[str, Any], folder: Path | None) -> "HFTokenizer":
        end, inside = values.get("end_of_text"), values.get("files")
        if not isinstance(end, str) or not isinstance(inside, dict | None) or (inside is None and folder is None):
            raise InputError("the tokenizer's description lacks its files or its end of text; prepare the data again")
        files = unpacked(inside) if inside is not None else files_in(folder / TOKENIZER_JSON)  # type: ignore[operator]
        try:
            return cls(files, end, begins="begin_of_text" in values)
        except InputError as error:
            raise InputError(f"the kept tokenizer.json {error}") from None


class _TextStream(StreamDecoder):
    """Decodes ids one at a time by decoding the last few ids with and without the new one, and comparing the texts."""

    def __init__(self, tokenizer: HFTokenizer) -> None:
        super().__init__(tokenizer)
        self._ids: list[int] = []
        self._first = self._said = (
            0  # the ids from `first` on are decoded together; those before `said` have been returned
        )

    def push(self, token: int) -> str:
        """See :meth:`StreamDecoder.push`."""
        self._ids.append(int(token))
        text = self._new()
        if not text or text.endswith(REPLACEMENT):  # the bytes of a character may come one by one
            return ""
        self._first, self._said = self._said, len(self._ids)
        return text

    def finish(self) -> str:
        """See :meth:`StreamDecoder.finish`."""
        return self._new()

    def _new(self) -> str:
        known = self._tokenizer.decode(self._ids[self._first : self._said])
        return self._tokenizer.decode(self._ids[self._first :])[len(known) :]


def load_tokenizer(path: str, end_of_text: str | None = None) -> HFTokenizer:
    """Read a ``tokenizer.json`` and the files beside it.

    Args:
        path: the file, or its folder.
        end_of_text: the token that ends a document; None: the ``eos_token`` that the files name.

    Raises:
        InputError: there is no such file, it is malformed, no token ends documents, or the package is not installed.
    """
    file = tokenizer_file(path)
    files = {TOKENIZER_JSON: read_tokenizer(file)}
    try:
        # A file of another name may lie beside the files of another tokenizer.
        files |= files_in(file) if file.name == TOKENIZER_JSON else {}
        tokenizer = HFTokenizer(files, end_of_text)
    except OSError as error:
        raise InputError(f"tokenizer {one_line(file)}: a file beside it cannot be read: {error.strerror}") from None
    except InputError as error:
        raise InputError(f"tokenizer {one_line(file)} {error}") from None
    missing = len(set(LETTERS) - vocabulary(parse_tokenizer(files[TOKENIZER_JSON])).keys())
    if tokenizer._is_byte_level and missing:
        _log.warning(
            "tokenizer %s has no token for %d of the 256 bytes, and leaves them out of the text", file, missing
        )
    return tokenizer


def package(*, parallel: bool = False) -> Any:
    """The package ``tokenizers``; without ``parallel``, its own threads are off, since ours call it at the same time.

    Raises:
        InputError: it is not installed.
    """
    os.environ.setdefault(_PARALLELISM, "true" if parallel else "false")
    try:
        import tokenizers
    except ModuleNotFoundError:
        raise InputError("needs the package tokenizers: pip install 'scalegpt[hf]'") from None
    return tokenizers


@lru_cache(maxsize=4)
def library_of(content: bytes) -> Any:
    """The package's tokenizer for the content of a ``tokenizer.json``: without padding or truncation of texts.

    Raises:
        InputError: the package refuses the content, or is not installed. The message can follow the file's name.
    """
    module = package()
    try:
        library = module.Tokenizer.from_str(content.decode())
    except BaseException as error:  # the package raises Exception itself; a panic of its Rust code is no Exception
        if type(error).__module__ != "pyo3_runtime" and not isinstance(error, Exception):
            raise
        raise InputError(f"is not a tokenizer.json that the package tokenizers reads: {brief(error)}") from None
    library.no_padding()
    library.no_truncation()
    library.encode_special_tokens = True  # their characters in a text are ordinary text
    return library


def _encoder_of(content: bytes) -> FastEncoder | None:
    """The fast encoder for the content of a ``tokenizer.json``, made once; None if it has none."""
    with _making:  # several threads encode
        return _made_encoder(content)


@lru_cache(maxsize=4)
def _made_encoder(content: bytes) -> FastEncoder | None:
    document = parse_tokenizer(content)
    return fast_encoder(document, vocabulary(document), library_of(content))
