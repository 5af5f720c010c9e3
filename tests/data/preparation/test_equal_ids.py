"""The ids of every document are those of tiktoken and of ``tokenizers``, however documents are put together."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

import tokenizer_samples as samples
from scalegpt.config import DataConfig
from scalegpt.data.preparation import batches
from scalegpt.data.prepare import prepare
from scalegpt.data.text import reading
from scalegpt.data.tokenizers import HFTokenizer, gpt2, huggingface, load_tokenizer, make_tokenizer
from scalegpt.data.tokenizers.joined import SEPARATOR

SPECIAL = ["<|endoftext|>", "<|fim|>", SEPARATOR, SEPARATOR[:-1], SEPARATOR[1:], "\0", "\1", "\ud83d", "\udc00"]
USUAL = [
    " ", "  ",
    "\n", "\r\n", "\t", "'s", "'ll", "word", " word", "123", "é", "e\u0301", "日本", "😀", "😀\u200d😀", "=", "\u3000",
    "\x1c", "\x85",
]  # fmt: skip
TEXTS = st.lists(st.lists(st.sampled_from(USUAL + SPECIAL) | st.characters(), max_size=12).map("".join), max_size=8)


@pytest.fixture(scope="module")
def openai() -> tiktoken.Encoding:
    """GPT-2's encoding as tiktoken defines it, with its own pattern."""
    paths, digests = zip(*gpt2._gpt2_vocabulary(), strict=True)
    return tiktoken.Encoding(
        name="gpt2",
        pat_str=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
        mergeable_ranks=data_gym_to_mergeable_bpe_ranks(*paths, *digests),
        special_tokens={"<|endoftext|>": 50256},
    )


@given(texts=TEXTS)
@settings(max_examples=150, deadline=None)
def test_texts_together_are_encoded_as_each_alone(openai: tiktoken.Encoding, texts: list[str]) -> None:
    found = make_tokenizer("gpt2").encode_batch(texts)
    assert [ids.tolist() for ids in found] == [openai.encode_ordinary(text) for text in texts]
    assert {ids.dtype for ids in found} <= {np.dtype("<u2")}


@pytest.fixture(scope="module", params=samples.KINDS)
def file_tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HFTokenizer:
    pytest.importorskip("tokenizers")
    return load_tokenizer(str(samples.write(request.param, tmp_path_factory.mktemp(request.param))))


@given(texts=TEXTS)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_tokenizer_gives_the_ids_of_its_library(
    file_tokenizer: HFTokenizer, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface, "FAST_FROM", 0)
    found = file_tokenizer.encode_batch(texts)
    clean = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts]
    theirs = file_tokenizer._library.encode_batch(clean, add_special_tokens=False)
    assert [ids.tolist() for ids in found] == [each.ids for each in theirs]


SIZE = 6000
KINDS = {
    "one letter": "a" * SIZE,
    "one sign": "=" * SIZE,
    "spaces": " " * SIZE + "end",
    "newlines": "\n" * SIZE,
    "no spaces": "".join(chr(97 + number * number % 26) for number in range(SIZE)),
    "emoji": "😀" * (SIZE // 4),
    "NULs": "\0" * SIZE,
    "special tokens": "<|endoftext|>" * (SIZE // 13),
    "separators": SEPARATOR * (SIZE // len(SEPARATOR)),
    "apostrophes": "it's'" * (SIZE // 5),
}


@pytest.mark.parametrize("piece", [100, 1 << 20])
def test_prepared_documents_have_tiktokens_ids(
    openai: tiktoken.Encoding, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unusual documents between usual ones, whole and in pieces."""
    monkeypatch.setattr(reading, "PIECE_CHARACTERS", piece)
    monkeypatch.setattr(batches, "BATCH_CHARACTERS", 2000)
    usual = "A usual text, isn't it?\n\n  Yes. " * 9
    texts = [each for number, kind in enumerate(KINDS.values()) for each in (f"{usual}{number}", kind, f"{number}")]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokens = prepare([path], tmp_path / "out", DataConfig(val_fraction=0.4))
    assert tokens.meta["split"]["method"] == "documents"
    found = []
    for split in ("train", "val"):
        ids = tokens.files[split].tokens[:]
        found += [each.tolist() for each in np.split(ids, np.flatnonzero(ids == 50256) + 1)[:-1]]
    assert sorted(found) == sorted([*openai.encode_ordinary(text), 50256] for text in texts)
