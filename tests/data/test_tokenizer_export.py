"""The files that a tokenizer is written as give the same ids in Hugging Face's libraries."""

import json
from pathlib import Path

import pytest

from scalegpt.data.tokenizers import Tokenizer, make_tokenizer
from scalegpt.data.tokenizers.export import tokenizer_files
from scalegpt.data.tokenizers.letters import LETTERS

PROSE = "The cat's 1,234 hats – don't they look   odd?\n\n\tNo! \r\n 日本語, è, 😀\x00\x1c\x85 \u2028end  \n"
TEXT = PROSE * 3 + "".join(map(chr, range(0x20, 0x2FF))) + Path(__file__).read_text(encoding="utf-8") + PROSE


def tokenizers() -> list[Tokenizer]:
    return [make_tokenizer("gpt2"), make_tokenizer("byte"), make_tokenizer("char", "".join(sorted(set(TEXT))))]


def written(tokenizer: Tokenizer, folder: Path) -> Path:
    for name, content in tokenizer_files(tokenizer).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("tokenizer", tokenizers(), ids=lambda each: each.kind)
def test_tokenizers_gives_the_same_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    library = pytest.importorskip("tokenizers")
    other = library.Tokenizer.from_file(str(written(tokenizer, tmp_path) / "tokenizer.json"))
    for text in (TEXT, "", " ", "\n\n\n x", "a"):
        ids = other.encode(text, add_special_tokens=False).ids
        assert ids == tokenizer.encode(text).tolist()
        assert other.decode(ids, skip_special_tokens=False) == text
    assert other.get_vocab_size() == tokenizer.vocab_size


@pytest.mark.parametrize("tokenizer", tokenizers(), ids=lambda each: each.kind)
def test_transformers_loads_the_folder(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))  # as in the folder of an exported model
    other = transformers.AutoTokenizer.from_pretrained(str(written(tokenizer, tmp_path)), local_files_only=True)
    ids = other(TEXT)["input_ids"]
    assert ids == tokenizer.encode(TEXT).tolist()
    assert other.decode(ids) == TEXT
    assert other.eos_token_id == tokenizer.end_of_text


def test_a_character_that_the_vocabulary_lacks_is_an_error_there_too(tmp_path: Path) -> None:
    library = pytest.importorskip("tokenizers")
    other = library.Tokenizer.from_file(str(written(make_tokenizer("char", "ab"), tmp_path) / "tokenizer.json"))
    with pytest.raises(Exception, match="UNK"):
        other.encode("abc")


def test_every_byte_has_a_letter_of_its_own() -> None:
    assert list(LETTERS.values()) == list(range(256))
    assert (LETTERS["Ġ"], LETTERS["A"], LETTERS["Ċ"], LETTERS["Ń"]) == (0x20, 0x41, 0x0A, 0xAD)
