"""``scalegpt train`` with bad steps, spikes and changed settings; ``scalegpt data ledger``."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from poison import garble, spoil
from scalegpt.checkpoint.reader import Checkpoint, read_manifest
from scalegpt.checkpoint.store import find_checkpoints
from scalegpt.cli.main import main
from scalegpt.training import trainer

TEXT = "".join(f"{n} green bottles hanging on the wall, and if one should fall, {n - 1}.\n" for n in range(200, 0, -1))
RUN = {
    "input_file": "text.txt", "model_name": "run", "tokenizer": "byte", "vocab_size": "auto", "device": "cpu",
    "n_layer": 1, "n_embd": 16, "n_head": 2, "block_size": 16, "precision": "fp32", "learning_rate": "1e-2",
    "micro_batch": 4, "tokens_per_step": 128, "max_iters": 16, "warmup_steps": 2, "eval_every": 8, "eval_tokens": 200,
    "checkpoint_every": 4, "keep_checkpoints": 9, "sample_tokens": 0, "log_every": 1, "spike_window": 4,
}  # fmt: skip
WINDOWS = 8  # of a step


def first_window(step: int) -> int:
    return (step - 1) * WINDOWS


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCALEGPT_CACHE", str(tmp_path / "cache"))
    Path("text.txt").write_text(TEXT)


@pytest.fixture
def train(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command; its output, or with ``fails`` its complaint."""

    def run(*, fails: int = 0, **changes: Any) -> str:
        capsys.readouterr()
        flags = {**RUN, **changes}
        status = main(["train", *(word for key, value in flags.items() for word in (f"--{key}", str(value)))])
        captured = capsys.readouterr()
        assert status == fails, captured.err
        return captured.err if fails else captured.out

    return run


def lines(run: str = "run") -> list[Any]:
    """The lines of steps."""
    every = [json.loads(line) for line in Path("runs", run, "metrics.jsonl").read_text().splitlines()]
    return [line for line in every if "loss" in line]


def status(run: str = "run") -> Any:
    return json.loads(Path("runs", run, "run_status.json").read_text())


def state(run: str) -> list[torch.Tensor]:
    newest = find_checkpoints(Path("runs", run, "checkpoints"))[-1]
    checkpoint = Checkpoint.open(newest)
    checkpoint.verify()
    shapes = {name: stored.shape for name, stored in checkpoint.manifest.tensors.items()}
    return [
        checkpoint.read(name.partition("/")[2], name.partition("/")[0], 0, math.prod(shapes[name])) for name in shapes
    ]


def same_state(one: str, other: str) -> bool:
    return all(torch.equal(a, b) for a, b in zip(state(one), state(other), strict=True))


def ledger(capsys: pytest.CaptureFixture[str], steps: str, run: str = "run") -> Any:
    capsys.readouterr()
    assert main(["data", "ledger", f"runs/{run}", "--steps", steps, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def stop_before(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = trainer.learning_rate

    def rate(settings: Any, at: int, total: int) -> float:
        if at == step - 1:
            monkeypatch.setattr(trainer, "learning_rate", real)
            raise KeyboardInterrupt
        return real(settings, at, total)

    monkeypatch.setattr(trainer, "learning_rate", rate)


# --- bad steps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_bad_step_is_skipped_counted_and_shown(
    train: Callable[..., str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    spoil(kind, {first_window(6)}, put=monkeypatch.setattr)
    out = train()
    reason = f"{kind} not finite"
    assert f"warning: step 6 is skipped: {reason}" in out
    assert [(line["step"], line["reason"]) for line in lines() if line.get("skipped")] == [(6, reason)]
    assert status()["skipped_steps"] == 1
    assert status()["last_skipped"] == {"step": 6, "reason": reason}
    assert "1 skipped" in out
    assert lines()[-1]["loss"] < lines()[0]["loss"] - 0.5


def test_bad_steps_in_a_row_end_the_run_with_their_samples_also_after_a_resume(
    train: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil("loss", {first_window(step) for step in range(7, 30)}, put=monkeypatch.setattr)
    stop_before(9, monkeypatch)
    train(fails=130, max_skipped_in_a_row=4)
    line = train(fails=1, max_skipped_in_a_row=4)  # steps 7 and 8 are in the checkpoint
    assert "4 steps in a row up to step 10 were skipped (loss not finite; last loss nan)" in line
    assert "bad_steps.jsonl names their samples" in line
    assert (status()["state"], status()["skipped_steps"]) == ("failed", 4)
    assert "were skipped" in status()["cause"]
    bad = [json.loads(text) for text in Path("runs/run/bad_steps.jsonl").read_text().splitlines()]
    assert [each["step"] for each in bad] == [7, 8, 9, 10]
    assert [{"step": each["step"], "windows": each["windows"]} for each in bad] == ledger(capsys, "7:10")
    train(max_skipped_in_a_row=100)
    assert status()["state"] == "finished"


# --- spikes ----------------------------------------------------------------------------------------------------------


def test_a_spike_is_warned_of_and_trained_on(train: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    garble({first_window(10), first_window(11)}, put=monkeypatch.setattr)
    out = train(spike_factor=3)
    assert out.count("warning: loss spike at step 10: ") == 1
    assert out.count("loss spike") == 1
    assert [line["step"] for line in lines() if line.get("spike")] == [10, 11]
    assert status()["skipped_steps"] == 0
    train(model_name="off", on_spike="off")
    assert same_state("run", "off")


def test_a_spike_is_skipped(train: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    garble({first_window(10)}, put=monkeypatch.setattr)
    out = train(on_spike="skip", spike_factor=3)
    assert "loss spike at step 10: " in out
    assert "; the step is skipped" in out
    (line,) = [line for line in lines() if line.get("skipped")]
    assert (line["step"], line["reason"], line["spike"]) == (10, "loss spike", True)
    assert status()["skipped_steps"] == 1
    spoil("loss", {first_window(10)}, put=monkeypatch.setattr)
    train(model_name="spoiled", on_spike="off")
    assert same_state("run", "spoiled"), "a step that is left out must leave nothing, whatever its loss"


def test_a_rollback_continues_with_the_data_after_the_spike(
    train: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    garble({first_window(11), first_window(12)}, put=monkeypatch.setattr)
    flags = {"on_spike": "rollback", "spike_factor": 3, "spike_window": 4}
    out = train(**flags)
    # The spike begins at step 11 and shows again at once: first the windows up to step 11 go, then those of step 12,
    # whose turn comes as step 5, where the losses before are too few to judge. It is the checkpoint of step 4 each time.
    assert "rolled back to runs/run/checkpoints/step_00000004, rollback 1 of at most 3" in out
    assert [line["step"] for line in lines()] == list(range(1, 17))
    progress = read_manifest(find_checkpoints(Path("runs/run/checkpoints"))[-1]).header.progress
    assert progress.step == 16
    assert progress.left_out == status()["windows_left_out"] == status()["rollbacks"] * 7 * WINDOWS
    assert progress.sequences == 16 * WINDOWS + progress.left_out
    told = ledger(capsys, "1:16")
    numbers = [window["number"] for each in told for window in each["windows"]]
    assert numbers[: 4 * WINDOWS] == list(range(4 * WINDOWS))
    assert numbers[4 * WINDOWS :] == list(range(progress.sequences - 12 * WINDOWS, progress.sequences))

    for step in (9, 13):  # whether the rollback is still to come, or has been: the run is the same
        stop_before(step, monkeypatch)
        train(fails=130, model_name=f"stopped-{step}", **flags)
        train(model_name=f"stopped-{step}", **flags)
        assert same_state("run", f"stopped-{step}")
        assert ledger(capsys, "1:16", f"stopped-{step}") == told
        kept = ("skipped_steps", "last_skipped", "rollbacks", "windows_left_out", "val_loss", "best_val_loss")
        assert [status(f"stopped-{step}")[key] for key in kept] == [status()[key] for key in kept]


def test_a_spike_without_a_checkpoint_is_skipped_and_rollbacks_are_limited(
    train: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    garble({first_window(10)}, put=monkeypatch.setattr)
    out = train(on_spike="rollback", spike_factor=3, checkpoint_every=0)
    assert "there is no checkpoint to go back to yet" in out
    assert status()["skipped_steps"] == 1
    garble({first_window(step) for step in range(30, 90)}, put=monkeypatch.setattr)
    flags = {"on_spike": "rollback", "spike_factor": 3, "max_rollbacks": 2, "checkpoint_every": 1, "max_iters": 50}
    line = train(fails=1, model_name="many", **flags)
    assert "after 2 rollbacks; lower --learning_rate" in line
    assert status("many")["state"] == "failed"


# --- the data that steps consumed ------------------------------------------------------------------------------------


def test_the_ledger_is_the_same_for_every_layout_and_after_a_resume(
    train: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[int, list[int]] = {}
    real = trainer.TrainingBatches

    class Watched(real):  # type: ignore[misc, valid-type]
        def step(self, first: int) -> Any:
            for tokens, targets in super().step(first):
                seen.setdefault(first // WINDOWS + 1, []).extend(tokens[:, 0].tolist())
                yield tokens, targets

    monkeypatch.setattr(trainer, "TrainingBatches", Watched)
    train()
    whole = ledger(capsys, "1:16")
    tokens = Path(whole[0]["windows"][0]["file"]).read_bytes()
    for each in whole:
        assert [window["order"] for window in each["windows"]] == list(range(WINDOWS))
        assert [tokens[2 * window["offset"]] for window in each["windows"]] == seen[each["step"]]
    stop_before(7, monkeypatch)
    train(fails=130, model_name="other", micro_batch=8)
    train(model_name="other", micro_batch=2)
    assert ledger(capsys, "1:16", "other") == whole
    assert ledger(capsys, "5", "other") == whole[4:5]
    assert main(["data", "ledger", "runs/run", "--steps", "15:16"]) == 0
    table = capsys.readouterr().out
    assert table.count("offset") == 3
    assert str(whole[-1]["windows"][-1]["offset"]) in table.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (
            ["runs/run", "--steps", "x"],
            "steps must be A or A:B with whole numbers from 1 on, for example 100:120, not 'x'",
        ),
        (["runs/run", "--steps", "3:2"], "steps 3:2 names no step"),
        (["runs/run", "--steps", "0"], "steps 0 names no step"),
        (
            ["runs/run", "--steps", "-1:3"],
            "steps must be A or A:B with whole numbers from 1 on, for example 100:120, not '-1:3'",
        ),
        (["runs/run", "--steps", "1:17"], "runs/run has taken 16 steps; ask for at most step 16"),
        (["runs/rum", "--steps", "1"], "run runs/rum does not exist; did you mean run?"),
        (["runs", "--steps", "1"], "runs is not a run; it contains these runs: run"),
    ],
)
def test_steps_that_were_not_taken_are_refused(
    train: Callable[..., str], capsys: pytest.CaptureFixture[str], words: list[str], complaint: str
) -> None:
    train()
    assert main(["data", "ledger", *words]) == 2
    assert complaint in capsys.readouterr().err


def test_missing_metrics_are_an_error(train: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    train(max_iters=0)
    assert main(["data", "ledger", "runs/run", "--steps", "1"]) == 2
    assert "runs/run has taken no step yet; train it first" in capsys.readouterr().err
    Path("runs/run/metrics.jsonl").unlink()
    assert main(["data", "ledger", "runs/run", "--steps", "1"]) == 2
    assert "runs/run/metrics.jsonl is missing" in capsys.readouterr().err


# --- what may change -------------------------------------------------------------------------------------------------


def test_a_change_needs_a_flag_and_is_shown(train: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    stop_before(9, monkeypatch)
    train(fails=130)
    changes = {"learning_rate": "5e-3", "weight_decay": 0.2}
    line = train(fails=2, **changes)
    assert "runs/run holds another run: learning_rate: 0.01 → 0.005, weight_decay: 0.1 → 0.2; " in line
    assert "--allow_change learning_rate,weight_decay resumes with them" in line
    line = train(fails=2, allow_change="learning_rate", **changes)
    assert "holds another run: weight_decay: 0.1 → 0.2; " in line
    assert "--allow_change learning_rate,weight_decay resumes with it" in line
    out = train(allow_change="learning-rate, weight_decay", **changes)
    assert "changed  learning_rate: 0.01 → 0.005" in out
    assert "changed  weight_decay: 0.1 → 0.2" in out
    assert yaml.safe_load(Path("runs/run/config.yaml").read_text())["train"]["weight_decay"] == 0.2
    assert "changed" not in train(**changes)


def test_the_model_s_shape_cannot_change(train: Callable[..., str]) -> None:
    train(max_iters=4)
    line = train(fails=2, n_layer=2, allow_change="n_layer")
    assert "runs/run: n_layer cannot be changed: it sets the weights' shape" in line
    assert "--allow_change" not in train(fails=2, n_layer=2)
    assert "unknown setting 'n_layers'; did you mean n_layer" in train(fails=2, allow_change="n_layers")
    assert "unknown setting 'lr'; did you mean learning_rate?" in train(fails=2, allow_change="lr")
    assert "unknown setting 'zzz'; `scalegpt train --help` lists the valid names\n" in train(
        fails=2, allow_change="zzz"
    )


def test_another_step_size_resumes_at_the_same_place_in_the_data(
    train: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    train(max_iters=4)
    train(max_iters=8, tokens_per_step=256, micro_batch=4, allow_change="tokens_per_step")
    numbers = [window["number"] for each in ledger(capsys, "1:8") for window in each["windows"]]
    assert numbers == list(range(4 * WINDOWS + 4 * 2 * WINDOWS))
    assert lines()[-1]["tokens"] == 4 * 128 + 4 * 256


def test_another_precision_starts_with_its_own_loss_scale(train: Callable[..., str]) -> None:
    train(max_iters=4)
    train(max_iters=8, precision="fp16", allow_change="precision")
    progress = read_manifest(find_checkpoints(Path("runs/run/checkpoints"))[-1]).header.progress
    assert progress.loss_scale > 1000


def test_other_tokens_and_another_tokenizer_are_named(train: Callable[..., str]) -> None:
    train(max_iters=4)
    Path("text.txt").write_text(TEXT.replace("green", "brown") * 2)
    line = train(fails=2)
    assert "was trained on other tokens than text.txt gives (data: " in line
    (before, after) = (int(len(TEXT) * times * 0.9) + 1 for times in (1, 2))
    assert f"/train.bin of {before:,} → {after:,} tokens)" in line
    assert "--allow_change data resumes with the new ones" in line
    out = train(allow_change="data", max_iters=8)
    assert "changed  data: " in out
    line = train(fails=2, tokenizer="char", vocab_size=257, max_iters=12)
    assert "tokenizer: byte → char" in line
    line = train(fails=2, tokenizer="char", vocab_size=257, max_iters=12, allow_change="data")
    assert "tokenizer: byte → char" in line
    train(tokenizer="char", vocab_size=257, max_iters=12, allow_change="data,tokenizer")
    assert status()["step"] == 12


# --- damaged data ----------------------------------------------------------------------------------------------------


@pytest.fixture
def shard(train: Callable[..., str]) -> Path:
    """The training tokens of a run that is to go on."""
    assert main(["data", "prepare", "text.txt", "--tokenizer", "byte", "--out", "tokens"]) == 0
    train(input_file="tokens", max_iters=8)
    return Path("tokens/train.bin")


def test_a_shard_cut_short_is_refused(train: Callable[..., str], shard: Path) -> None:
    content = shard.read_bytes()
    shard.write_bytes(content[:6001])
    line = train(fails=2, input_file="tokens")
    assert "token file tokens/train.bin holds 6001 bytes where its meta.json says" in line
    assert "cut short at token offset 3000" in line
    shard.write_bytes(content + b"ab")
    assert f"continues past token offset {len(content) // 2}" in train(fails=2, input_file="tokens")


def test_a_changed_shard_is_refused_with_the_place(train: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scalegpt.data.token_file.BLOCK_BYTES", 1000)
    assert main(["data", "prepare", "text.txt", "--tokenizer", "byte", "--out", "small_blocks"]) == 0
    shard = Path("small_blocks/train.bin")
    content = bytearray(shard.read_bytes())
    content[2 * 1777] ^= 1
    shard.write_bytes(content)
    line = train(fails=2, input_file="small_blocks")
    assert (
        "token file small_blocks/train.bin has changed since, first between token offsets 1500 and 2000; prepare"
        in line
    )


def test_an_id_past_the_vocabulary_is_refused_with_its_place(train: Callable[..., str], shard: Path) -> None:
    (shard.parent / "meta.json").unlink()  # a folder of nanoGPT's, which has no digests
    content = bytearray(shard.read_bytes())
    content[2 * 1234 + 1] = 2
    shard.write_bytes(content)
    line = train(fails=2, input_file="tokens", vocab_size=300, tokenizer="gpt2", model_name="other")
    assert "tokens/train.bin holds id " in line
    assert "at token offset 1234, outside the vocabulary of 300" in line


def test_a_damaged_cache_is_rebuilt(train: Callable[..., str], caplog: pytest.LogCaptureFixture) -> None:
    train(max_iters=4)
    (shard,) = Path("cache").glob("*/train.bin")
    whole = shard.read_bytes()
    shard.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    train(max_iters=8)
    assert shard.read_bytes() == whole
    assert "the cached tokens are damaged and are made again" in caplog.text
