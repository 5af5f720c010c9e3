"""Write a tokenizer as the files that Hugging Face libraries read: ``tokenizer.json`` and ``tokenizer_config.json``.

The ids are the same as here, up to two differences that are those libraries' ways. They read the characters of the
end-of-text token in a text as that token, where :meth:`Tokenizer.encode` reads them as ordinary text. And where a ``char``
vocabulary lacks a character, they raise an error of their own.
"""

import json
from typing import Any

from scalegpt.data.tokenizers.base import END_OF_TEXT, Tokenizer
from scalegpt.data.tokenizers.gpt2 import GPT2Tokenizer, vocabulary_and_merges
from scalegpt.data.tokenizers.plain import ByteTokenizer, CharTokenizer

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"

_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
"""The bytes that byte-level vocabularies write as the Latin-1 character of the same number, as GPT-2's does."""


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files of a tokenizer for Hugging Face libraries: name → content, ``tokenizer.json`` among them.

    ``AutoTokenizer.from_pretrained`` loads a folder with these files. The vocabulary is the tokenizer's: a model may have
    more embedding rows. Needs no optional package.

    Raises:
        InputError: GPT-2's vocabulary files are not installed.
    """
    if isinstance(tokenizer, GPT2Tokenizer):
        vocabulary, merges = vocabulary_and_merges()
        return _files(byte_level(vocabulary, merges, {END_OF_TEXT: tokenizer.end_of_text}), END_OF_TEXT)
    if isinstance(tokenizer, ByteTokenizer):
        letters = {letter: byte for byte, letter in byte_letters().items()}
        return _files(byte_level(letters, [], {END_OF_TEXT: tokenizer.end_of_text}), END_OF_TEXT)
    assert isinstance(tokenizer, CharTokenizer), tokenizer.kind
    return _files(_characters(tokenizer.characters), None)


def byte_letters() -> dict[int, str]:
    """Byte → the character that stands for it in byte-level vocabularies, in the order of the bytes.

    Source: GPT-2's ``bytes_to_unicode``. Printable bytes stand for themselves, the others for U+0100 and following.
    """
    others = iter(range(0x100, 0x200))
    return {byte: chr(byte if byte in _PRINTABLE else next(others)) for byte in range(256)}


def byte_level(vocabulary: dict[str, int], merges: list[str], special: dict[str, int | None]) -> dict[str, Any]:
    """The content of ``tokenizer.json`` for a byte-level BPE that splits text by GPT-2's pattern.

    Args:
        vocabulary: token, in :func:`byte_letters`, → id.
        merges: pairs of tokens with a space between, in the order in which they are merged.
        special: special token → id.
    """
    part = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": vocabulary, "merges": merges,
    }  # fmt: skip
    return _document(model, special, pre_tokenizer=part, post_processor=part, decoder=part)


def _characters(characters: str) -> dict[str, Any]:
    vocabulary = {character: index for index, character in enumerate(characters)}
    each = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
    # There is no unknown token of this name, so a lacking character is an error.
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": ""}
    return _document(model, {}, pre_tokenizer=each, post_processor=None, decoder={"type": "Fuse"})


def _document(model: dict[str, Any], special: dict[str, int | None], **parts: Any) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": number, "content": content, **plain} for content, number in special.items()]
    frame = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None}
    return {**frame, **parts, "model": model}


def _files(document: dict[str, Any], end_of_text: str | None) -> dict[str, bytes]:
    return {TOKENIZER: as_json(document), CONFIG: as_json(config_of(end_of_text))}


def config_of(end_of_text: str | None) -> dict[str, Any]:
    """The content of ``tokenizer_config.json``: the class that reads ``tokenizer.json`` as it is, and the special tokens."""
    special = {} if end_of_text is None else {"bos_token": end_of_text, "eos_token": end_of_text}
    return {**special, "clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}


def as_json(values: dict[str, Any]) -> bytes:
    """A JSON file's content, in UTF-8."""
    return (json.dumps(values, ensure_ascii=False, indent=1) + "\n").encode()
