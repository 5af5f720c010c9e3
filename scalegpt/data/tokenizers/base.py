"""What all tokenizers share: text to token ids and back, a description for files, and decoding one id at a time."""

import codecs
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from scalegpt.errors import InputError, nearest
from scalegpt.text import shown

TokenIds = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
"""Token ids [N] in the smallest type that holds all ids of the vocabulary."""

END_OF_TEXT = "<|endoftext|>"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

_KINDS: dict[str, type["Tokenizer"]] = {}


class Tokenizer(ABC):
    """Converts text to token ids and back.

    Attributes:
        kind: ``gpt2``, ``byte``, ``char``, or ``hf`` for a ``tokenizer.json``.
        vocab_size: number of ids, which are in [0, vocab_size).
        end_of_text: the id that ends a document; None if the tokenizer has no such id.
        begin_of_text: the id that the tokenizer puts before every text (BOS); None: it puts none there.
        ids_per_byte: an upper estimate of the ids for a byte of text.
        files: the files that hold the tokenizer, name → content, to be kept beside what is made with it; empty where the kind
            says everything.
    """

    kind: str
    vocab_size: int
    end_of_text: int | None
    begin_of_text: int | None = None
    ids_per_byte: float = 1.0
    files: Mapping[str, bytes] = MappingProxyType({})

    def __init_subclass__(cls) -> None:
        _KINDS[cls.kind] = cls

    @property
    def padded_vocab_size(self) -> int:
        """The vocabulary size of a model with the setting ``vocab_size: auto``; at least :attr:`vocab_size`."""
        return self.vocab_size

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the ids: uint16 where all ids fit, else uint32."""
        return dtype_for(self.vocab_size)

    @abstractmethod
    def encode(self, text: str) -> TokenIds:
        """The ids of the text, of type :attr:`dtype` [N]. The characters of a special token are encoded as ordinary text.

        Raises:
            InputError: the vocabulary lacks a character of the text.
        """

    def encode_after(self, before: str, text: str) -> TokenIds:  # noqa: ARG002 - subclasses use it
        """The ids of ``text`` where it follows ``before`` in a document that is cut at a :func:`~.cutting.cut_place`.

        Some tokenizers treat the beginning of a text in a way of their own.
        """
        return self.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[TokenIds]:
        """The ids of each of several texts, as :meth:`encode` gives them."""
        return [self.encode(text) for text in texts]

    @property
    def document_start(self) -> int | None:
        """The id before each document in prepared data: :attr:`begin_of_text`, unless the document before ends with it."""
        return None if self.begin_of_text == self.end_of_text else self.begin_of_text

    def prompt_ids(self, text: str) -> list[int]:
        """The ids of a text that a model continues, :attr:`begin_of_text` before them.

        For an empty text these are :attr:`begin_of_text` or else :attr:`end_of_text`, or none if there is neither.

        Raises:
            InputError: as for :meth:`encode`.
        """
        first = self.end_of_text if self.begin_of_text is None and not text else self.begin_of_text
        return [*([] if first is None else [first]), *map(int, self.encode(text))]

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes of one id; a replacement character for an id outside the vocabulary."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of a sequence of ids; they need not be valid UTF-8."""
        return b"".join(self.token_bytes(int(token)) for token in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a sequence of ids, with a replacement character where the bytes are not UTF-8."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def stream(self) -> "StreamDecoder":
        """A decoder for ids that arrive one by one."""
        return StreamDecoder(self)

    def _identity(self) -> dict[str, Any]:
        """The properties that determine the ids of a text, as plain JSON values."""
        return {"kind": self.kind}

    @property
    def digest(self) -> str:
        """SHA-256 in hex of the tokenizer's properties; tokenizers with equal digests prepare equal tokens."""
        start = {} if self.begin_of_text is None else {"begin_of_text": self.begin_of_text}
        return _sha256({**self._identity(), **start})

    @property
    def text_digest(self) -> str:
        """As :attr:`digest`, but the same whether or not :attr:`begin_of_text` is put before texts."""
        return _sha256(self._identity())

    def as_dict(self) -> dict[str, Any]:
        """The tokenizer's description as plain JSON values; :meth:`from_dict` makes the tokenizer from it again."""
        return {"kind": self.kind, "vocab_size": self.vocab_size, "digest": self.digest}

    @classmethod
    def _from_values(cls, values: dict[str, Any], folder: Path | None) -> "Tokenizer":  # noqa: ARG003 - subclasses use them
        """Make a tokenizer of this kind from its description; :meth:`from_dict` compares the digest."""
        return cls()

    @staticmethod
    def from_dict(values: Any, folder: Path | None = None) -> "Tokenizer":
        """Make the tokenizer that :meth:`as_dict` described.

        Args:
            values: the description.
            folder: where :attr:`files` are, if the description lacks them.

        Raises:
            InputError: the description is malformed, states another digest than that of the tokenizer made from it, or needs
                a package that is not installed.
            OSError: a file in ``folder`` cannot be read.
        """
        if not isinstance(values, dict) or not isinstance(values.get("kind"), str):
            raise InputError("the tokenizer's description must be an object with a kind; prepare the data again")
        tokenizer = _class_of(values["kind"])._from_values(values, folder)
        if values.get("digest", tokenizer.digest) != tokenizer.digest:
            raise InputError(
                f"the {tokenizer.kind} tokenizer is not the one that the tokens were made with "
                f"(digest {tokenizer.digest[:12]}, not {str(values['digest'])[:12]}); prepare the data again"
            )
        return tokenizer


class StreamDecoder:
    """Decodes ids one at a time, as they are sampled, into whole UTF-8 characters.

    The texts that :meth:`push` returns, followed by that of :meth:`finish`, equal ``tokenizer.decode`` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The characters that this id completes; empty while a character is unfinished."""
        return self._decoder.decode(self._tokenizer.token_bytes(int(token)))

    def finish(self) -> str:
        """End the text: a replacement character if the last character is unfinished, else an empty string."""
        return self._decoder.decode(b"", final=True)


def _sha256(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def dtype_for(vocab_size: int) -> np.dtype[Any]:
    """The little-endian type that holds the ids of a vocabulary: uint16, or uint32 for more than 65,536 ids."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def make_tokenizer(kind: str, characters: str | None = None) -> Tokenizer:
    """Make a tokenizer that has a name; :func:`~.huggingface.load_tokenizer` reads one from a file.

    Args:
        kind: ``gpt2``, ``byte`` or ``char``.
        characters: the vocabulary of a ``char`` tokenizer, in the order of its ids.

    Raises:
        InputError: the kind is unknown, ``char`` has no characters, or GPT-2's vocabulary files are not installed.
    """
    return _class_of(kind)._from_values({"characters": characters}, None)


def _class_of(kind: str) -> type[Tokenizer]:
    if kind not in _KINDS:
        raise InputError(f"tokenizer {shown(kind)} is not known{nearest(kind, _KINDS)}")
    return _KINDS[kind]


def code_points(text: str) -> npt.NDArray[np.uint32]:
    """The text's Unicode code points, one per character, uint32 [N]."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def without_surrogates(text: str) -> str:
    """Replace lone surrogates, which stand for bytes of the command line that are not in the system's encoding."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
