"""The loop itself, on a prepared job: evaluation, dropout's seeds, and errors on the way."""

import json
import math
import os
import signal
import threading
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from scalegpt.backends import World
from scalegpt.checkpoint import writer
from scalegpt.config import TrainConfig
from scalegpt.config.presets import resolve
from scalegpt.data.windows.sampler import cut_windows, held_out_starts
from scalegpt.errors import InputError, RunError
from scalegpt.training.request import Request
from scalegpt.training.resilience.stopping import Reason, Stopped, StopRequest
from scalegpt.training.run import collective_timeout
from scalegpt.training.runs import metrics_file
from scalegpt.training.setup.prepare import prepare
from scalegpt.training.trainer import Trainer

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
FLAGS = {
    "tokenizer": "byte", "vocab_size": 0, "n_layer": 1, "n_embd": 16, "n_head": 2, "block_size": 16, "micro_batch": 4,
    "max_iters": 4, "precision": "fp32", "sample_tokens": 0, "eval_every": 0, "eval_tokens": 100,
}  # fmt: skip


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Any:
    """A factory of trainers on a small text."""
    monkeypatch.setenv("SCALEGPT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("abcdefgh\n" * 200)
    made = []

    def make(**flags: Any) -> Trainer:
        run = resolve(flags={**FLAGS, "input_file": str(tmp_path / "text.txt"), **flags}, name="run")
        made.append(Trainer(prepare(Request(run, tmp_path / "runs", True), ALONE)))
        return made[-1]

    yield make
    for each in made:
        each.close()


def status(trainer: Trainer) -> Any:
    return json.loads(trainer.job.directory.status.read_text())


def test_the_held_out_loss_is_the_mean_over_its_windows(trainer: Any) -> None:
    one = trainer(micro_batch=3)  # 7 windows in batches of 3
    one._evaluate()
    job = one.job
    (val,) = job.data.val.parts
    starts = held_out_starts(len(val), 16, 100)
    assert len(starts) == 7 < (len(val) - 1) // 16
    rows = [torch.from_numpy(part) for part in cut_windows(val, starts, 16)]
    expected = job.backend.evaluate(*rows).item()
    assert one.val_loss == pytest.approx(expected, rel=1e-6)
    assert one.best_val_loss == one.val_loss
    assert job.backend.model.training


def test_the_best_is_the_lowest_finite_loss(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one = trainer()
    losses = iter([math.nan, 3.0, 2.0, 2.5, math.nan])
    monkeypatch.setattr(one, "held_out", [(torch.zeros(1, 1), torch.zeros(1, 1), 1, 0)])
    monkeypatch.setattr(one.job.backend, "evaluate", lambda *_: torch.tensor(next(losses)))
    seen = []
    for _ in range(5):
        one._evaluate()
        seen.append(one.best_val_loss)
    assert seen == [None, 3.0, 2.0, 2.0, 2.0]
    one._status("running")
    assert (status(one)["val_loss"], status(one)["best_val_loss"]) == (None, 2.0)


def test_dropout_is_drawn_anew_at_every_step_and_rank(trainer: Any) -> None:
    one = trainer(dropout=0.5)
    draws = set()
    for rank in range(3):
        one.job = replace(one.job, world=replace(ALONE, rank=rank))
        for one.step in range(5):
            one._seed_dropout()
            draws.add(torch.rand(1).item())
    assert len(draws) == 15


def test_accumulation_changes_the_arithmetic_only(trainer: Any) -> None:
    whole, parts = trainer(micro_batch=8, tokens_per_step=128), trainer(micro_batch=2, tokens_per_step=128)
    for one in (whole, parts):
        one.fit()
    lines = [
        [json.loads(line) for line in one.job.directory.metrics.read_text().splitlines()] for one in (whole, parts)
    ]
    for mine, theirs in zip(*lines, strict=True):
        for key in mine.keys() & {"loss", "grad_norm", "val_loss"}:
            assert mine[key] == pytest.approx(theirs[key], rel=1e-5)


def test_an_error_is_told_and_a_second_one_does_not_hide_it(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one = trainer()
    one.fail(RunError("the disk is full"))
    assert (status(one)["state"], status(one)["cause"]) == ("failed", "the disk is full")
    one.fail(KeyboardInterrupt())
    assert (status(one)["state"], status(one)["cause"]) == ("stopped", "interrupted")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("scalegpt.training.runs.files.write_atomic", full)
    one.fail(RunError("the first error"))


@pytest.mark.parametrize("split", ["train", "val"])
def test_data_that_are_cut_short_meanwhile_end_the_run_with_a_line_and_a_status(trainer: Any, split: str) -> None:
    """Through a memory map the process would end by SIGBUS, and its status would stay at "running"."""
    one = trainer(max_iters=10_000, eval_every=1)
    os.truncate(one.job.data.sources[0].tokens.files[split].path, 2)
    with pytest.raises(RunError, match=rf"{split}.bin had [\d,]+ tokens when it was opened and has 1 now") as raised:
        one.fit()
    assert one.fail(raised.value) is raised.value
    assert (status(one)["state"], status(one)["cause"]) == ("failed", str(raised.value))


def test_a_checkpoint_that_cannot_be_written_ends_the_run(trainer: Any) -> None:
    one = trainer(checkpoint_every=2)
    folder = one.job.directory.checkpoints
    folder.rmdir()
    folder.touch()
    with pytest.raises(RunError, match="step_00000002 cannot be written"):
        one.fit()


def test_a_save_that_fails_meanwhile_ends_the_run_at_the_next_step(
    trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = trainer(checkpoint_every=2, max_iters=10)
    real = one.saving.saver.save

    def full(*_: Any) -> None:
        raise RunError("checkpoint step_00000002 cannot be written: the disk is full")

    def save(header: Any, *, wait: bool) -> None:
        real(header, wait=wait)
        one.saving.saver._thread.join()  # so that the failure is there when the next step looks

    monkeypatch.setattr("scalegpt.checkpoint.writer.write_part", full)
    monkeypatch.setattr(one.saving.saver, "save", save)
    with pytest.raises(RunError, match="the disk is full"):
        one.fit()
    assert one.step == 2, "the third step was computed, and not counted"
    assert list(one.job.directory.checkpoints.iterdir()) == []


def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint_and_nothing_else(trainer: Any) -> None:
    one = trainer(sample_tokens=4)
    one.batches.step, real = lambda first: one.job.stop.ask(Reason.USR1) or real(first), one.batches.step
    one.fit()
    assert (one.step, one.reason, one.exit_status) == (1, Reason.USR1, 128 + signal.SIGUSR1)
    assert (status(one)["state"], status(one)["cause"], status(one)["val_loss"]) == ("stopped", "SIGUSR1", None)
    assert one.outcome() == "stopped at step 1 of 4: SIGUSR1; the same command without --fresh resumes from there"
    assert [path.name for path in one.job.directory.checkpoints.iterdir()] == ["step_00000001"]
    assert not one.job.directory.samples.exists()


def test_a_request_to_stop_learns_what_happens_next(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one, seen = trainer(eval_every=1, max_iters=2, checkpoint_every=1), []
    assert one.job.stop.what_next() == "ending before the first step"
    for owner, name in ((one, "_evaluate"), (one.saving, "save"), (one.job.backend, "step")):
        real = getattr(owner, name)

        def noting(*arguments: Any, _real: Any = real, **options: Any) -> Any:
            seen.append(one.job.stop.what_next())
            return _real(*arguments, **options)

        monkeypatch.setattr(owner, name, noting)
    one.fit()
    assert seen == [
        "finishing step 1, then saving",
        "finishing the current work (saving) and one step, then saving",
        "finishing the current work (evaluation) and one step, then saving",
        "finishing step 2, then saving",
        "no further step is taken; finishing the current work: saving",
        "no further step is taken; finishing the current work: evaluation",
    ]
    assert one.job.stop.what_next() == ""


def test_a_signal_in_the_last_step_changes_nothing(trainer: Any) -> None:
    one = trainer(max_iters=1)
    one.job.stop.ask(Reason.TERM)
    one.fit()
    assert (one.exit_status, one.outcome(), status(one)["state"]) == (0, "done", "finished")
    assert one.val_loss is not None


def test_a_step_makes_one_reduction_for_loss_and_signals(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one = trainer(max_iters=3, max_minutes=60, eval_every=0)
    reduced = []
    monkeypatch.setattr(World, "sum", lambda self, values: reduced.append(len(values)) or values)
    one._take_step()
    assert reduced == [4 + len(Reason) + 1]  # and the seconds of the only rank


def test_memory_that_lacks_in_the_loop_is_told_with_advice(trainer: Any) -> None:
    one = trainer()
    one.job.backend.micro_step = lambda *_, **__: torch.empty(2**50, dtype=torch.uint8)
    with pytest.raises(RuntimeError) as raised:
        one.fit()
    failure = one.fail(raised.value)
    assert isinstance(failure, RunError)
    assert "out of memory on rank 0 in step 1, forward and backward" in status(one)["cause"]
    assert "--micro_batch 2" in str(failure)


def test_a_resume_reads_the_metrics_twice_and_an_end_once(
    trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the checkpoint is chosen, and up to it; again only where lines are to be dropped. The summary reads them too."""
    first = trainer(checkpoint_every=2)
    first.fit()
    first.job.directory.unlock()
    run = resolve(flags={**FLAGS, "input_file": str(tmp_path / "text.txt"), "max_iters": 6}, name="run")
    read, real = list[str](), metrics_file.read_lines
    monkeypatch.setattr(metrics_file, "read_lines", lambda path: read.append(path.name) or real(path))
    resumed = Trainer(prepare(Request(run, tmp_path / "runs", False), ALONE))
    resumed.fit()
    resumed.close()
    assert resumed.step == 6
    assert read == ["metrics.jsonl"] * 3


def test_a_set_up_that_is_stopped_leaves_nothing(tmp_path: Path, trainer: Any) -> None:
    one = trainer()
    stop = StopRequest()
    stop.ask(Reason.TERM)
    run = replace(one.job.run, name="other")
    with pytest.raises(Stopped):
        prepare(Request(run, tmp_path / "runs", False), ALONE, stop)
    assert not (tmp_path / "runs" / "other").exists()


def test_torchs_own_time_out_leaves_room_to_the_watchdog() -> None:
    assert collective_timeout(TrainConfig()) == timedelta(minutes=35)
    assert collective_timeout(TrainConfig(first_step_timeout=60, step_timeout=7200)) == timedelta(minutes=125)
    assert collective_timeout(TrainConfig(step_timeout=0)) > timedelta(days=7)


def test_time_left_is_the_nearer_of_steps_and_minutes(trainer: Any) -> None:
    one = trainer(max_minutes=0.5, max_iters=100)
    assert math.isnan(one._seconds_left())
    one.throughput.add(10.0)
    assert 0 < one._seconds_left() <= 30
    one.throughput.seconds.clear()
    one.throughput.add(0.01)
    assert one._seconds_left() == pytest.approx(1.0)


def test_input_errors_come_before_the_directory_exists(trainer: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        trainer(block_size=10_000)
    assert not (tmp_path / "runs").exists()


def test_the_status_knows_of_an_asynchronous_checkpoint_after_the_next_step(trainer: Any) -> None:
    one = trainer(checkpoint_every=2, max_iters=10)
    for _ in range(2):
        one._take_step()
    one._housekeeping(last=False)
    one.saving.saver._thread.join()
    assert status(one)["checkpoint_step"] in {None, 2}  # as fast as the disk is
    one._take_step()
    assert status(one)["checkpoint_step"] == 2


def test_the_status_knows_of_a_checkpoint_that_was_complete_after_the_error(
    trainer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, may_write, real = trainer(checkpoint_every=2, max_iters=10), threading.Event(), writer.commit
    monkeypatch.setattr(writer, "commit", lambda *args, **options: may_write.wait(60) and real(*args, **options))
    for _ in range(2):
        one._take_step()
    one._housekeeping(last=False)
    close = one.saving.saver.close
    monkeypatch.setattr(one.saving.saver, "close", lambda *args: (may_write.set(), close(*args)))
    assert status(one)["checkpoint_step"] is None
    failure = RunError("something else")
    assert one.fail(failure) is failure
    assert (status(one)["state"], status(one)["checkpoint_step"]) == ("failed", 2)
    assert "the same command without --fresh resumes from the checkpoint of step 2" in capsys.readouterr().out
