"""What an export takes over from the Hugging Face folder that a run began with: ids, generation settings, context, chat."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tokenizer_samples as samples
from weights.foreign import random_model, saved

pytest.importorskip("tokenizers")

ROWS, LONG = 700, 4096
GENERATION = {
    "bos_token_id": None, "eos_token_id": [3, 5, 690], "pad_token_id": 6, "do_sample": True, "temperature": 0.6,
    "top_p": 0.9, "suppress_tokens": [8], "max_new_tokens": 100, "transformers_version": "4.1",
}  # fmt: skip
SETTINGS = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_new_tokens": 100}
TEMPLATE = "{{ messages[0].content }}"


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Path:
    """A Llama that reads 4,096 tokens, with a tokenizer of 600 ids, in a folder ``theirs``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCALEGPT_CACHE", str(tmp_path / "cache"))
    folder = saved(random_model("llama", vocab_size=ROWS, max_position_embeddings=LONG), Path("theirs"))
    samples.write("llama3_like", folder)
    # Its tokenizer names a begin of text, of the id 0; its model has none.
    config = {"bos_token": samples.END, "eos_token": samples.END, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    change(folder / "config.json", bos_token_id=None, eos_token_id=[3, 5], pad_token_id=6)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return folder


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def exported(call: Callable[..., str], run: str, out: str) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """``config.json`` and ``generation_config.json`` of an exported run, and what the command remarks."""
    notes = json.loads(call("export", run, "--to", "hf", "--out", out, "--json"))["notes"]
    return (*(json.loads(Path(out, f"{name}config.json").read_text()) for name in ("", "generation_")), notes)


IDS = {"bos_token_id": None, "eos_token_id": [3, 5], "pad_token_id": 6}
NOTE = "context of 4,096 tokens, that of the original model; this run trained with 64"


def test_an_imported_run_is_exported_with_what_its_folder_said(theirs: Path, call: Callable[..., str]) -> None:
    call("import", theirs, "--model_name", "run", "--block_size", "64")
    shutil.rmtree(theirs)
    config, generation, notes = exported(call, "runs/run", "out")
    assert {key: config[key] for key in IDS} == IDS
    assert generation == {**SETTINGS, "eos_token_id": [3, 5, 690], "pad_token_id": 6, "suppress_tokens": [8]} | {
        "bos_token_id": None
    }
    assert config["max_position_embeddings"] == LONG
    assert notes[1:] == [NOTE]
    gguf = pytest.importorskip("gguf")
    assert NOTE in call("export", "runs/run", "--to", "gguf", "--out", "out.gguf")
    fields = gguf.GGUFReader("out.gguf").fields
    assert fields["llama.context_length"].contents() == LONG
    assert fields["tokenizer.chat_template"].contents() == TEMPLATE
    call("import", "runs/run", "--model_name", "again", "--block_size", "32", "--vocab_size", "650")
    config, generation, _ = exported(call, "runs/again", "out2")
    assert (config["max_position_embeddings"], generation["eos_token_id"]) == (LONG, [3, 5])


def test_a_trained_run_too(theirs: Path, call: Callable[..., str]) -> None:
    Path("text.txt").write_text(samples.TEXT * 2)
    words = ("--block_size", 64, "--max_iters", 1, "--micro_batch", 1, "--precision", "fp32", "--sample_tokens", 0)
    more = ("--eval_tokens", 64, "--warmup_steps", 0, "--tokens_per_step", 64, "--device", "cpu")
    start = ("train", "--input_file", "text.txt", "--model_name", "run", *words, *more)
    call(*start, "--init_from", theirs)
    call(*start, "--init_from", theirs, "--max_iters", 2)
    config, generation, notes = exported(call, "runs/run", "out")
    assert {key: config[key] for key in IDS} == IDS
    assert generation["temperature"] == 0.6
    assert notes[1:] == [NOTE]


def test_ids_of_another_tokenizer_are_not_taken_over(theirs: Path, call: Callable[..., str]) -> None:
    call("import", theirs, "--model_name", "run", "--tokenizer", "byte")
    config, generation, notes = exported(call, "runs/run", "out")
    assert (config["eos_token_id"], config["pad_token_id"]) == (256, None)
    assert generation == {**SETTINGS, "bos_token_id": 256, "eos_token_id": 256}
    assert (config["max_position_embeddings"], len(notes)) == (LONG, 1)


def test_learned_positions_are_as_many_as_were_trained(call: Callable[..., str], theirs: Path) -> None:
    folder = saved(random_model("gpt2", vocab_size=300), Path("gpt2"))
    call("import", folder, "--model_name", "run", "--tokenizer", "byte", "--block_size", "16")
    config, _, notes = exported(call, "runs/run", "out")
    assert (config["n_positions"], len(notes)) == (16, 1)


def test_a_run_of_its_own_is_exported_as_it_is(call: Callable[..., str], tiny_run: Any, tmp_path: Path) -> None:
    run = tiny_run(position="rope", norm="rmsnorm", activation="swiglu", block_size=16)
    config, generation, _ = exported(call, str(run), str(tmp_path / "out"))
    assert config["max_position_embeddings"] == 16
    assert generation == {"bos_token_id": 256, "eos_token_id": 256}


def test_damaged_files_are_refused(theirs: Path, call: Callable[..., str]) -> None:
    (theirs / "generation_config.json").write_text("[")
    assert "generation_config.json" in call("import", theirs, "--model_name", "run", status=2)
    assert not Path("runs/run").exists()
    (theirs / "generation_config.json").unlink()
    call("import", theirs, "--model_name", "run")
    Path("runs/run/origin.json").write_text('{"positions": "many"}')
    line = call("export", "runs/run", "--to", "hf", "--out", "out", status=2)
    assert "runs/run/origin.json is damaged; restore it, or remove it to export without its settings" in line
