"""A tokenizer in the form that ``llama.cpp`` reads: byte-level BPE, made from the tokenizer's ``tokenizer.json``."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scalegpt.config.tokenizer import TOKENIZER_CONFIG, TOKENIZER_JSON
from scalegpt.data.tokenizers import Tokenizer
from scalegpt.data.tokenizers.export import tokenizer_files
from scalegpt.data.tokenizers.kept import CHAT_TEMPLATE
from scalegpt.errors import InputError
from scalegpt.export.source import begin_of_text

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""The types of tokens in a GGUF file."""

NEVER = "ÿ þ"
"""A merge of the bytes FF and FE, which UTF-8 never contains. It is needed because a GGUF file cannot have an empty
list of merges."""

_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

SPLITS = {
    f"{_WORD}\\p{{N}}{{1,3}}{_REST}": "llama-bpe",
    f"{_WORD}\\p{{N}}{_REST}": "qwen2",
}
"""The regular expression with which a tokenizer splits text → the name of that split in ``llama.cpp``."""


@dataclass(frozen=True)
class Vocabulary:
    """The vocabulary of a GGUF file.

    Attributes:
        tokens: the tokens, in the order of their ids.
        types: the type of each token.
        merges: pairs of tokens with a space between, in the order in which they are merged.
        split: the name, in ``llama.cpp``, of the way in which text is split before tokens are merged.
        bos, eos: the ids that begin and end a text; None: there is none.
        adds_bos: whether ``bos`` is put before every text.
        chat: the chat template, or a list of objects with ``name`` and ``template``; None: there is none.
    """

    tokens: list[str]
    types: list[int]
    merges: list[str]
    split: str
    bos: int | None
    eos: int | None
    adds_bos: bool = False
    chat: str | list[dict[str, str]] | None = None

    def add_to(self, writer: Any) -> None:
        """Add the vocabulary to a ``gguf.GGUFWriter``."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.split)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges or [NEVER])
        writer.add_add_bos_token(self.adds_bos)
        if self.chat is not None:
            writer.add_chat_template(self.chat)
        if self.bos is not None:
            writer.add_bos_token_id(self.bos)
        if self.eos is not None:
            writer.add_eos_token_id(self.eos)


def vocabulary(tokenizer: Tokenizer, rows: int) -> Vocabulary:
    """The vocabulary of a tokenizer, with unused tokens added until it has as many tokens as the embedding has rows.

    Raises:
        InputError: the tokenizer is not a byte-level BPE, or ``llama.cpp`` has no name for the way in which it splits
            text.
    """
    files = tokenizer_files(tokenizer)
    document = json.loads(files[TOKENIZER_JSON])
    split = _split(document)
    if document["model"].get("type") != "BPE" or split is None:
        raise InputError(
            f"llama.cpp does not read this tokenizer ({tokenizer.kind}): it needs a byte-level BPE that splits text as "
            "GPT-2, Llama 3, Qwen 2 or SmolLM does; use --to hf"
        )
    tokens = [f"[PAD{number}]" for number in range(rows)]
    types = [UNUSED] * rows
    added = {each["id"]: each for each in document.get("added_tokens") or []}
    for token, number in document["model"]["vocab"].items():
        tokens[number], types[number] = token, NORMAL
    for number, each in added.items():
        tokens[number], types[number] = each["content"], CONTROL if each["special"] else USER_DEFINED
    merges = [each if isinstance(each, str) else " ".join(each) for each in document["model"]["merges"]]
    return Vocabulary(
        tokens, types, merges, split, begin_of_text(tokenizer), tokenizer.end_of_text,
        tokenizer.begin_of_text is not None, _chat_template(files),
    )  # fmt: skip


def _chat_template(files: Mapping[str, bytes]) -> str | list[dict[str, str]] | None:
    """The chat template in the tokenizer's files. A separate file has precedence, as in transformers."""
    if CHAT_TEMPLATE in files:
        return files[CHAT_TEMPLATE].decode(errors="replace")
    found = json.loads(files[TOKENIZER_CONFIG]).get("chat_template") if TOKENIZER_CONFIG in files else None
    if isinstance(found, list) and all(
        isinstance(each, dict) and {"name", "template"} <= each.keys() for each in found
    ):
        return found
    return found if isinstance(found, str) else None


def _split(document: dict[str, Any]) -> str | None:
    """The name in ``llama.cpp`` of the way in which a ``tokenizer.json`` splits text; None if there is no name."""
    first = document.get("pre_tokenizer") or {}
    parts = first.get("pretokenizers", [first])
    kinds = [part.get("type") for part in parts]
    if kinds[-1:] != ["ByteLevel"] or parts[-1].get("add_prefix_space"):
        return None
    by_pattern = parts[-1].get("use_regex", True)
    if kinds == ["ByteLevel"]:
        return "gpt-2" if by_pattern else None
    if kinds == ["Digits", "ByteLevel"] and by_pattern and parts[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not by_pattern and parts[0].get("behavior") == "Isolated":
        return SPLITS.get(parts[0].get("pattern", {}).get("Regex"))
    return None
