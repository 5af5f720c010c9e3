"""Small tokenizers of Hugging Face's kinds, trained here on a text of ours."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from scalegpt import storage

PROSE = "The cat's 1,234 hats – don't they look   odd?\n\n\tNo! \r\n 日本語, è, 😀 end!\nOne more line; two  words.\nThe cat"
TEXT = PROSE * 3 + Path(storage.__file__).read_text(encoding="utf-8") + PROSE
END = "<|endoftext|>"

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KINDS = ("gpt2_like", "llama3_like", "qwen_like", "smollm2_like", "llama2_like", "unigram", "wordpiece")
BYTE_LEVEL = KINDS[:4]


@cache
def content(kind: str) -> str:
    """The content of a ``tokenizer.json`` of a kind."""
    library = pytest.importorskip("tokenizers")
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    if kind in BYTE_LEVEL:
        made = library.Tokenizer(models.BPE())
        if kind == "gpt2_like":
            made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        elif kind == "smollm2_like":
            made.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
        else:
            split = pre_tokenizers.Split(library.Regex(LLAMA3), "isolated")
            made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
        if kind == "qwen_like":
            made.normalizer = normalizers.NFC()
        made.decoder = decoders.ByteLevel()
        made.post_processor = processors.ByteLevel(trim_offsets=False)
        trainer: Any = trainers.BpeTrainer(
            vocab_size=600, special_tokens=[END], initial_alphabet=letters, show_progress=False
        )
    elif kind == "llama2_like":
        made = library.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        made.pre_tokenizer = pre_tokenizers.Split(
            "▁", "merged_with_next"
        )  # only while it is trained, as SentencePiece does
        special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False, limit_alphabet=60)
    elif kind == "unigram":
        made = library.Tokenizer(models.Unigram())
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=300, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
        )
    else:
        made = library.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    made.train_from_iterator([TEXT], trainer)
    values: dict[str, Any] = json.loads(made.to_str())
    if kind == "llama2_like":
        values["pre_tokenizer"] = None
        for token in values["added_tokens"]:
            token["special"] = not token["content"].startswith("<0x")
        values["added_tokens"] = values["added_tokens"][:3]
    return json.dumps(values, ensure_ascii=False)


def write(kind: str, folder: Path, end: str | None = None) -> Path:
    """Write the files of a tokenizer into a folder; ``end`` is its end-of-text token, if it is not one that is recognised."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(content(kind), encoding="utf-8")
    end = "[SEP]" if kind == "wordpiece" and end is None else end
    if end is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}), encoding="utf-8")
    return folder


BEGIN = "<|begin_of_text|>"


def write_with_begin(folder: Path, form: str = "sequence") -> Path:
    """Write a tokenizer that puts :data:`BEGIN`, of the id 600, before texts.

    Args:
        folder: the folder to make.
        form: how it says so. ``sequence``: as Llama 3, the last of several post-processors; ``template``: as Llama 2, one
            post-processor; ``both ends``: that also adds an end; ``end``: that adds an end alone.
    """
    values = json.loads(content("llama3_like"))
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    values["added_tokens"].append({"id": 600, "content": BEGIN, **plain})
    numbers = {BEGIN: 600, END: values["added_tokens"][0]["id"]}
    ends = {"both ends": [BEGIN, None, END], "end": [None, END]}.get(form, [BEGIN, None])
    single = [
        {"Sequence": {"id": "A", "type_id": 0}} if each is None else {"SpecialToken": {"id": each, "type_id": 0}}
        for each in ends
    ]
    special = {each: {"id": each, "ids": [numbers[each]], "tokens": [each]} for each in ends if each is not None}
    template = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special}
    if form == "sequence":
        template = {"type": "Sequence", "processors": [values["post_processor"], template]}
    values["post_processor"] = template
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN, "eos_token": END}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def words(count: int, folder: Path) -> Path:
    """Write a tokenizer with a vocabulary of ``count``: an end of text, and the words ``w1``, ``w2`` …"""
    vocabulary = {END: 0, **{f"w{number}": number for number in range(1, count)}}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    values = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None, "decoder": None,
        "added_tokens": [{"id": 0, "content": END, **special}], "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": END},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    return folder
