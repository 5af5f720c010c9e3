"""The tokenizers that need no vocabulary file: bytes and characters."""

from pathlib import Path
from typing import Any

import numpy as np

from scalegpt.data.tokenizers.base import (
    END_OF_TEXT,
    REPLACEMENT,
    TokenIds,
    Tokenizer,
    code_points,
    without_surrogates,
)
from scalegpt.errors import InputError

MAX_CHARACTERS = 65_535


class ByteTokenizer(Tokenizer):
    """One id per byte of UTF-8, 0 to 255, and id 256 for end-of-text."""

    kind = "byte"
    vocab_size = 257
    end_of_text: int | None = 256

    def encode(self, text: str) -> TokenIds:
        """The text's UTF-8 bytes as ids."""
        return np.frombuffer(without_surrogates(text).encode(), dtype=np.uint8).astype(np.uint16)

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

    @classmethod
    def _from_values(cls, values: dict[str, Any], folder: Path | None) -> "CharTokenizer":  # noqa: ARG003
        if not isinstance(values.get("characters"), str):
            raise InputError("a char tokenizer's description needs its characters; prepare the data again")
        return cls(values["characters"])
