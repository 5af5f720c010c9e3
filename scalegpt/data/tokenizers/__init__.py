"""The tokenizers: GPT-2's byte-pair encoding, bytes, characters, and any ``tokenizer.json``. None needs a network.

:mod:`~scalegpt.data.tokenizers.base` has their interface; :mod:`~scalegpt.data.tokenizers.export` writes them for other
programs.
"""

from scalegpt.data.tokenizers.base import (
    REPLACEMENT,
    StreamDecoder,
    TokenIds,
    Tokenizer,
    code_points,
    dtype_for,
    make_tokenizer,
)
from scalegpt.data.tokenizers.gpt2 import GPT2Tokenizer
from scalegpt.data.tokenizers.huggingface import HFTokenizer, load_tokenizer
from scalegpt.data.tokenizers.plain import ByteTokenizer, CharTokenizer

__all__ = [
    "REPLACEMENT",
    "ByteTokenizer",
    "CharTokenizer",
    "GPT2Tokenizer",
    "HFTokenizer",
    "StreamDecoder",
    "TokenIds",
    "Tokenizer",
    "code_points",
    "dtype_for",
    "load_tokenizer",
    "make_tokenizer",
]
