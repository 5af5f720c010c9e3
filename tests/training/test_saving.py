"""When a run saves and when not: before what may fail, never after a bad step; and what a resumed run makes up for."""

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from scalegpt import storage
from scalegpt.backends import World
from scalegpt.backends.base import StepResult
from scalegpt.checkpoint.manifest import UnreadableError
from scalegpt.checkpoint.reader import Checkpoint, read_manifest
from scalegpt.checkpoint.store import best_checkpoint, find_checkpoints, step_of
from scalegpt.config.presets import resolve
from scalegpt.errors import InputError, RunError
from scalegpt.training.request import Request
from scalegpt.training.resilience.stopping import Reason
from scalegpt.training.setup.prepare import prepare
from scalegpt.training.trainer import Trainer

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
FLAGS = {
    "tokenizer": "byte", "vocab_size": 0, "n_layer": 1, "n_embd": 16, "n_head": 2, "block_size": 16, "micro_batch": 4,
    "max_iters": 12, "precision": "fp32", "sample_tokens": 0, "eval_every": 0, "eval_tokens": 100, "schedule": "constant",
    "warmup_steps": 0, "checkpoint_every": 4, "max_skipped_in_a_row": 5,
}  # fmt: skip

Make = Callable[..., Trainer]


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Iterator[Make]:
    """A factory of trainers of one run; each resumes what those before it left."""
    monkeypatch.setenv("SCALEGPT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("abcdefgh\n" * 200)
    made: list[Trainer] = []

    def make(*, allow: str = "", resume_step: int | None = None, name: str = "run", **flags: Any) -> Trainer:
        for each in made:
            each.close()
            each.job.directory.unlock()
        run = resolve(flags={**FLAGS, "input_file": str(tmp_path / "text.txt"), **flags}, name=name)
        allowed = frozenset(allow.split(",")) if allow else frozenset()
        request = Request(run, tmp_path / "runs", False, allow_change=allowed, resume_step=resume_step)
        made.append(Trainer(prepare(request, ALONE)))
        return made[-1]

    yield make
    for each in made:
        each.close()


def kept(one: Trainer) -> list[int]:
    return [step_of(path) for path in find_checkpoints(one.job.directory.checkpoints)]


def status(one: Trainer) -> Any:
    return json.loads(one.job.directory.status.read_text())


def losses(one: Trainer, key: str = "loss") -> dict[int, Any]:
    lines = [json.loads(line) for line in one.job.directory.metrics.read_text().splitlines()]
    found = [(line["step"], line[key]) for line in lines if key in line]
    assert len(found) == len(dict(found)), "a step twice"
    return dict(found)


def val_loss(one: Trainer, step: int) -> float | None:
    return read_manifest(one.job.directory.checkpoints / f"step_{step:08d}").header.progress.val_loss


def fails_from(one: Trainer, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the loss of every step from one on be NaN, as ruined weights make it."""
    real = one.job.backend.micro_step

    def micro_step(*arguments: Any, **options: Any) -> Any:
        loss = real(*arguments, **options)
        return loss * math.nan if one.step + 1 >= step else loss

    monkeypatch.setattr(one.job.backend, "micro_step", micro_step)


def boom(*_: Any, **__: Any) -> None:
    raise ZeroDivisionError("boom")


# --- save first ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["_evaluate", "_sample"])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.slow
def test_what_comes_after_a_step_cannot_cost_its_checkpoint(
    trainer: Make, monkeypatch: pytest.MonkeyPatch, what: str, last: bool, asynchronous: bool
) -> None:
    flags = {"eval_every": 4, "sample_every": 4, "sample_tokens": 2, "async_checkpoint": asynchronous}
    one = trainer(max_iters=4 if last else 8, **flags)
    monkeypatch.setattr(one, what, boom)
    with pytest.raises(ZeroDivisionError) as raised:
        one.fit()
    one.fail(raised.value)
    assert (kept(one), one.step) == ([4], 4)
    again = trainer(max_iters=8, **flags)
    again.fit()
    whole = trainer(name="whole", max_iters=8, **flags)
    whole.fit()
    assert losses(again) == losses(whole)
    assert losses(again, "val_loss") == losses(whole, "val_loss")
    assert again.job.directory.read_samples() == whole.job.directory.read_samples()
    assert [val_loss(again, step) for step in kept(again)] == [val_loss(whole, step) for step in kept(whole)]
    assert (status(again)["val_loss"], status(again)["best_val_loss"]) == (
        status(whole)["val_loss"], status(whole)["best_val_loss"],
    )  # fmt: skip


def test_a_finished_run_that_lacks_its_last_evaluation_and_sample_makes_up_for_them(
    trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = trainer(max_iters=4, sample_tokens=2)
    monkeypatch.setattr(one, "_evaluate", boom)
    with pytest.raises(ZeroDivisionError) as raised:
        one.fit()
    one.fail(raised.value)
    again = trainer(max_iters=4, sample_tokens=2)
    again.fit()
    assert losses(again, "val_loss").keys() == {4}
    assert val_loss(again, 4) == losses(again, "val_loss")[4]
    assert [step for step, _ in again.job.directory.read_samples()] == [4]
    assert status(again)["state"] == "finished"
    files = {path: path.read_bytes() for path in again.job.directory.path.rglob("*") if path.is_file()}
    trainer(max_iters=4, sample_tokens=2).fit()
    assert files == {path: path.read_bytes() for path in files}, "now there is nothing left to do"


def test_a_held_out_loss_that_the_checkpoint_was_not_told_is_taken_from_the_metrics(
    trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the line in ``metrics.jsonl`` and the checkpoint's new manifest."""
    one = trainer(max_iters=8, eval_every=4)
    monkeypatch.setattr(one.saving, "amend", boom)
    with pytest.raises(ZeroDivisionError) as raised:
        one.fit()
    one.fail(raised.value)
    assert val_loss(one, 4) is None
    again = trainer(max_iters=8, eval_every=4)
    again.fit()
    assert losses(again, "val_loss").keys() == {4, 8}
    assert val_loss(again, 4) == losses(again, "val_loss")[4]


def test_the_best_checkpoint_is_that_of_the_lowest_loss_of_its_own_step(
    trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = trainer(max_iters=20, eval_every=4, keep_checkpoints=1)
    values = iter([3.0, 2.0, 1.0, 4.0, 5.0])
    monkeypatch.setattr(one, "held_out", [(torch.zeros(1, 1), torch.zeros(1, 1), 1, 0)])
    monkeypatch.setattr(one.job.backend, "evaluate", lambda *_: torch.tensor(next(values)))
    one.fit()
    assert kept(one) == [12, 20]
    best = best_checkpoint(find_checkpoints(one.job.directory.checkpoints))
    assert best is not None
    assert step_of(best) == 12
    for step in kept(one):
        Checkpoint.open(one.job.directory.checkpoints / f"step_{step:08d}").verify()


def test_a_diverged_model_has_no_sample_and_the_run_says_so(
    trainer: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = trainer(max_iters=4, sample_tokens=4)
    nan = torch.full((1, 257), math.nan)
    monkeypatch.setattr(one.job.backend, "forward", lambda tokens, targets, *_: nan if targets is None else nan.mean())
    one.fit()
    text = capsys.readouterr().out
    assert "warning: no sample after 4 steps: the model's logits are not finite" in text
    assert "warning: the held-out loss is not finite" in text
    assert kept(one) == [4]
    assert one.job.backend.model.training


# --- never after a bad step ------------------------------------------------------------------------------------------


def test_bad_weights_push_no_good_checkpoint_out_and_the_end_says_where_to_go_back_to(
    trainer: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    """The learning rate ruins the weights in one step, which itself looks good; the steps after it are skipped."""
    trainer().fit()
    one = trainer(max_iters=40, learning_rate=1e38, allow="learning_rate")
    with pytest.raises(
        RunError, match="the same command resumes from the checkpoint of step 12, whose weights are good"
    ):
        one.fit()
    assert (kept(one), one.step) == ([8, 12], 18)
    good = trainer(max_iters=20, learning_rate=1e-3, allow="learning_rate")
    good.fit()
    assert status(good)["state"] == "finished"


def test_a_checkpoint_of_the_step_that_ruined_the_weights_pushes_nothing_out(
    trainer: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(keep_checkpoints=1).fit()
    bad = {"learning_rate": 1e38, "allow": "learning_rate", "keep_checkpoints": 1, "checkpoint_every": 13}
    for _ in range(2):  # a second start meets the same
        one = trainer(max_iters=40, **bad)
        with pytest.raises(RunError, match=r"may hold ruined weights: to go back to .* step 12, add --resume_step 12"):
            one.fit()
        assert status(one)["checkpoint_step"] == 13
        one.job.directory.unlock()
        assert kept(one) == [12, 13]
    assert "steps 14 to 18, all after" in (text := capsys.readouterr().out)
    assert "if they are skipped again, --resume_step 12 goes back to" in text
    good = trainer(max_iters=20, keep_checkpoints=1, allow="learning_rate", resume_step=12)
    good.fit()
    assert status(good)["state"] == "finished"
    assert kept(good) == [20]
    names = {path.name for path in good.job.directory.checkpoints.iterdir()}
    assert names == {"step_00000013.replaced", "step_00000020"}


def test_a_checkpoint_that_falls_on_a_skipped_step_comes_after_the_next_good_one(
    trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = trainer(max_iters=7)
    real = one.job.backend.step
    bad = {3, 4, 5}

    def step(rate: float, may_step: Any) -> StepResult:
        if one.step + 1 in bad:
            return real(rate, lambda: may_step() and False)
        return real(rate, may_step)

    monkeypatch.setattr(one.job.backend, "step", step)
    one.fit()
    assert kept(one) == [6, 7]


@pytest.mark.parametrize("trigger", ["minutes", "signal", "time", "end"])
@pytest.mark.slow
def test_nothing_is_saved_while_the_last_step_was_skipped(
    trainer: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trigger: str
) -> None:
    trainer(max_iters=4).fit()
    flags = {"max_iters": 7 if trigger == "end" else 20, "checkpoint_every": 500}
    if trigger == "minutes":
        flags |= {"checkpoint_minutes": 1e-9}
    if trigger == "time":
        flags |= {"max_minutes": 1e-9}
    one = trainer(**flags)
    fails_from(one, 5, monkeypatch)
    monkeypatch.setattr(one, "held_out", [(torch.zeros(1, 1), torch.zeros(1, 1), 1, 0)])
    monkeypatch.setattr(one.job.backend, "evaluate", lambda *_: torch.tensor(math.nan))
    if trigger == "signal":
        one.job.stop.ask(Reason.TERM)
        one.fit()
        assert one.outcome() == (
            "stopped at step 5 of 20: SIGTERM; the same command resumes from the checkpoint of step 4"
        )
    else:
        words = "no checkpoint is written after step" if trigger in {"time", "end"} else "5 steps in a row up to step 9"
        with pytest.raises(RunError, match=words):
            one.fit()
    assert kept(one) == [4]
    assert "warning: no checkpoint is written after step 5" in capsys.readouterr().out or trigger in {"time", "end"}


def test_a_last_step_that_is_skipped_does_not_keep_good_weights_from_being_saved(
    trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The held-out loss shows that they are good: else the run could never be finished."""
    one = trainer(max_iters=6)
    fails_from(one, 6, monkeypatch)
    one.fit()
    assert (kept(one), status(one)["state"]) == ([4, 6], "finished")
    assert val_loss(one, 6) == losses(one, "val_loss")[6]


@pytest.mark.parametrize("where", ["cadence", "end"])
def test_weights_that_are_not_finite_are_never_saved(
    trainer: Make, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """The very step that ruins them is the one to be saved."""
    one = trainer(max_iters=8 if where == "end" else 20)
    real = one.job.backend.step

    def step(rate: float, may_step: Any) -> StepResult:
        result = real(rate, may_step)
        if one.step + 1 == 8:
            next(iter(one.job.backend.held(("weight",)))).values.view(-1)[0] = math.nan
        return result

    monkeypatch.setattr(one.job.backend, "step", step)
    words = r"weight of .* is not finite after step 8, so no checkpoint is written; .* resumes from the checkpoint of step 4"
    with pytest.raises(RunError, match=words):
        one.fit()
    assert kept(one) == [4]


def test_what_a_killed_process_did_not_delete_goes_at_the_next_start(trainer: Make) -> None:
    one = trainer(max_iters=16, keep_checkpoints=9)
    one.fit()
    run = one.job.directory.path
    left = [
        run / ".run_status.json.999999999.tmp", run / "checkpoints/.step_00000002.0.tmp",
        run / "checkpoints/.step_00000001.deleted.tmp", run / "checkpoints/step_00000016/.checkpoint.json.999999999.tmp",
    ]  # fmt: skip
    for path in left:
        path.mkdir() if "step_0000000" in path.name else path.touch()
    living = run / f".run_status.json.{os.getppid()}.tmp"
    living.touch()
    again = trainer(max_iters=16, keep_checkpoints=2, keep_best=False)
    again.fit()
    assert [path for path in left if path.exists()] == []
    assert living.exists()
    assert kept(again) == [12, 16]


# --- going back, and what cannot be read -----------------------------------------------------------------------------


def test_a_run_goes_back_to_the_step_that_is_asked_for(trainer: Make, capsys: pytest.CaptureFixture[str]) -> None:
    whole = trainer(keep_checkpoints=9)
    whole.fit()
    before = losses(whole)
    one = trainer(keep_checkpoints=9, resume_step=4)
    assert one.step == 4
    assert one.job.resume_hint == "the same command without --resume_step"
    one.fit()
    assert losses(one) == before
    assert kept(one) == [4, 8, 12]
    aside = {path.name for path in one.job.directory.checkpoints.glob("*.replaced")}
    assert aside == {"step_00000008.replaced", "step_00000012.replaced"}
    assert "step_00000012 is set aside: the run goes back to an earlier step" in capsys.readouterr().out


@pytest.mark.parametrize(("step", "words"), [(5, "has no checkpoint of step 5; it has 4, 8, 12"), (8, "is damaged")])
def test_a_step_that_cannot_be_gone_back_to_is_refused_and_changes_nothing(
    trainer: Make, step: int, words: str
) -> None:
    one = trainer(keep_checkpoints=9)
    one.fit()
    (one.job.directory.checkpoints / "step_00000008" / "checkpoint.json").write_text("{}")
    files = {path: path.read_bytes() for path in one.job.directory.path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=words):
        trainer(keep_checkpoints=9, resume_step=step)
    now = {path: path.read_bytes() for path in one.job.directory.path.rglob("*") if path.is_file()}
    assert {path.name: text for path, text in now.items() if path.name != ".lock"} == {
        path.name: text for path, text in files.items() if path.name != ".lock"
    }


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
def test_a_newest_checkpoint_that_cannot_be_read_ends_the_start_and_is_left_where_it_is(
    trainer: Make, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    one = trainer()
    one.fit()
    monkeypatch.setattr(storage, "RETRY_SECONDS", (0.0, 0.0))
    real = os.open

    def refuse(path: Any, *arguments: Any, **options: Any) -> int:
        if str(path).endswith("step_00000012/rank_00000.weights.safetensors"):
            raise OSError(code, os.strerror(code))
        return real(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(
            UnreadableError, match=r"cannot be read: .*; or --resume_step 8 goes back to .*step_00000008"
        ):
            trainer(max_iters=16)
        assert kept(one) == [8, 12]
        one.job.directory.unlock()
    again = trainer(max_iters=16)
    assert again.step == 12


def test_a_checkpoint_on_another_disk_is_resumed_from_and_its_data_stay_there(trainer: Make, tmp_path: Path) -> None:
    one = trainer()
    one.fit()
    for step in (8, 12):
        path = one.job.directory.checkpoints / f"step_{step:08d}"
        shutil.move(path, tmp_path / f"disk-{step}")
        path.symlink_to(tmp_path / f"disk-{step}")
    again = trainer(max_iters=24, keep_best=False)
    assert again.step == 12
    again.fit()
    assert kept(again) == [20, 24]
    for step in (8, 12):
        Checkpoint.open(tmp_path / f"disk-{step}").verify()


def test_the_runs_folder_may_be_a_link(trainer: Make, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "run").symlink_to(tmp_path / "disk")
    trainer(max_iters=8).fit()
    again = trainer(max_iters=12)
    again.fit()
    assert again.job.directory.path.is_symlink()
    assert sorted(path.name for path in (tmp_path / "disk" / "checkpoints").iterdir()) == [
        "step_00000008", "step_00000012",
    ]  # fmt: skip


def test_what_has_a_checkpoints_name_and_is_none_is_never_in_the_way(trainer: Make) -> None:
    one = trainer(max_iters=4)
    one.fit()
    folder = one.job.directory.checkpoints
    (folder / "step_00000008").write_text("a file")
    (folder / "step_00000012").symlink_to("nowhere")
    again = trainer(max_iters=12)
    again.fit()
    assert kept(again) == [8, 12]
    assert {path.name for path in folder.glob("*.damaged")} == {"step_00000008.damaged", "step_00000012.damaged"}
