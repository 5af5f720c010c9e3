"""Evaluation: windows that score each token once, and the values of a direct computation with full logits."""

import json
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import scalegpt
import tokenizer_samples
from scalegpt.cli.main import main
from scalegpt.data.tokenizers import make_tokenizer
from scalegpt.errors import InputError, RunError
from scalegpt.inference.evaluation import cut_windows
from scalegpt.inference.loaded import LoadedModel
from scalegpt.inference.texts import Piece

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "A short text, città and all: it is read in windows of sixteen tokens.\n"
BLOCK = 16


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCALEGPT_CACHE", str(tmp_path / "cache"))


def pieces(ids: np.ndarray, sizes: list[int]) -> Iterator[Piece]:
    ends = np.minimum(np.cumsum([0, *sizes, len(ids)]), len(ids))
    for first, last in pairwise(ends):
        yield Piece(ids[first:last], 0, last / max(len(ids), 1))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on a busy machine any draw is slow
@given(st.integers(0, 60), st.integers(1, 12), st.data())
def test_every_token_but_the_first_is_a_target_once_and_has_all_the_context_there_is(
    length: int, block: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, block))
    sizes = data.draw(st.lists(st.integers(0, 9), max_size=9))
    ids, scored = np.arange(length), []
    for window in cut_windows(pieces(ids, sizes), block, stride):
        assert 0 <= window.counted < len(window.ids) - 1 <= block
        assert (np.diff(window.ids) == 1).all()
        for target in window.ids[1 + window.counted :].tolist():
            context = target - int(window.ids[0])
            assert context >= min(target, block - stride + 1)
            scored.append(target)
    assert scored == list(range(1, length))


def direct(model: Any, ids: list[int], stride: int) -> tuple[float, int]:
    """Nats and number of the tokens after the first: each from the logits of a pass over its context alone."""
    total, begin = 0.0, 0
    for place in range(1, len(ids)):
        if place > begin + BLOCK:
            begin += stride
        with torch.no_grad():
            logits: Tensor = model(torch.tensor([ids[begin:place]]))  # of the last position
        total += F.cross_entropy(logits.double(), torch.tensor(ids[place : place + 1])).item()
    return total, len(ids) - 1


@pytest.mark.parametrize("stride", [None, 16, 7, 1])
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_a_text_gets_what_a_direct_computation_gives(
    tiny_run: Any, stride: int | None, micro_batch: int, tmp_path: Path
) -> None:
    model = scalegpt.load(tiny_run(bias=True, logit_softcap=3.0), device="cpu")
    Path("text.txt").write_text(TEXT, encoding="utf-8")
    result = model.evaluate("text.txt", stride=stride, micro_batch=micro_batch)
    nats, tokens = direct(model.model, [256, *TEXT.encode()], stride or BLOCK)
    assert result.tokens == tokens == len(TEXT.encode())
    assert result.loss == pytest.approx(nats / tokens, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / len(TEXT.encode()), rel=1e-6)
    assert (result.bytes, result.documents, result.split) == (len(TEXT.encode()), 1, None)


def test_each_document_is_scored_alone_and_weighs_by_its_tokens(tiny_run: Any) -> None:
    model = scalegpt.load(tiny_run(), device="cpu")
    folder = Path("folder")
    folder.mkdir()
    texts = [TEXT, "b" * 3, TEXT[::-1] * 2, "é"]
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    whole = model.evaluate(folder)
    parts = [model.evaluate(folder / f"{number}.txt") for number in range(len(texts))]
    named = model.evaluate(",".join(str(folder / f"{number}.txt") for number in range(len(texts))))
    assert whole.documents == len(texts)
    assert whole.tokens == sum(part.tokens for part in parts)
    assert whole.bytes == sum(part.bytes for part in parts) == sum(len(text.encode()) for text in texts)
    assert whole.nats == pytest.approx(sum(part.nats for part in parts), rel=1e-6)
    assert named == whole


def test_bytes_are_those_of_utf_8_whatever_the_encoding_of_the_file(tiny_run: Any) -> None:
    model = scalegpt.load(tiny_run(), device="cpu")
    Path("utf8.txt").write_text(TEXT, encoding="utf-8")
    Path("latin.txt").write_text(TEXT, encoding="latin-1")
    Path("wide.txt").write_text(TEXT, encoding="utf-16")
    expected = model.evaluate("utf8.txt")
    assert model.evaluate("latin.txt", encoding="latin-1") == expected
    assert model.evaluate("wide.txt", encoding="auto") == expected
    with pytest.raises(InputError, match=r"latin\.txt is not UTF-8"):
        model.evaluate("latin.txt")


def test_without_end_of_text_the_first_character_of_a_document_is_not_scored(tiny_run: Any) -> None:
    model = scalegpt.load(tiny_run(tokenizer=make_tokenizer("char", "\nabcè")), device="cpu")
    Path("text.txt").write_text("abè", encoding="utf-8")
    result = model.evaluate("text.txt")
    nats, _ = direct(model.model, [1, 2, 4], BLOCK)
    assert (result.tokens, result.bytes) == (2, 4)
    assert result.nats == pytest.approx(nats, rel=1e-6)
    Path("one.txt").write_text("a", encoding="utf-8")
    with pytest.raises(InputError, match="no token after its first"):
        model.evaluate("one.txt")
    Path("other.txt").write_text("abx", encoding="utf-8")
    with pytest.raises(InputError, match=r"^input other.txt: character 'x'"):
        model.evaluate("other.txt")


def test_gpt2_tokens_are_scored_with_the_bytes_of_the_text(tiny_run: Any) -> None:
    tokenizer = make_tokenizer("gpt2")
    model = scalegpt.load(tiny_run(tokenizer=tokenizer, n_embd=8), device="cpu")
    Path("text.txt").write_text(TEXT, encoding="utf-8")
    result = model.evaluate("text.txt")
    nats, tokens = direct(model.model, [50256, *tokenizer.encode(TEXT).tolist()], BLOCK)
    assert (result.tokens, result.bytes) == (tokens, len(TEXT.encode()))
    assert result.nats == pytest.approx(nats, rel=1e-6)


SMALL = {
    "tokenizer": "byte", "vocab_size": 257, "n_layer": 1, "n_embd": 8, "n_head": 1, "block_size": BLOCK, "micro_batch": 2,
    "tokens_per_step": 32, "warmup_steps": 0, "precision": "fp32", "device": "cpu", "sample_tokens": 0, "max_iters": 3,
}  # fmt: skip


def trained(text: str, **settings: Any) -> LoadedModel:
    """A run that was trained for three steps on ``text.txt``."""
    Path("text.txt").write_text(text, encoding="utf-8")
    return scalegpt.load(scalegpt.train("tiny", input_file="text.txt", **{**SMALL, **settings}), device="cpu")


@pytest.mark.parametrize("loss", ["full", "chunked"])
def test_the_val_split_gets_the_loss_of_the_evaluation_in_training(loss: str) -> None:
    # 951 bytes: 855 to train on, 96 held out, and end-of-text: 6 windows of 16 targets, so that training leaves out none.
    text = (TEXT * 20).encode()[:951].decode()
    model = trained(text, loss=loss, val_fraction=0.1)
    lines = [json.loads(line) for line in Path("runs/tiny/metrics.jsonl").read_text().splitlines()]
    (reported,) = [line for line in lines if line.get("step") == 3 and "val_loss" in line]
    result = model.evaluate()
    assert result.tokens == reported["val_tokens"]
    assert result.tokens % BLOCK == 0
    assert result.loss == pytest.approx(reported["val_loss"], rel=1e-6)
    assert (result.split, result.documents) == ("val", 1)
    assert result == model.evaluate(split="val")


def test_a_run_of_packed_documents_gets_its_own_loss_and_does_not_score_first_tokens() -> None:
    folder = Path("many")
    folder.mkdir()
    for number in range(
        30
    ):  # 3 are held out, of 11 tokens each: 2 windows of 16 targets, so that training leaves out none
        (folder / f"{number}.txt").write_text(f"{number:02} packed!", encoding="utf-8")
    shape = {**SMALL, "packing": "documents"}
    model = scalegpt.load(scalegpt.train("tiny", input_file="many", **shape), device="cpu")
    lines = [json.loads(line) for line in Path("runs/tiny/metrics.jsonl").read_text().splitlines()]
    (reported,) = [line for line in lines if line.get("step") == 3 and "val_loss" in line]
    result = model.evaluate()
    assert result.tokens == reported["val_tokens"] == 32 - 2
    assert result.loss == pytest.approx(reported["val_loss"], rel=1e-6)
    alone = model.evaluate("many/0.txt")
    nats, tokens = direct(model.model, list(Path("many/0.txt").read_bytes()), BLOCK)
    assert alone.tokens == tokens == 9
    assert alone.nats == pytest.approx(nats, rel=1e-6)


def test_a_hugging_face_folder_gets_what_its_run_gets(tiny_run: Any) -> None:
    pytest.importorskip("transformers")
    run = tiny_run(activation="gelu_tanh", bias=True)
    assert main(["export", str(run), "--to", "hf", "--out", "exported"]) == 0
    Path("text.txt").write_text(TEXT, encoding="utf-8")
    model = scalegpt.load("exported", device="cpu")
    expected = scalegpt.load(run, device="cpu").evaluate("text.txt")
    assert model.evaluate("text.txt").nats == pytest.approx(expected.nats, rel=1e-6)
    with pytest.raises(InputError, match="does not say which data it was trained on"):
        model.evaluate()


def test_splits_hold_the_text_of_the_run_and_its_bytes() -> None:
    model = trained(TEXT * 20)
    total = len(TEXT.encode()) * 20
    train, val = model.evaluate(split="train"), model.evaluate(split="val")
    assert train.bytes + val.bytes == total
    assert (
        train.tokens + val.tokens == total + 2 - 2
    )  # end-of-text in both parts, and the first token of each is no target
    assert train.nats > val.nats > 0


def test_the_pieces_in_which_tokens_are_read_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(TEXT * 20)
    expected = model.evaluate(split="train")
    monkeypatch.setattr("scalegpt.inference.texts.PIECE_TOKENS", 7)
    assert model.evaluate(split="train") == expected
    monkeypatch.setattr("scalegpt.inference.texts.MOST_UNDECODED", 30)
    assert model.evaluate(split="train") == expected


def test_a_folder_of_prepared_tokens_is_scored_by_its_splits(tiny_run: Any) -> None:
    from scalegpt.config import DataConfig
    from scalegpt.data.prepare import prepare

    folder = Path("many")
    folder.mkdir()
    for number in range(30):
        (folder / f"{number}.txt").write_text(f"{number} {TEXT}", encoding="utf-8")
    prepare([folder], "tokens", DataConfig(tokenizer="byte"))
    prepare([folder], "letters", DataConfig(tokenizer="char"))
    model = scalegpt.load(tiny_run(), device="cpu")
    val, train = model.evaluate("tokens"), model.evaluate("tokens", split="train")
    assert val.documents is not None
    assert train.documents is not None
    assert val.documents + train.documents == 30
    assert val.documents < train.documents
    nats, _ = direct(model.model, np.fromfile("tokens/val.bin", dtype="<u2").tolist(), BLOCK)
    assert val.nats == pytest.approx(nats, rel=1e-6)
    with pytest.raises(InputError, match="letters was prepared with another tokenizer"):
        model.evaluate("letters")


@pytest.mark.parametrize("kind", ["llama3_like", "llama2_like"])
def test_a_tokenizer_of_hugging_face_gives_tokens_and_the_bytes_of_the_text(kind: str) -> None:
    tokenizer_samples.write(kind, Path("tokenizer"))
    folder = Path("many")
    folder.mkdir()
    texts = [f"{number} {TEXT}" for number in range(30)]
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    settings = {**SMALL, "tokenizer": "tokenizer", "vocab_size": "auto"}
    model = scalegpt.load(scalegpt.train("tiny", input_file="many", **settings), device="cpu")
    val, train = model.evaluate(), model.evaluate(split="train")
    assert val.bytes + train.bytes == sum(len(text.encode()) for text in texts)
    whole = model.evaluate("many")
    assert whole.bytes == val.bytes + train.bytes
    assert whole.tokens == sum(len(model.tokenizer.encode(text)) for text in texts)
    (folder / "0.txt").rename("one.txt")
    nats, _ = direct(model.model, [model.tokenizer.end_of_text, *model.tokenizer.encode(texts[0]).tolist()], BLOCK)
    assert model.evaluate("one.txt").nats == pytest.approx(nats, rel=1e-6)


def test_the_data_of_a_run_are_found_in_the_cache_or_made_again_or_missed(tmp_path: Path) -> None:
    import shutil

    model = trained(TEXT * 20)
    before = model.evaluate()
    Path("text.txt").rename("away.txt")
    assert model.evaluate() == before, "the tokens are in the cache"
    shutil.rmtree("cache")
    with pytest.raises(InputError, match=r"text\.txt"):
        model.evaluate()
    Path("away.txt").rename("text.txt")
    assert model.evaluate() == before, "made again"
    shutil.rmtree("cache")
    Path("text.txt").write_text(TEXT * 21, encoding="utf-8")
    with pytest.raises(InputError, match=r"text\.txt no longer gives the tokens that the run was trained on"):
        model.evaluate()


def test_what_cannot_be_evaluated_is_refused(tiny_run: Any) -> None:
    model = scalegpt.load(tiny_run(), device="cpu")
    Path("text.txt").write_text(TEXT, encoding="utf-8")
    for words, arguments in (
        ("does not say which data it was trained on", {}),
        ("does not say which data", {"split": "train"}),
        ("split must be train or val, not 'test'", {"split": "test"}),
        ("text.txt has no split val: it is text", {"input_file": "text.txt", "split": "val"}),
        ("stride 17 is not from 1 to the model's block_size 16", {"input_file": "text.txt", "stride": 17}),
        ("stride must be at least 1", {"input_file": "text.txt", "stride": 0}),
        ("micro_batch must be at least 1", {"input_file": "text.txt", "micro_batch": 0}),
        ("none.txt", {"input_file": "none.txt"}),
    ):
        with pytest.raises(InputError, match=words):
            model.evaluate(**arguments)


def test_a_diverged_model_is_an_error_and_no_figure(tiny_run: Any) -> None:
    model = scalegpt.load(tiny_run(), device="cpu")
    model.model.wte.weight[3] = float("nan")
    Path("text.txt").write_text(TEXT, encoding="utf-8")
    with pytest.raises(RunError, match="the loss is not finite"):
        model.evaluate("text.txt")


def test_progress_ends_with_all_of_the_text_and_all_tokens(tiny_run: Any) -> None:
    model = scalegpt.load(tiny_run(), device="cpu")
    Path("text.txt").write_text(TEXT, encoding="utf-8")
    seen: list[tuple[float, int]] = []
    result = model.evaluate("text.txt", micro_batch=1, progress=lambda share, tokens: seen.append((share, tokens)))
    assert [tokens for _, tokens in seen] == [*range(BLOCK, result.tokens, BLOCK), result.tokens]
    assert seen[-1][0] == 1
