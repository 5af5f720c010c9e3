"""Loading a trained model: which checkpoint, in what precision, and the errors."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from manifests import rewrite
from replaced import replaced_at
from scalegpt.checkpoint.manifest import WEIGHTS, file_name
from scalegpt.checkpoint.store import find_checkpoints
from scalegpt.data.tokenizers import make_tokenizer
from scalegpt.errors import InputError
from scalegpt.inference.load import load_model
from scalegpt.training.runs.find import newest_checkpoint


def test_the_newest_checkpoint_of_a_run_is_loaded_exactly(tiny_run: Any, tiny_model: Any) -> None:
    run = tiny_run(steps=(10, 30, 20))
    model, tokenizer, header = load_model(run, "cpu")
    assert header.progress.step == 30
    assert tokenizer.kind == "byte"
    assert not model.training
    expected = dict(tiny_model(seed=30, vocab_size=257).named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
        assert not parameter.requires_grad


def test_a_checkpoint_and_the_folder_of_checkpoints_work_too(tiny_run: Any) -> None:
    run = tiny_run(steps=(10, 20))
    older = find_checkpoints(run / "checkpoints")[0]
    assert load_model(older, "cpu").header.progress.step == 10
    assert newest_checkpoint(run / "checkpoints").name == "step_00000020"


@pytest.mark.parametrize("shape", [{"bias": True, "tie_head": False}, {"activation": "gelu_tanh", "dropout": 0.2}])
def test_every_variant_of_the_model_comes_back(tiny_run: Any, tiny_model: Any, shape: dict[str, Any]) -> None:
    loaded = load_model(tiny_run(**shape), "cpu")
    original = tiny_model(seed=10, vocab_size=257, **shape).eval()
    x = torch.arange(16).view(1, 16)
    assert loaded.model.config == original.config
    assert torch.equal(loaded.model(x), original(x))


def test_a_gpt2_tokenizer_comes_with_its_padding(tiny_run: Any) -> None:
    loaded = load_model(tiny_run(tokenizer=make_tokenizer("gpt2"), n_embd=4), "cpu")
    assert (loaded.tokenizer.vocab_size, loaded.model.config.vocab_size) == (50257, 50304)


def test_matrices_lie_in_the_compute_dtype_and_give_the_same_logits(tiny_run: Any, tiny_model: Any) -> None:
    x = torch.arange(16).view(1, 16)
    for name, residual in (("one", torch.bfloat16), ("two", torch.float32)):
        word = "fp32" if residual == torch.float32 else "compute"
        model = load_model(tiny_run(name, bias=True, train={"residual_dtype": word}), "cpu", precision="bf16").model
        assert {parameter.dtype for parameter in model.parameters() if parameter.dim() > 1} == {torch.bfloat16}
        masters = tiny_model(seed=10, vocab_size=257, bias=True).eval()
        masters.set_precision(torch.bfloat16, residual)
        assert torch.equal(model(x), masters(x))


def error_line(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_model(path, "cpu")
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_a_missing_run_names_the_nearest(tiny_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run("shakespeare")
    assert "did you mean shakespeare?" in error_line(run.with_name("shakespear"))
    assert "train one first" in error_line(tmp_path / "nowhere" / "tiny")
    tiny_run("runs/dante")
    monkeypatch.chdir(tmp_path)
    assert "did you mean runs/dante?" in error_line(Path("dante"))


def test_a_run_without_checkpoints_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.yaml").write_text("{}")
    line = error_line(tmp_path / "new")
    assert "no checkpoint yet" in line
    assert "--checkpoint_every" in line


def test_a_run_whose_checkpoints_are_gone_is_not_told_to_train_longer(tmp_path: Path) -> None:
    run = tmp_path / "old"
    (run / "checkpoints").mkdir(parents=True)
    (run / "run_status.json").write_text(json.dumps({"state": "finished", "checkpoint_step": 40}))
    expected = f"run {run} had a checkpoint of step 40, which is missing from {run}/checkpoints; restore it"
    assert error_line(run) == expected
    assert error_line(run / "checkpoints") == expected
    assert error_line(run / "checkpoints" / "step_00000040") == expected
    (run / "checkpoints").rmdir()
    assert error_line(run) == expected
    assert error_line(run / "checkpoints") == expected


def test_a_checkpoint_that_a_run_has_not_names_those_that_it_has(tiny_run: Any) -> None:
    run = tiny_run(steps=(10, 20))
    has = f"run {run} has no checkpoint step_00000030; it has step_00000010, step_00000020"
    assert error_line(run / "checkpoints" / "step_00000030") == has
    assert error_line(run / "step_00000030") == has
    assert "run has no checkpoint" not in error_line(run.parent / "step_00000030")
    assert error_line(run.with_name("tinny") / "checkpoints" / "step_00000010") == (
        f"run {run.with_name('tinny')} does not exist; did you mean tiny?"
    )
    for step in range(30, 100, 10):
        (run / "checkpoints" / f"step_000000{step}").mkdir()
    line = error_line(run / "checkpoints" / "step_1")
    assert line.endswith("it has step_00000010, …, step_00000060, step_00000070, step_00000080, step_00000090")


@pytest.mark.parametrize("moment", ["read_manifest", "os.scandir", "_check", "Checkpoint._slice"])
def test_a_checkpoint_that_training_deletes_meanwhile_gives_way_to_the_newest(
    tiny_run: Any, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    run = tiny_run(steps=(10, 20))
    replaced_at(moment, run, monkeypatch)
    assert load_model(run, "cpu").header.progress.step == 20


@pytest.mark.parametrize("moment", ["read_manifest", "os.scandir", "_check", "Checkpoint._slice"])
def test_a_checkpoint_that_was_named_and_is_deleted_meanwhile_is_missed(
    tiny_run: Any, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    run = tiny_run(steps=(10, 20))
    path = replaced_at(moment, run, monkeypatch)
    assert error_line(path) == (
        f"{path} was deleted while it was being read; name another checkpoint, or its run for the newest"
    )


def test_a_folder_of_runs_is_not_a_run(tiny_run: Any, tmp_path: Path) -> None:
    tiny_run("a")
    tiny_run("b")
    assert error_line(tmp_path).endswith("; it contains these runs: a, b")
    (tmp_path / "empty").mkdir()
    assert "runs/NAME" in error_line(tmp_path / "empty")
    (tmp_path / "file.txt").write_text("text")
    assert "neither a run nor a checkpoint" in error_line(tmp_path / "file.txt")


def test_a_damaged_checkpoint_is_refused(tiny_run: Any) -> None:
    run = tiny_run()
    checkpoint = newest_checkpoint(run)
    file = checkpoint / file_name(0, WEIGHTS)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "rank_00000.weights.safetensors is damaged" in error_line(run)
    assert "there is no earlier checkpoint" in error_line(run)
    earlier = checkpoint.with_name("step_00000001")
    earlier.mkdir()
    assert error_line(run).endswith(f"give an earlier checkpoint by its path: {earlier}")
    earlier.rmdir()
    file.unlink()
    assert "rank_00000.weights.safetensors is missing" in error_line(run)
    (checkpoint / "checkpoint.json").unlink()
    assert "checkpoint.json is missing" in error_line(run)


def test_weights_of_another_shape_are_refused(tiny_run: Any) -> None:
    for key, value, words in (
        ("n_embd", 64, "weight blocks.0.attn.proj.weight has shape (32, 32)"),
        ("n_layer", 1, "describes no such weight"),
        ("n_layer", 3, "weight blocks.2.ln1.weight is missing"),
        ("n_head", 5, "not divisible"),
    ):
        run = tiny_run(f"{key}{value}")
        rewrite(newest_checkpoint(run), lambda document: document["config"]["model"].update({key: value}))  # noqa: B023
        assert words in error_line(run)
    run = tiny_run("muddle")
    rewrite(newest_checkpoint(run), lambda document: document["config"].pop("model"))
    assert "has no model" in error_line(run)


def with_losses(run: Path, losses: dict[int, float | None]) -> Path:
    """Give each checkpoint a held-out loss; None: no evaluation."""
    for step, loss in losses.items():
        path = run / "checkpoints" / f"step_{step:08d}"
        rewrite(path, lambda document: document["progress"].update(val_loss=loss))  # noqa: B023
    return run


def test_the_best_checkpoint_and_one_of_a_step_are_loaded_by_their_words(tiny_run: Any) -> None:
    run = with_losses(tiny_run(steps=(10, 20, 30)), {10: 2.5, 20: 1.5, 30: None})
    for which, step in (("last", 30), ("best", 20), ("10", 10), ("00000020", 20)):
        assert load_model(run, "cpu", checkpoint=which).header.progress.step == step
        assert load_model(run / "checkpoints", "cpu", checkpoint=which).header.progress.step == step


@pytest.mark.parametrize(
    ("which", "words"),
    [
        ("newest", "checkpoint must be a step, best or last, not 'newest'"),
        ("-1", "checkpoint must be a step, best or last"),
        ("40", "has no checkpoint step_00000040; it has step_00000010, step_00000020"),
        ("best", "has a held-out loss; use --checkpoint last, or a step"),
    ],
)
def test_a_checkpoint_that_cannot_be_chosen_is_refused(tiny_run: Any, which: str, words: str) -> None:
    run = tiny_run(steps=(10, 20))
    with pytest.raises(InputError, match=re.escape(words)):
        load_model(run, "cpu", checkpoint=which)


@pytest.mark.parametrize("which", ["best", "10"])
def test_a_checkpoint_holds_no_others_to_choose(tiny_run: Any, which: str) -> None:
    path = newest_checkpoint(tiny_run())
    with pytest.raises(InputError, match="is a checkpoint itself; give its run's folder"):
        load_model(path, "cpu", checkpoint=which)


@pytest.mark.parametrize(
    ("word", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_the_precision_that_is_asked_for_is_computed_in(tiny_run: Any, word: str, dtype: torch.dtype) -> None:
    model = load_model(tiny_run(), "cpu", precision=word).model
    assert (model.compute_dtype, model.wte.weight.dtype) == (dtype, dtype)
    exact = load_model(newest_checkpoint(tiny_run("other")), "cpu").model
    x = torch.arange(16).view(1, 16)
    assert model(x).dtype == torch.float32
    assert torch.allclose(model(x), exact(x), atol=0.05)
