"""``scalegpt train`` with a ``tokenizer.json``: the vocabulary, the run's copy, and what a resumed run may change."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import tokenizer_samples as samples
from scalegpt import load
from scalegpt.checkpoint.reader import read_manifest
from scalegpt.checkpoint.store import find_checkpoints
from scalegpt.cli.main import main
from scalegpt.data.tokenizers import load_tokenizer

pytest.importorskip("tokenizers")

RUN = {
    "input_file": "text.txt", "model_name": "run", "tokenizer": "tok", "preset": "tiny", "device": "cpu", "n_layer": 1,
    "n_embd": 16, "n_head": 2, "block_size": 16, "precision": "fp32", "micro_batch": 4, "tokens_per_step": 128,
    "max_iters": 4, "warmup_steps": 2, "eval_every": 4, "eval_tokens": 200, "checkpoint_every": 2, "sample_every": 0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCALEGPT_CACHE", str(tmp_path / "cache"))
    Path("text.txt").write_bytes((samples.TEXT * 2).encode())
    samples.write("llama3_like", Path("tok"))


@pytest.fixture
def train(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command; its output, or its one line of complaint if it is to fail."""

    def run(*, fails: bool = False, **changes: Any) -> str:
        flags = {key: value for key, value in {**RUN, **changes}.items() if value is not None}
        capsys.readouterr()
        status = main(["train", *(word for key, value in flags.items() for word in (f"--{key}", str(value)))])
        captured = capsys.readouterr()
        assert status == (2 if fails else 0), captured.err
        assert not fails or captured.err.count("\n") == 1
        return captured.err if fails else captured.out

    return run


def saved() -> dict[str, Any]:
    return read_manifest(find_checkpoints(Path("runs/run/checkpoints"))[-1]).header.tokenizer


def test_a_run_keeps_its_tokenizer(train: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    said = train(n_kv_head=1, position="rope", packing="documents")
    assert "2 heads (1 of keys and values), block 16" in said
    assert "held-out tokens, tokenizer tok, read as utf-8; " in said
    assert " epochs; attention stays inside documents\n" in said
    config = yaml.safe_load(Path("runs/run/config.yaml").read_text())
    assert (config["model"]["vocab_size"], config["data"]["tokenizer"]) == (640, "tok")
    made = load_tokenizer("tok")
    assert saved()["digest"] == made.digest
    assert load_tokenizer("runs/run").digest == made.digest
    Path("moved").mkdir()
    shutil.move("runs/run/checkpoints/step_00000004", "moved/step_00000004")
    shutil.rmtree("runs")
    shutil.rmtree("tok")
    shutil.rmtree("cache")
    for args in (["moved/step_00000004"], ["moved/step_00000004", "--prompt", "The cat"]):
        capsys.readouterr()
        assert main(["sample", *args, "--max_new_tokens", "8", "--device", "cpu", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["tokens"] == 8
    assert load("moved/step_00000004", device="cpu").tokenizer.digest == made.digest


def test_a_run_resumes_when_the_tokenizer_is_gone(train: Callable[..., str]) -> None:
    train()
    digest = saved()["digest"]
    shutil.rmtree("tok")
    shutil.rmtree("cache")
    said = train(max_iters=6)
    assert "tokenizer tok is gone; the run's copy in runs/run is used" in said
    assert saved()["digest"] == digest
    assert len(Path("runs/run/metrics.jsonl").read_text().splitlines()) >= 6
    assert "does not exist" in train(fails=True, model_name="other")


def test_a_changed_tokenizer_needs_to_be_allowed(train: Callable[..., str]) -> None:
    train()
    shutil.copytree("tok", "copy")
    train(max_iters=5, tokenizer="copy")  # another place, the same content
    samples.write("qwen_like", Path("tok"))
    line = train(fails=True, max_iters=6)
    assert "was trained on other tokens" in line
    assert "tokenizer: hf" in line
    assert "--allow_change tokenizer,data" in line
    assert "tokenizer: copy → byte" in train(fails=True, max_iters=6, tokenizer="byte", vocab_size=640)
    train(max_iters=6, allow_change="tokenizer,data")
    assert saved()["digest"] == load_tokenizer("tok").digest == load_tokenizer("runs/run").digest


def test_a_changed_tokenizer_is_noticed_for_folders_of_text(train: Callable[..., str]) -> None:
    Path("texts").mkdir()
    shutil.move("text.txt", "texts/text.txt")
    train(input_file="texts")
    Path("texts/more.txt").write_text("more text " * 300)
    assert "has changed since" in train(input_file="texts", max_iters=5)  # the run keeps its tokens
    samples.write("qwen_like", Path("tok"))
    assert "tokenizer: hf" in train(fails=True, input_file="texts", max_iters=6)


def test_prepared_tokens_bring_their_tokenizer(train: Callable[..., str]) -> None:
    assert main(["data", "prepare", "text.txt", "--out", "tokens", "--tokenizer", "tok"]) == 0
    train(input_file="tokens", tokenizer=None)
    config = yaml.safe_load(Path("runs/run/config.yaml").read_text())
    assert (config["model"]["vocab_size"], config["data"]["tokenizer"]) == (640, "tokens")
    train(input_file="tokens", max_iters=5)  # named, and the same
    samples.write("qwen_like", Path("tok"))
    line = train(fails=True, input_file="tokens", max_iters=6)
    assert "tokens was prepared with another tokenizer.json, not tok; omit --tokenizer" in line
    assert "prepared with another tokenizer.json, not gpt2" in train(fails=True, input_file="tokens", tokenizer="gpt2")


def test_a_vocabulary_that_is_too_small_is_refused_before_anything_is_made(train: Callable[..., str]) -> None:
    line = train(fails=True, vocab_size=500)
    assert "tokenizer tok has 600 ids, more than vocab_size 500; give --vocab_size auto" in line
    assert not Path("runs").exists()
    assert not Path("cache").exists()
    train(vocab_size=600)
    assert yaml.safe_load(Path("runs/run/config.yaml").read_text())["model"]["vocab_size"] == 600


def test_plan_takes_the_vocabulary_of_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    samples.words(70_000, Path("wide"))
    assert main(["plan", "--preset", "150M_1024", "--gpu", "a100-40gb", "--tokenizer", "wide", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["model"]["vocab_size"] == 70_016
    assert "--tokenizer wide" in answer["choice"]["command"]
    assert "--vocab_size" not in answer["choice"]["command"]
    assert main(["plan", "--preset", "150M_1024", "--gpu", "a100-40gb", "--tokenizer", "none/such"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_large_vocabularies_train_and_resume(train: Callable[..., str]) -> None:
    samples.words(70_000, Path("wide"))
    Path("text.txt").write_text(" ".join(f"w{number * 7 % 69_999 + 1}" for number in range(3000)))
    train(tokenizer="wide", max_iters=2, n_embd=4, n_head=1)
    train(tokenizer="wide", max_iters=3, n_embd=4, n_head=1)
    assert main(["data", "ledger", "runs/run", "--steps", "1:3", "--json"]) == 0
    assert saved()["vocab_size"] == 70_000
