"""Write a tokenizer as the files that Hugging Face libraries read: ``tokenizer.json`` and ``tokenizer_config.json``.

The ids are the same as here, up to two differences that are those libraries' ways. They read the characters of the
end-of-text token in a text as that token, where :meth:`Tokenizer.encode` reads them as ordinary text. And where a ``char``
vocabulary lacks a character, they raise an error of their own.
"""

from collections.abc import Mapping
from typing import Any

from scalegpt.config.tokenizer import TOKENIZER_CONFIG, TOKENIZER_JSON
from scalegpt.data.tokenizers.base import END_OF_TEXT, Tokenizer
from scalegpt.data.tokenizers.gpt2 import GPT2Tokenizer, vocabulary_and_merges
from scalegpt.data.tokenizers.huggingface import HFTokenizer
from scalegpt.data.tokenizers.kept import as_json, config_of
from scalegpt.data.tokenizers.letters import LETTERS
from scalegpt.data.tokenizers.plain import ByteTokenizer, CharTokenizer


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files of a tokenizer for Hugging Face libraries: name → content, ``tokenizer.json`` among them.

    ``AutoTokenizer.from_pretrained`` loads a folder with these files. The vocabulary is the tokenizer's: a model may have
    more embedding rows. Needs no optional package.

    Raises:
        InputError: GPT-2's vocabulary files are not installed.
    """
    if isinstance(tokenizer, HFTokenizer):
        return dict(tokenizer.files)
    if isinstance(tokenizer, GPT2Tokenizer):
        vocabulary, merges = vocabulary_and_merges()
        return _files(byte_level(vocabulary, merges, {END_OF_TEXT: tokenizer.end_of_text}), END_OF_TEXT)
    if isinstance(tokenizer, ByteTokenizer):
        return _files(byte_level(LETTERS, [], {END_OF_TEXT: tokenizer.end_of_text}), END_OF_TEXT)
    assert isinstance(tokenizer, CharTokenizer), tokenizer.kind
    return _files(_characters(tokenizer.characters), None)


def byte_level(vocabulary: Mapping[str, int], merges: list[str], special: dict[str, int | None]) -> dict[str, Any]:
    """The content of ``tokenizer.json`` for a byte-level BPE that splits text by GPT-2's pattern.

    Args:
        vocabulary: token, in :data:`~.letters.LETTERS`, → id.
        merges: pairs of tokens with a space between, in the order in which they are merged.
        special: special token → id.
    """
    part = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": dict(vocabulary), "merges": merges,
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
    return {TOKENIZER_JSON: as_json(document), TOKENIZER_CONFIG: as_json(config_of(end_of_text))}
