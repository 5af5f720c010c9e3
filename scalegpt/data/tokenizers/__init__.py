"""The tokenizers: GPT-2's byte-pair encoding, bytes, and characters. None needs a network.

:mod:`~scalegpt.data.tokenizers.base` has their interface; :mod:`~scalegpt.data.tokenizers.export` writes them for other
programs.
"""

from scalegpt.data.tokenizers.base import (
    REPLACEMENT,
    StreamDecoder,
    TokenIds,
    Tokenizer,
    code_points,
    make_tokenizer,
)
from scalegpt.data.tokenizers.gpt2 import GPT2Tokenizer
from scalegpt.data.tokenizers.plain import ByteTokenizer, CharTokenizer

__all__ = [
    "REPLACEMENT",
    "ByteTokenizer",
    "CharTokenizer",
    "GPT2Tokenizer",
    "StreamDecoder",
    "TokenIds",
    "Tokenizer",
    "code_points",
    "make_tokenizer",
]
