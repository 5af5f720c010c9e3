"""Write a tokenizer as the files that Hugging Face libraries read: ``tokenizer.json`` and ``tokenizer_config.json``.

The ids are the same as here, up to two differences that are those libraries' ways. They read the characters of the
end-of-text token in a text as that token, where :meth:`Tokenizer.encode` reads them as ordinary text. And where a ``char``
vocabulary lacks a character, they raise an error of their own.
"""

from collections.abc import Mapping
from typing import Any

from scalegpt.config.tokenizer import TOKENIZER_CONFIG, TOKENIZER_JSON, parse_tokenizer
from scalegpt.data.tokenizers.base import END_OF_TEXT, Tokenizer
from scalegpt.data.tokenizers.gpt2 import GPT2Tokenizer, vocabulary_and_merges
from scalegpt.data.tokenizers.huggingface import HFTokenizer
from scalegpt.data.tokenizers.kept import as_json, config_of
from scalegpt.data.tokenizers.letters import LETTERS
from scalegpt.data.tokenizers.plain import ByteTokenizer, CharTokenizer

_FRAME: dict[str, Any] = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None, "pre_tokenizer": None,
    "post_processor": None, "decoder": None,
}  # fmt: skip
"""A ``tokenizer.json`` without its parts; the package ``tokenizers`` wants all keys."""


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files of a tokenizer for Hugging Face libraries: name → content, ``tokenizer.json`` among them.

    ``AutoTokenizer.from_pretrained`` loads a folder with these files. The vocabulary is the tokenizer's: a model may have
    more embedding rows. Needs no optional package.

    Raises:
        InputError: GPT-2's vocabulary files are not installed.
    """
    if isinstance(tokenizer, HFTokenizer):
        files = dict(tokenizer.files)
        if tokenizer.leaves_out_begin:  # then the model was trained without it
            files[TOKENIZER_JSON] = as_json({**parse_tokenizer(files[TOKENIZER_JSON]), "post_processor": None})
        return files
    if isinstance(tokenizer, GPT2Tokenizer):
        return bpe_files(*vocabulary_and_merges())
    if isinstance(tokenizer, ByteTokenizer):
        return bpe_files({**LETTERS, END_OF_TEXT: tokenizer.vocab_size - 1}, [])
    assert isinstance(tokenizer, CharTokenizer), tokenizer.kind
    return _char_files(tokenizer.characters)


def bpe_files(vocabulary: Mapping[str, int], merges: list[str]) -> dict[str, bytes]:
    """The files of a byte-level BPE that splits text by GPT-2's pattern and ends documents with ``<|endoftext|>``.

    Args:
        vocabulary: token, in :data:`~.letters.LETTERS`, → id; the end-of-text token is among them.
        merges: pairs of tokens with a space between, in the order in which they are merged.
    """
    part = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": dict(vocabulary), "merges": merges,
    }  # fmt: skip
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    end = {"id": vocabulary[END_OF_TEXT], "content": END_OF_TEXT, **plain}
    parts = {"added_tokens": [end], "pre_tokenizer": part, "post_processor": part, "decoder": part}
    return _files({**_FRAME, **parts, "model": model}, END_OF_TEXT)


def _char_files(characters: str) -> dict[str, bytes]:
    each = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
    vocabulary = {character: index for index, character in enumerate(characters)}
    # There is no unknown token of this name, so a lacking character is an error.
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": ""}
    return _files({**_FRAME, "pre_tokenizer": each, "decoder": {"type": "Fuse"}, "model": model}, None)


def _files(document: dict[str, Any], end_of_text: str | None) -> dict[str, bytes]:
    return {TOKENIZER_JSON: as_json(document), TOKENIZER_CONFIG: as_json(config_of(end_of_text))}
