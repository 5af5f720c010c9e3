"""Exported folders: transformers computes the same from them, and what was imported comes out again as it was."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tokenizer_samples as samples
from scalegpt.data.tokenizers import load_tokenizer, make_tokenizer
from scalegpt.inference.load import load_model
from weights.foreign import MODELS, random_model, saved

MODERN = {
    "norm": "rmsnorm", "position": "rope", "activation": "swiglu", "n_head": 4, "n_kv_head": 2, "n_inner": 48,
    "block_size": 80,
}  # fmt: skip
PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2 without biases": ("GPT2LMHeadModel", {}),
    "GPT-2 with biases, untied": ("GPT2LMHeadModel", {"bias": True, "tie_head": False, "activation": "gelu_tanh"}),
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    **PLAIN,
    "Pythia": (
        "GPTNeoXForCausalLM",
        {"bias": True, "position": "rope", "rotary_share": 0.25, "parallel_block": True, "tie_head": False},
    ),
    "NeoX without biases": ("GPTNeoXForCausalLM", {"position": "rope"}),
    "Llama": ("LlamaForCausalLM", {**MODERN, "rope_scaling": {"type": "linear", "factor": 2}, "tie_head": False}),
    "Llama with biases": ("LlamaForCausalLM", {**MODERN, "bias": True, "head_size": 16}),
    "Qwen2": ("Qwen2ForCausalLM", {**MODERN, "bias": "qkv"}),
    "Qwen3": ("Qwen3ForCausalLM", {**MODERN, "qk_norm": True, "head_size": 16, "tie_head": False}),
}
"""A shape of ours → the class that it becomes."""


def noisy(model: Any) -> None:
    """Make norms, biases and weights of a model random, so that each matters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


@pytest.fixture
def make_run(tiny_run: Any, tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A factory of runs with random weights, whose vocabulary is padded to 320 rows; keywords change the shape."""

    def make(tokenizer: str = "byte", **shape: Any) -> Path:
        characters = "".join(map(chr, range(32, 127)))
        folder: Path = tiny_run(
            tokenizer=make_tokenizer(tokenizer, characters),
            change=noisy,
            **{"block_size": 80, "vocab_size": 320, **shape},
        )
        return folder

    return make


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.slow
def test_transformers_continues_a_prompt_as_we_do(
    name: str, make_run: Callable[..., Path], call: Callable[..., str], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    family, shape = SHAPES[name]
    run, out = make_run(**shape), tmp_path / "exported"
    said = call("export", run, "--to", "hf", "--out", out)
    assert f"as {family}" in said
    assert "logits compared with transformers: they differ by at most" in said
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, local_files_only=True).eval()
    assert type(theirs).__name__ == family
    tokenizer, ours = transformers.AutoTokenizer.from_pretrained(out, local_files_only=True), load_model(run, "cpu")
    assert theirs.config.vocab_size == 257
    ids = tokenizer("once upon", return_tensors="pt").input_ids
    assert ids[0].tolist() == ours.prompt_ids("once upon")
    with torch.no_grad():
        expected = ours.model(ids)[:, :257]
        assert (theirs(ids).logits[:, -1] - expected).abs().max() <= 1e-5 * expected.abs().max()
    drawn = theirs.generate(ids, max_new_tokens=50, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert drawn[0, ids.shape[1] :].tolist() == greedy(ours, ids, 50)


def greedy(loaded: Any, ids: torch.Tensor, count: int) -> list[int]:
    """The likeliest tokens, without an end at the end-of-text token."""
    found = ids
    with torch.no_grad():
        for _ in range(count):
            logits = loaded.model(found)[:, : loaded.tokenizer.vocab_size]
            found = torch.cat([found, logits.argmax(-1, keepdim=True)], dim=1)
    return found[0, ids.shape[1] :].tolist()


def test_texts_begin_in_transformers_as_here(tiny_run: Any, call: Callable[..., str], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    run, out = tiny_run(tokenizer=load_tokenizer(str(samples.write_with_begin(tmp_path / "tok")))), tmp_path / "out"
    call("export", run, "--to", "hf", "--out", out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out, local_files_only=True)
    assert tokenizer("once upon")["input_ids"] == load_model(run, "cpu").prompt_ids("once upon")
    assert json.loads((out / "config.json").read_text())["bos_token_id"] == 600


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.slow
def test_what_was_imported_comes_out_as_it_was(
    name: str, call: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # More rows than tokens, as the folders of Qwen and others have them: the rows stay.
    theirs = saved(random_model(name, vocab_size=300), tmp_path / "theirs")
    call("import", theirs, "--model_name", "run", "--tokenizer", "byte")
    call("export", "runs/run", "--to", "hf", "--out", "again")
    before, after = load_file("theirs/model.safetensors"), load_file("again/model.safetensors")
    if MODELS[name][0] == "gpt_neox":  # its head is named so in files of every version
        before = {name.replace("lm_head", "embed_out"): value for name, value in before.items()}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    call("export", "runs/run", "--to", "hf", "--out", "half", "--dtype", "bf16")
    assert all(
        torch.equal(value, before[name].bfloat16()) for name, value in load_file("half/model.safetensors").items()
    )


def test_a_folder_of_another_program_is_to_be_imported_first(
    call: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(random_model("gpt2"), tmp_path / "their model")
    for to in ("hf", "gguf", "safetensors"):
        line = call("export", "their model", "--to", to, "--out", "out", status=2)
        assert "but export takes a run; make one: scalegpt import 'their model' --model_name NAME" in line


def test_large_weights_are_divided_into_files(
    make_run: Callable[..., Path], call: Callable[..., str], tmp_path: Path
) -> None:
    run = make_run()
    call("export", run, "--to", "hf", "--out", tmp_path / "one")
    facts = json.loads(
        call("export", run, "--to", "hf", "--out", tmp_path / "many", "--max_shard_size", "40kB", "--json")
    )
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert len(shards) > 2
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == facts["bytes"] == sum(value.nbytes for value in whole.values())
    for shard in shards:
        found = load_file(shard)
        assert len(found) == 1 or sum(value.nbytes for value in found.values()) <= 40_000
        assert all(torch.equal(value, whole[name]) for name, value in found.items())


def test_a_folder_has_all_that_other_programs_read(
    make_run: Callable[..., Path], call: Callable[..., str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    call("export", make_run(), "--out", out, "--to", "hf", "--dtype", "bf16")
    assert {path.name for path in out.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md",
    }  # fmt: skip
    config = json.loads((out / "config.json").read_text())
    assert (config["torch_dtype"], config["eos_token_id"], config["n_ctx"]) == ("bfloat16", 256, 80)
    card = (out / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "| Trained for | 10 steps, 1,000 tokens |" in card


def test_nothing_is_left_of_an_export_that_fails(
    make_run: Callable[..., Path], call: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, place = make_run(), tmp_path / "place"
    place.mkdir()
    monkeypatch.setattr("scalegpt.export.compare._our_logits", lambda *_: torch.tensor(100.0))
    pytest.importorskip("transformers")
    assert "transformers computes other logits" in call("export", run, "--to", "hf", "--out", place / "out", status=1)
    monkeypatch.setattr("scalegpt.export.huggingface.model_card", lambda *_: 1 / 0)
    assert "ZeroDivisionError" in call("export", run, "--to", "hf", "--out", place / "out", status=1)
    assert list(place.iterdir()) == []


def test_what_exists_is_not_replaced(make_run: Callable[..., Path], call: Callable[..., str], tmp_path: Path) -> None:
    run, out = make_run(), tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    for words in (("hf", out), ("hf", out / "mine"), ("gguf", out / "mine"), ("safetensors", out / "mine")):
        assert "exists already; choose another --out" in call(
            "export", run, "--to", words[0], "--out", words[1], status=2
        )
    assert (out / "mine").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--out", "x"), "--to is required: hf, gguf or safetensors"),
        (("--to", "onnx", "--out", "x"), "onnx"),
        (("--to", "hf"), "--out"),
        (
            ("--to", "hf", "--out", "x.gguf"),
            "x.gguf: .gguf means llama.cpp's format, but --to hf writes a folder; use --out x",
        ),
        (("--to", "gguf", "--out", "x.safetensors"), "--to gguf writes GGUF; use --out x.gguf"),
        (("--to", "hf", "--out", "x", "--max_shard_size", "big"), "max_shard_size must be a size such as 5GB"),
        (("--to", "hf", "--out", "x", "--max_shard_size", "0"), "max_shard_size must be a size such as 5GB"),
        (("--to", "hf", "--out", "x", "--checkpoint", "99"), "step_00000099"),
    ],
)
def test_bad_command_lines_are_refused(
    make_run: Callable[..., Path], call: Callable[..., str], words: tuple[str, ...], expected: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert expected in call("export", make_run(), *words, status=2)
    assert not list(tmp_path.glob("x*"))


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_a_shape_that_no_family_has_is_refused_with_what_would_do(
    make_run: Callable[..., Path], call: Callable[..., str], to: str, tmp_path: Path
) -> None:
    run = make_run(parallel_block=True)
    said = call("export", run, "--to", to, "--out", tmp_path / "out", status=2)
    assert "no Hugging Face family has this shape; the nearest is" in said
    assert not (tmp_path / "out").exists()


def test_without_transformers_the_folder_is_written_and_that_is_said(
    make_run: Callable[..., Path], call: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scalegpt.export.compare.find_spec", lambda _: None)
    said = call("export", make_run(), "--to", "hf", "--out", tmp_path / "out")
    assert "logits not compared: transformers is not installed" in said
    assert (tmp_path / "out" / "model.safetensors").is_file()
