"""``scalegpt train``: what a run leaves, going on where it was interrupted, and every bad input's one line."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from scalegpt.backends.base import LossScaler
from scalegpt.checkpoint.reader import Checkpoint, read_manifest
from scalegpt.checkpoint.store import find_checkpoints
from scalegpt.cli.main import main
from scalegpt.training import trainer

TEXT = "".join(f"{n} green bottles hanging on the wall, and if one should fall, {n - 1}.\n" for n in range(200, 0, -1))

RUN = {
    "input_file": "text.txt", "model_name": "run", "tokenizer": "byte", "vocab_size": "auto", "device": "cpu",
    "n_layer": 1, "n_embd": 16, "n_head": 2, "block_size": 16, "precision": "fp32", "learning_rate": "1e-2",
    "micro_batch": 4, "tokens_per_step": 128, "max_iters": 12, "warmup_steps": 2, "eval_every": 4, "eval_tokens": 200,
    "checkpoint_every": 4, "sample_every": 4, "sample_tokens": 8, "log_every": 1,
}  # fmt: skip

LEFT = {
    "checkpoints", "config.yaml", "data_ledger.jsonl", "metrics.jsonl", "plan.json", "report.html", "run_status.json",
    "samples.txt",
}  # fmt: skip


def seen(folder: Path) -> set[str]:
    """What a user sees in a folder: its lock is hidden."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


Words = list[str]


def command(**changes: Any) -> Words:
    """The words of a small run's command; a change to None drops the flag, to True makes it a bare one."""
    flags = {key: value for key, value in {**RUN, **changes}.items() if value is not None}
    return ["train", *(word for key, value in flags.items() for word in _words(key, value))]


def _words(key: str, value: Any) -> Words:
    return [f"--{key}"] if value is True else [f"--{key}", str(value)]


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCALEGPT_CACHE", str(tmp_path / "cache"))
    Path("text.txt").write_text(TEXT)


@pytest.fixture
def train(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command; its standard output."""

    def run(**changes: Any) -> str:
        capsys.readouterr()
        status = main(command(**changes))
        captured = capsys.readouterr()
        assert status == 0, captured.err
        return captured.out

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command in vain; its one line of complaint. Nothing under ``runs`` may have changed."""

    def run(words: Words) -> str:
        before = snapshot()
        capsys.readouterr()
        assert main(words) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("scalegpt train: error: ")
        assert captured.err.count("\n") == 1
        assert snapshot() == before
        return captured.err

    return run


def snapshot(folder: Path = Path("runs")) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def metrics(run: str = "run") -> tuple[list[Any], list[Any]]:
    """The lines of steps and those of evaluations."""
    lines = [json.loads(line) for line in Path("runs", run, "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line], [line for line in lines if "val_loss" in line]


def status(run: str = "run") -> Any:
    return json.loads(Path("runs", run, "run_status.json").read_text())


def final_state(run: str = "run") -> dict[str, torch.Tensor]:
    newest = Checkpoint.open(find_checkpoints(Path("runs", run, "checkpoints"))[-1])
    newest.verify()
    state = {}
    for entry, tensor in newest.manifest.tensors.items():
        key, _, name = entry.partition("/")
        state[entry] = newest.read(name, key, 0, math.prod(tensor.shape))
    return state


def assert_same_run(one: str, other: str) -> None:
    """Losses, rates, norms and evaluations, in order, and every weight and moment, to the last bit."""
    for mine, theirs in zip(metrics(one), metrics(other), strict=True):
        kept = [
            {key: line.get(key) for key in ("step", "tokens", "loss", "lr", "grad_norm", "val_loss")} for line in mine
        ]
        assert kept == [{key: line.get(key) for key in kept[0]} for line in theirs]
    first, second = final_state(one), final_state(other)
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
    assert Path("runs", one, "samples.txt").read_text() == Path("runs", other, "samples.txt").read_text()
    timeless = ("state", "step", "cause", "val_loss", "best_val_loss", "skipped_steps")
    assert [status(one)[key] for key in timeless] == [status(other)[key] for key in timeless]


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch, error: type[BaseException] = KeyboardInterrupt) -> None:
    """Let the next run be interrupted as it is about to take a step."""
    real = trainer.learning_rate

    def rate(settings: Any, at: int, total: int) -> float:
        if at == step:
            monkeypatch.setattr(trainer, "learning_rate", real)
            raise error
        return real(settings, at, total)

    monkeypatch.setattr(trainer, "learning_rate", rate)


# --- what a run leaves -----------------------------------------------------------------------------------------------


def test_a_run_writes_the_documented_files(train: Callable[..., str]) -> None:
    out = train()
    folder = Path("runs/run")
    assert seen(folder) == LEFT
    assert [path.name for path in find_checkpoints(folder / "checkpoints")] == ["step_00000008", "step_00000012"]
    steps, evaluations = metrics()
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert [line["tokens"] for line in steps] == list(range(128, 128 * 13, 128))
    promised = {
        "step", "tokens", "loss", "lr", "grad_norm", "step_seconds", "tokens_per_second", "mfu", "peak_bytes",
        "host_used_bytes", "process_bytes",  # at every log_every-th step
    }  # fmt: skip
    assert all(set(line) == promised for line in steps)
    assert all(line["mfu"] is None for line in steps)  # a CPU's peak is not known
    assert [line["step"] for line in evaluations] == [4, 8, 12]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    left = status()
    assert (left["state"], left["step"], left["cause"]) == ("finished", 12, "all steps taken")
    assert left["measured_peak_bytes"] >= 0
    assert left["measured_by"] == "peak of the process's resident memory"
    assert (left["measured_reserved_bytes"], left["measured_driver_bytes"]) == (None, None)
    assert left["val_loss"] == evaluations[-1]["val_loss"]
    plan = json.loads((folder / "plan.json").read_text())
    memory = plan["memory"]
    assert left["predicted_peak_bytes"] == memory["peak_bytes"] == memory["phases"][memory["binding_phase"]] > 0
    assert sum(memory["breakdown"].values()) == memory["peak_bytes"]
    assert memory["peak_bytes"] + sum(memory["overheads"].values()) == memory["total_bytes"]  # of the whole process
    assert left["predicted_total_bytes"] == memory["total_bytes"]
    assert "MiB peak of the step (phase " in out
    assert "iB measured (peak of the process's resident memory" in out
    assert not Path("cache/calibration.json").exists()  # a CPU's memory says nothing of a GPU's
    assert (plan["micro_batch"], plan["grad_accum"], plan["tokens_per_step"], plan["steps"]) == (4, 2, 128, 12)
    assert (folder / "samples.txt").read_text().count("--- step ") == 3
    assert "12 steps" in (folder / "report.html").read_text()
    assert f"done: {folder}/ holds {', '.join(sorted(LEFT))}" in out
    assert "step 12/12  loss" in out
    assert f"files    {folder}/\n" in out
    assert re.search(r"^time     \d+ s for 12 steps and 1,536 tokens$", out, re.MULTILINE)
    assert re.search(r"^loss     (held-out [\d.]+, )?best held-out [\d.]+ at step \d+$", out, re.MULTILINE)
    assert re.search(r"^next     \S*scalegpt sample \S+ --prompt", out, re.MULTILINE)


def test_the_configuration_is_resolved_and_repeats_the_run(train: Callable[..., str]) -> None:
    train(precision="auto", tokens_per_step=None)
    config = yaml.safe_load(Path("runs/run/config.yaml").read_text())
    assert config["model"]["vocab_size"] == 257
    assert config["train"]["precision"] in {"fp32", "bf16"}
    assert config["train"]["tokens_per_step"] == 64
    assert config["zero_stage"] == 0
    Path("again.yaml").write_text(Path("runs/run/config.yaml").read_text())
    assert main(["train", "--config_file", "again.yaml", "--model_name", "again", "--device", "cpu"]) == 0
    assert_same_run("run", "again")


def test_flags_may_be_spelled_either_way(train: Callable[..., str]) -> None:
    train()
    words = command(model_name="hyphens")
    assert main([word.replace("_", "-") if word.startswith("--") else word for word in words]) == 0
    assert_same_run("run", "hyphens")


def test_a_folder_of_prepared_tokens_names_the_tokenizer(train: Callable[..., str]) -> None:
    assert main(["data", "prepare", "text.txt", "--tokenizer", "char", "--out", "tokens"]) == 0
    train(input_file="tokens", tokenizer=None, model_name="prepared")
    assert yaml.safe_load(Path("runs/prepared/config.yaml").read_text())["data"]["tokenizer"] == "char"
    train(tokenizer="char")
    assert_same_run("run", "prepared")


def test_a_limit_of_tokens_or_minutes_ends_the_run(train: Callable[..., str]) -> None:
    train(max_tokens=128 * 5 + 1)
    assert status()["step"] == 6
    train(max_iters=None, max_tokens=256, model_name="tokens")
    assert status("tokens")["step"] == 2
    train(max_minutes=1e-9, model_name="minutes")
    left = status("minutes")
    assert (left["state"], left["step"], left["cause"]) == ("stopped", 1, "max_minutes 1e-09 reached")
    assert "resumed" in train(max_minutes=1e-9, model_name="minutes")
    assert status("minutes")["step"] == 2  # one step at least: running the command again gets on
    train(model_name="minutes")
    train(model_name="undisturbed")
    steps, _ = metrics("minutes")
    assert [line["loss"] for line in steps] == [line["loss"] for line in metrics("undisturbed")[0]]


def test_two_lengths_are_reported_and_one_replaces_the_default(train: Callable[..., str]) -> None:
    said = train(max_tokens=256, max_iters=3)
    assert "the run ends after 2 steps, the shorter of max_iters 3 and max_tokens 256; --max_tokens none trains" in said
    assert "the run ends after" not in train(max_iters=None, max_tokens=128 * 1001, max_minutes=1e-9, model_name="long")
    plan = json.loads(Path("runs/long/plan.json").read_text())
    assert plan["steps"] == 1001  # the default of 1,000 steps does not cut it
    again = ["train", "--config_file", "runs/long/config.yaml", "--input_file", "text.txt", "--device", "cpu"]
    assert main([*again, "--model_name", "same", "--max_minutes", "1e-9"]) == 0
    assert json.loads(Path("runs/same/plan.json").read_text())["steps"] == 1001


def test_zero_steps_save_the_initial_weights(train: Callable[..., str]) -> None:
    said = "no step was taken: max_iters is 0; give a larger --max_iters to train\n"
    assert train(max_iters=0).endswith(said)
    assert seen(Path("runs/run")) == LEFT
    assert status()["step"] == 0
    assert metrics()[0] == []
    before = snapshot()
    assert "nothing left to do" in train(max_iters=0)
    assert snapshot() == before
    assert said not in train()
    train(model_name="undisturbed")
    assert metrics()[0][-1]["loss"] == metrics("undisturbed")[0][-1]["loss"]


def test_samples_and_schedule_are_optional(train: Callable[..., str]) -> None:
    train(sample_tokens=0, eval_every=0, checkpoint_every=0, sample_every=0)
    assert seen(Path("runs/run")) == LEFT - {"samples.txt"}
    assert [line["step"] for line in metrics()[1]] == [12]
    assert [path.name for path in find_checkpoints(Path("runs/run/checkpoints"))] == ["step_00000012"]


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": "wsd", "activation": "gelu_tanh", "tie_head": "false", "bias": "true"},
        {"recompute": "full", "loss": "full", "fused": "false", "attention": "math", "compile": "off"},
        {"micro_batch": "auto", "sample_prompt": "ten green", "residual_dtype": "fp32", "optimizer": "adamw"},
        {"backend": "plain", "zero_stage": 0, "offload": "none", "max_minutes": 60, "seed": 2**62, "dropout": 0.1},
    ],
)
def test_settings_of_every_kind_are_taken(train: Callable[..., str], changes: dict[str, Any]) -> None:
    train(**changes)
    assert status()["state"] == "finished"
    if "sample_prompt" in changes:
        assert "--- step 12\nten green" in Path("runs/run/samples.txt").read_text()


# --- going on --------------------------------------------------------------------------------------------------------


@pytest.fixture
def large_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let fp16 begin with a loss scale so large that the first steps must be skipped."""
    real = LossScaler.for_precision

    def start(precision: str) -> LossScaler:
        scaler = real(precision)
        scaler.scale = 2.0**22 if scaler.dynamic else 1.0
        return scaler

    monkeypatch.setattr(LossScaler, "for_precision", start)


@pytest.mark.usefixtures("large_scale")
@pytest.mark.parametrize(
    ("step", "changes"),
    [
        (2, {}),
        (6, {}),
        (11, {}),
        (6, {"dropout": 0.1}),
        (6, {"precision": "fp16"}),
        (6, {"precision": "bf16", "fused": "false"}),
        (6, {"optimizer": "muon"}),
    ],
)
@pytest.mark.slow
def test_an_interrupted_run_resumes_bit_for_bit(
    train: Callable[..., str], monkeypatch: pytest.MonkeyPatch, step: int, changes: dict[str, Any]
) -> None:
    train(model_name="undisturbed", **changes)
    interrupt_at(step, monkeypatch)
    assert main(command(**changes)) == 130
    assert (status()["state"], status()["step"], status()["cause"]) == ("stopped", step, "interrupted")
    out = train(**changes)
    assert ("resumed  from" in out) == (step >= 4)
    assert_same_run("undisturbed", "run")


@pytest.mark.usefixtures("large_scale")
def test_fp16_finds_its_loss_scale_by_skipping_steps(train: Callable[..., str]) -> None:
    out = train(precision="fp16")
    progress = read_manifest(find_checkpoints(Path("runs/run/checkpoints"))[-1]).header.progress
    assert status()["skipped_steps"] == progress.skipped_steps > 0
    assert progress.loss_scale == 2.0 ** (22 - progress.skipped_steps)
    assert f"{progress.skipped_steps} skipped" in out
    steps, _ = metrics()
    assert [line["grad_norm"] for line in steps].count(None) == progress.skipped_steps
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.3


def test_a_failed_run_says_why_and_can_resume(
    train: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(model_name="undisturbed")
    interrupt_at(10, monkeypatch, OverflowError)
    assert main(command()) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert status()["state"] == "failed"
    assert status()["cause"].startswith("OverflowError")
    train()
    assert_same_run("undisturbed", "run")


def test_a_finished_run_is_not_changed(train: Callable[..., str]) -> None:
    train()
    before = snapshot()
    out = train()
    assert "nothing left to do: 12 of 12 steps are taken" in out
    assert "loss" not in out.split("nothing left to do")[1]
    assert snapshot() == before


def test_a_finished_run_killed_before_its_report_gets_one(train: Callable[..., str]) -> None:
    train()
    whole = status()
    Path("runs/run/report.html").unlink()
    Path("runs/run/run_status.json").write_text(json.dumps({**whole, "state": "running", "cause": None}))
    train()
    timeless = {key: value for key, value in status().items() if key != "measured_peak_bytes"}
    assert timeless == {key: value for key, value in whole.items() if key != "measured_peak_bytes"}
    assert Path("runs/run/report.html").is_file()


def test_more_steps_and_another_micro_batch_resume(train: Callable[..., str]) -> None:
    train(schedule="constant", max_iters=8, micro_batch=8, sample_prompt="1")
    assert "resumed  from runs/run/checkpoints/step_00000008, step 8 of 12" in train(schedule="constant", micro_batch=2)
    train(schedule="constant", model_name="undisturbed")
    for one, other in zip(metrics()[0], metrics("undisturbed")[0], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_a_moved_text_is_the_same_text(train: Callable[..., str]) -> None:
    train(max_iters=4)
    Path("text.txt").rename("moved.txt")
    assert "resumed" in train(input_file="moved.txt")


def test_fresh_starts_a_new_run_that_its_config_file_resumes(train: Callable[..., str]) -> None:
    train()
    before = snapshot()
    train(fresh=True, learning_rate="2e-2")
    assert before.items() <= snapshot().items()
    config = yaml.safe_load(Path("runs/run-2/config.yaml").read_text())
    assert config["name"] == "run-2"
    train(fresh=True)
    assert_same_run("run", "run-3")


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["rank_00000.weights.safetensors", "rank_00000.moments.safetensors", "checkpoint.json"]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(train: Callable[..., str], name: str) -> None:
    train(model_name="undisturbed")
    train()
    file = Path("runs/run/checkpoints/step_00000012", name)
    flip(file)
    out = train()
    assert f"{file} is damaged" in out
    assert "going back to runs/run/checkpoints/step_00000008, the last good checkpoint" in out
    assert "resumed  from runs/run/checkpoints/step_00000008, step 8 of 12" in out
    assert_same_run("undisturbed", "run")
    assert Path("runs/run/checkpoints/step_00000012.damaged", name).is_file()


def test_a_checkpoint_that_lost_its_manifest_is_a_damaged_one(train: Callable[..., str]) -> None:
    train()
    Path("runs/run/checkpoints/step_00000012/checkpoint.json").unlink()
    assert "step_00000012/checkpoint.json is missing; going back to" in train()


def test_without_a_whole_checkpoint_training_does_not_start_over(
    train: Callable[..., str], refused: Callable[..., str]
) -> None:
    train()
    for checkpoint in find_checkpoints(Path("runs/run/checkpoints")):
        flip(checkpoint / "rank_00000.weights.safetensors")
    before = snapshot()
    line = refused(command())
    assert "none of the 2 checkpoints is whole" in line
    for name in ("step_00000012", "step_00000008"):
        assert f"{name}/rank_00000.weights.safetensors is damaged" in line
    assert "--fresh starts a new run" in line
    assert snapshot() == before


def test_another_run_s_checkpoint_needs_a_flag(train: Callable[..., str], refused: Callable[..., str]) -> None:
    train(max_iters=4)
    train(model_name="other", max_iters=8)
    stranger = Path("runs/run/checkpoints/step_00000008")
    Path("runs/other/checkpoints/step_00000008").rename(stranger)
    line = refused(command())
    assert f"{stranger} was not written by this run; add --trust_checkpoint" in line
    assert f"resumed  from {stranger}, step 8 of 12" in train(trust_checkpoint=True)
    assert "nothing left to do" in train()  # the newest is its own again


def test_resume_step_goes_back_to_that_step(train: Callable[..., str], refused: Callable[[Words], str]) -> None:
    train(model_name="whole")
    train()
    for words, value in (("is not the step", "x"), ("is not the step", "-4"), ("is not the step", "9" * 4400)):
        assert words in refused(command(resume_step=value))
    assert "give one of them" in refused(command(resume_step=8, fresh=True))
    assert "has no checkpoint of step 9; it has 8, 12" in refused(command(resume_step=9))
    out = train(resume_step=8)
    assert "resumed  from runs/run/checkpoints/step_00000008, step 8 of 12; steps 9 to 12 were taken before" in out
    assert_same_run("whole", "run")
    assert status()["checkpoint_step"] == 12
    assert "nothing left to do" in train()
    capture = Path("runs/run/checkpoints/step_00000012.replaced")
    assert capture.is_dir()


def test_async_and_blocking_checkpoints_are_equal(train: Callable[..., str]) -> None:
    out = train(model_name="waited", async_checkpoint="false")
    assert "step 8  checkpoint runs/waited/checkpoints/step_00000008" in out
    out = train()
    assert "step 12  checkpoint runs/run/checkpoints/step_00000012" in out
    assert_same_run("waited", "run")


@pytest.mark.parametrize("names", [("adamw", "muon"), ("muon", "adamw")])
def test_another_optimizer_starts_with_zero_moments(train: Callable[..., str], names: tuple[str, str]) -> None:
    train(optimizer=names[0], max_iters=6, checkpoint_every=0)
    before = dict(Checkpoint.open(find_checkpoints(Path("runs/run/checkpoints"))[-1]).manifest.tensors)
    out = train(optimizer=names[1], max_iters=12, allow_change="optimizer", checkpoint_every=0)
    assert f"changed  optimizer: {names[0]} → {names[1]}" in out
    after = Checkpoint.open(find_checkpoints(Path("runs/run/checkpoints"))[-1]).manifest.tensors
    assert {name for name in before if name.startswith("weight/")} == {
        name for name in after if name.startswith("weight/")
    }
    for tensors, optimizer in zip((before, after), names, strict=True):
        assert any(name.startswith("momentum_buffer/") for name in tensors) == (optimizer == "muon")
    losses = [line["loss"] for line in metrics()[0]]
    assert len(losses) == 12
    assert losses[-1] < losses[5]


def test_checkpoints_by_minutes(train: Callable[..., str]) -> None:
    train(checkpoint_every=0, checkpoint_minutes=1e-9, keep_checkpoints=100)
    assert len(find_checkpoints(Path("runs/run/checkpoints"))) == 12
    train(model_name="seldom", checkpoint_every=0, checkpoint_minutes=1000)
    assert len(find_checkpoints(Path("runs/seldom/checkpoints"))) == 1


# --- bad input -------------------------------------------------------------------------------------------------------


BAD: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no input": ({"input_file": None}, ("no data", "--input_file")),
    "missing": ({"input_file": "text.tx"}, ("text.tx",)),
    "empty": ({"input_file": "empty.txt"}, ("empty.txt is empty", "name a file with text")),
    "binary": ({"input_file": "binary.dat"}, ("binary.dat is binary", "name a text file")),
    "latin-1": ({"input_file": "latin.txt"}, ("latin.txt is not UTF-8", "byte 0xec", "--encoding latin-1")),
    "short": ({"input_file": "short.txt"}, ("short.txt gives", "--block_size")),
    "few held out": ({"input_file": "middling.txt"}, ("held-out tokens", "--val_fraction")),
    "vocabulary": ({"vocab_size": 10}, ("outside the vocabulary of 10", "--vocab_size auto")),
    "heads": ({"n_head": 3}, ("n_embd 16 is not divisible by n_head 3", "would work")),
    "preset": ({"preset": "tinny"}, ("'tinny'", "did you mean tiny?")),
    "two sources": ({"preset": "tiny", "config_file": "x.json"}, ("not both",)),
    "config missing": ({"config_file": "absent.json"}, ("absent.json", "--preset NAME")),
    "config key": ({"config_file": "typo.json"}, ("typo.json", "'n_layers'", "did you mean n_layer?")),
    "flag": ({"n_layers": 2}, ("unknown flag --n_layers", "did you mean --n_layer")),
    "not a number": ({"n_layer": "two"}, ("n_layer must be a whole number", "'two'")),
    "out of bounds": ({"learning_rate": 0}, ("learning_rate must be more than 0",)),
    "precision": ({"precision": "fp8"}, ("'fp8' is not a value of precision", "fp16")),
    "offload": ({"offload": "optimizer"}, ("needs backend fsdp or deepspeed",)),
    "stage": ({"zero_stage": 3}, ("zero_stage 3 does not exist for backend plain",)),
    "ds_config of plain": ({"ds_config": "zero2.json"}, ("needs backend deepspeed",)),
    "ds_config missing": ({"backend": "deepspeed", "ds_config": "zero9.json"}, ("zero9.json", "did you mean zero")),
    "ds_config stage": (
        {"backend": "deepspeed", "zero_stage": 1, "ds_config": "zero2.json"}, ("is for ZeRO stage 2", "--zero_stage 2"),
    ),
    "muon offloaded": (
        {"optimizer": "muon", "backend": "fsdp", "zero_stage": 3, "offload": "all"},
        ("muon cannot be offloaded", "--offload none"),
    ),
    "muon of zero": (
        {"optimizer": "muon", "backend": "deepspeed", "zero_stage": 2}, ("muon", "stage 2 clips", "--backend fsdp"),
    ),
    "attention": ({"attention": "cudnn"}, ("attention cudnn does not run here (cpu", "--attention auto")),
    "slashes": ({"model_name": "../run"}, ("'../run'", "--model_name")),
    "no name": ({"preset": "tiny", "model_name": ""}, ("model_name ''", "--model_name")),
    "negative": ({"learning_rate": "-1e-3"}, ("learning_rate must be more than 0, not -0.001",)),
    "abbreviation": ({"keep": 0}, ("unknown flag --keep; did you mean", "--keep_checkpoints")),
    "dots": ({"model_name": ".."}, ("'..'", "--model_name")),
    "micro batch": ({"micro_batch": 3}, ("micro_batch 3 does not divide", "--micro_batch 2", "--tokens_per_step")),
    "tokens per step": ({"tokens_per_step": 100}, ("tokens_per_step 100", "96 or 112 would work")),
    "no end": ({"max_iters": "none"}, ("max_iters or max_tokens",)),
    "prompt": ({"tokenizer": "char", "sample_prompt": "É"}, ("sample_prompt", "'É'")),
    "runs_dir": ({"runs_dir": "text.txt/runs"}, ("runs_dir text.txt/runs", "--runs_dir")),
    "runs_dir is a file": ({"runs_dir": "text.txt"}, ("runs_dir text.txt", "--runs_dir")),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_refused_in_one_line(refused: Callable[..., str], kind: str) -> None:
    Path("empty.txt").touch()
    Path("binary.dat").write_bytes(bytes(range(256)) * 8)
    Path("latin.txt").write_bytes("così è la vita, perché no\n".encode("latin-1") * 40)
    Path("short.txt").write_text("short")
    Path("middling.txt").write_text(TEXT[:100])
    Path("typo.json").write_text('{"model": {"n_layers": 2}}')
    changes, fragments = BAD[kind]
    line = refused(command(**changes))
    for fragment in fragments:
        assert fragment in line
    assert not Path("runs").exists()


@pytest.mark.parametrize("command_name", ["train", "plan", "params"])
def test_the_help_explains_its_defaults(command_name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command_name, "--help"])
    text = capsys.readouterr().out
    note = "[value] after a flag: its default, unless the preset or a configuration file sets another value\n"
    assert text.count(note) == 1
    assert text.index(note) < text.index("usage:")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_cuda_is_refused(refused: Callable[..., str]) -> None:
    assert "--device cpu" in refused(command(device="cuda"))


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"learning_rate": "2e-2"}, "learning_rate: 0.01 → 0.02"),
        ({"n_layer": 2}, "n_layer: 1 → 2"),
        ({"precision": "bf16"}, "precision: fp32 → bf16"),
        ({"tokens_per_step": 256}, "tokens_per_step: 128 → 256"),
        ({"tokenizer": "char"}, "vocab_size: 257 → 30, tokenizer: byte → char"),
        ({"seed": 1}, "seed: 1337 → 1"),
        ({"optimizer": "muon", "muon_lr": 0.5}, "optimizer: adamw → muon; --allow_change optimizer resumes with it"),
    ],
)
def test_another_run_of_that_name_is_refused(
    train: Callable[..., str], refused: Callable[..., str], changes: dict[str, Any], shown: str
) -> None:
    train()
    line = refused(command(**changes))
    assert f"runs/run holds another run: {shown}" in line
    assert "--fresh" in line


def test_another_text_under_that_name_is_refused(train: Callable[..., str], refused: Callable[..., str]) -> None:
    train()
    Path("text.txt").write_text(TEXT.replace("green", "brown"))
    line = refused(command())
    assert "was trained on other tokens than text.txt gives" in line
    assert "--fresh" in line


def test_a_run_folder_inside_its_data_is_not_read_as_data(train: Callable[..., str], tmp_path: Path) -> None:
    here = {"input_file": ".", "max_iters": 4}
    first = train(**here)
    tokens = next(line for line in first.splitlines() if line.startswith("data "))
    fresh = train(**here, fresh=True)
    assert tokens in fresh  # the run beside it is no text
    Path("notes.txt").write_text("what the user has noticed\n" * 20)
    again = train(**{**here, "max_iters": 8})
    assert "warning: . has changed since this run began; the run resumes with the tokens that it began with" in again
    assert "resumed  from" in again
    assert "8 of 8" in again or "step 8/8" in again
    taken = train(**{**here, "max_iters": 10}, allow_change="data")
    assert "changed  data: " in taken


def test_a_folder_that_is_not_a_run_is_not_changed(refused: Callable[..., str]) -> None:
    Path("runs/run").mkdir(parents=True)
    Path("runs/run/thesis.tex").write_text("years of work")
    assert "runs/run exists but holds no run; choose another --model_name" in refused(command())
    Path("runs/file").write_text("a file")
    assert "runs/file cannot hold a run" in refused(command(model_name="file"))
    Path("runs/run/config.yaml").write_text("[1, 2")
    assert "runs/run/config.yaml" in refused(command())


def test_a_disk_without_room_is_refused_before_training(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["data", "prepare", "text.txt", "--tokenizer", "byte", "--out", "tokens"]) == 0
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    line = refused(command(input_file="tokens"))
    assert "not enough disk space for runs/run/checkpoints" in line
    assert "1,000 are free" in line


def test_a_failure_in_training_is_one_line_and_status_1(
    train: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(max_iters=4)
    samples = Path("runs/run/samples.txt")
    kept = samples.read_text()
    samples.unlink()
    samples.symlink_to("absent/samples.txt")  # nothing can be appended to it
    assert main(command()) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "runs/run/samples.txt cannot be written" in line
    assert status()["state"] == "failed"
    samples.unlink()
    samples.write_text(kept)
    train()
    assert status()["state"] == "finished"


def test_a_gradient_that_stays_non_finite_ends_the_run(
    train: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("scalegpt.backends.plain.is_finite", lambda norm: False)
    assert main(command(max_skipped_in_a_row=3)) == 1
    line = capsys.readouterr().err
    assert "3 steps in a row up to step 3 were skipped (gradient not finite; last loss" in line
    assert "--learning_rate" in line
    assert (status()["state"], status()["skipped_steps"]) == ("failed", 3)
