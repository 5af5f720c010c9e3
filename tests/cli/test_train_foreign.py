"""``scalegpt train`` and ``eval`` on token files of other programs, as they are."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from scalegpt.cli.main import main
from token_files import write_datatrove, write_llmc, write_megatron

RUN = {
    "input_file": "data", "model_name": "run", "preset": "tiny", "device": "cpu", "n_layer": 1, "n_embd": 16, "n_head": 2,
    "block_size": 16, "precision": "fp32", "micro_batch": 4, "tokens_per_step": 128, "max_iters": 4, "warmup_steps": 2,
    "eval_every": 4, "eval_tokens": 200, "checkpoint_every": 2, "sample_every": 0,
}  # fmt: skip
DOCUMENTS = [[*(97 + (number + place) % 26 for place in range(20 + number % 10)), 256] for number in range(60)]


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCALEGPT_CACHE", str(tmp_path / "cache"))
    Path("data").mkdir()


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command with flags; its output, or its one line of complaint if it is to fail."""

    def run(*words: str, fails: bool = False, **flags: Any) -> str:
        capsys.readouterr()
        status = main([*words, *(word for key, value in flags.items() for word in (f"--{key}", str(value)))])
        captured = capsys.readouterr()
        assert status == (2 if fails else 0), captured.err
        assert not fails or captured.err.count("\n") == 1
        return captured.err if fails else captured.out

    return run


def test_a_run_on_files_of_megatron(command: Callable[..., str]) -> None:
    write_megatron(Path("data/a_document"), [[doc] for doc in DOCUMENTS[:30]])
    write_megatron(Path("data/b_document"), [[doc] for doc in DOCUMENTS[30:]], "int32")
    line = command("train", fails=True, **RUN)
    assert "data holds tokens of Megatron, which do not say which tokenizer made them; give it with --tokenizer" in line
    said = command("train", tokenizer="byte", packing="documents", **RUN)
    assert "byte tokenizer, Megatron's 2 files as they are, the last " in said
    assert "tokens held out, from a document's start on; " in said
    assert not Path("cache").exists()
    config = yaml.safe_load(Path("runs/run/config.yaml").read_text())
    assert (config["data"]["tokenizer"], config["model"]["vocab_size"]) == ("byte", 257)
    assert "step 4" in command("train", tokenizer="byte", packing="documents", **{**RUN, "max_iters": 6})
    first = json.loads(command("data", "ledger", "runs/run", "--json", steps="1").split("\n")[0])
    files = {str(Path(f"data/{name}_document.bin").absolute()) for name in "ab"}
    assert {window["file"] for window in first["windows"]} <= files
    shape = {key: RUN[key] for key in RUN if key not in {"preset", "n_layer", "n_embd", "n_head", "block_size"}}
    command("train", init_from="runs/run", **{**shape, "model_name": "more", "max_iters": 1})  # its tokenizer is known
    scored = json.loads(command("eval", "runs/run", "--json", input_file="data"))
    assert scored["loss"] > 0


def test_a_run_on_tokens_and_text_at_addresses(command: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    store = pytest.importorskip("fsspec").filesystem("memory")
    write_datatrove(Path("data/0.ds"), DOCUMENTS)
    for path in Path("data").iterdir():
        store.pipe(f"/bucket/tokens/{path.name}", path.read_bytes())
    said = command("train", tokenizer="byte", **{**RUN, "input_file": "memory://bucket/tokens", "max_iters": 2})
    assert "datatrove's file as it is" in said
    config = yaml.safe_load(Path("runs/run/config.yaml").read_text())
    assert config["data"]["input_file"] == "memory://bucket/tokens"
    assert "step 2" in command("train", tokenizer="byte", **{**RUN, "input_file": "memory://bucket/tokens"})
    assert json.loads(command("eval", "runs/run", "--json"))["split"] == "val"
    shown = json.loads(command("data", "inspect", "memory://bucket/tokens", "--json", tokenizer="byte"))
    assert (shown["format"], shown["documents"], shown["ids_outside_vocabulary"]) == ("datatrove", 60, 0)
    Path("text.txt").write_text("the same line again\n" * 100)
    text = f"file://{Path('text.txt').absolute()}"
    assert "read as utf-8" in command("train", tokenizer="byte", **{**RUN, "model_name": "other", "input_file": text})
    assert json.loads(command("eval", "runs/other", "--json", input_file=text))["bytes"] == 2000
    line = command("train", fails=True, tokenizer="byte", **{**RUN, "input_file": "memory://bucket/nothing"})
    assert "memory://bucket/nothing does not exist" in line


def test_packing_is_refused_where_no_token_ends_documents(command: Callable[..., str]) -> None:
    write_megatron(Path("data/a_document"), [[doc[:-1]] for doc in DOCUMENTS])
    assert "data has none; write it after each" in command(
        "train", fails=True, tokenizer="byte", packing="documents", **RUN
    )
    command("train", tokenizer="byte", **RUN)


def test_ids_outside_the_vocabulary_are_refused(command: Callable[..., str]) -> None:
    write_datatrove(Path("data/0.ds"), [*DOCUMENTS, [300]])
    line = command("train", fails=True, tokenizer="byte", **RUN)
    assert "0.ds holds id 300 at token offset" in line
    assert not Path("runs/run/config.yaml").exists()


def test_a_run_on_files_that_name_gpt2(command: Callable[..., str]) -> None:
    ids = [token % 256 for doc in DOCUMENTS for token in doc]
    write_llmc(Path("data/x_train_000001.bin"), ids)
    write_llmc(Path("data/x_val_000000.bin"), ids[:300])
    said = command("train", **{**RUN, "max_iters": 1})
    assert f"{len(ids):,} training and 300 held-out tokens, gpt2 tokenizer, llm.c's 2 files as they are" in said
    line = command("eval", "runs/run", input_file=str(Path("data/x_val_000000.bin")))
    assert "loss" in line
