"""Which checkpoint a run resumes from, and when it does not begin again."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from scalegpt.backends import World
from scalegpt.checkpoint.manifest import Progress
from scalegpt.checkpoint.store import find_checkpoints
from scalegpt.errors import InputError
from scalegpt.training.runs.directory import RunDirectory
from scalegpt.training.runs.resume import (
    CheckpointChoice,
    choose_checkpoint,
    resume_hint,
    resumed_line,
    rollback_advice,
)

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


def found_in(folder: Path) -> CheckpointChoice:
    return choose_checkpoint(RunDirectory(folder), ALONE, trusted=True)


@pytest.fixture
def run(tiny_run: Callable[..., Path]) -> Path:
    """Checkpoints of steps 5 and 10, which its status knows of."""
    folder = tiny_run(steps=(5, 10))
    RunDirectory(folder).write_status(state="running", checkpoint_step=10)
    return folder


def test_the_newest_is_taken_without_a_word(run: Path) -> None:
    found = found_in(run)
    assert found.checkpoint is not None
    assert (found.checkpoint.path.name, found.notes) == ("step_00000010", [])


def test_a_newest_that_is_gone_is_missed(run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "step_00000010")
    found = found_in(run)
    assert found.checkpoint is not None
    assert found.checkpoint.path.name == "step_00000005"
    (note,) = found.notes
    assert note.startswith("warning: the checkpoint of step 10 is missing; going back to ")


@pytest.mark.parametrize("hurt", ["empty", "no folder"])
def test_a_run_whose_checkpoints_are_gone_does_not_begin_again(run: Path, hurt: str) -> None:
    shutil.rmtree(run / "checkpoints")
    if hurt == "empty":
        (run / "checkpoints").mkdir()
    with pytest.raises(
        InputError, match=r"had a checkpoint of step 10, which is missing from .*; restore it, or --fresh"
    ):
        found_in(run)


UNTELLING = [None, "{}", "[]", "broken"]
STEPS = "".join(f'{{"step": {step}, "loss": 1}}\n' for step in (1, 2, 3))


def write(path: Path, text: str | None) -> None:
    path.unlink() if text is None else path.write_text(text)


@pytest.mark.parametrize("status", [*UNTELLING, '{"checkpoint_step": null}', '{"checkpoint_step": "10"}'])
def test_a_run_that_has_taken_no_step_begins(run: Path, status: str | None) -> None:
    shutil.rmtree(run / "checkpoints")
    write(run / "run_status.json", status)
    found = found_in(run)
    assert (found.checkpoint, found.notes) == (None, [])


def test_a_run_that_is_known_to_have_had_no_checkpoint_begins_again_and_says_so(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    write(run / "run_status.json", '{"checkpoint_step": null}')
    write(run / "metrics.jsonl", STEPS)
    assert found_in(run).notes == [
        "the run starts from the beginning: it ended after 3 steps, before its first checkpoint"
    ]


@pytest.mark.parametrize("status", UNTELLING)
def test_a_run_of_which_nobody_knows_whether_it_had_any_does_not_begin_again(run: Path, status: str | None) -> None:
    shutil.rmtree(run / "checkpoints")
    write(run / "run_status.json", status)
    write(run / "metrics.jsonl", STEPS)
    with pytest.raises(
        InputError, match=r"has taken 3 steps, but there is no checkpoint in .*run_status.json does not say"
    ):
        found_in(run)


@pytest.mark.parametrize("status", UNTELLING)
def test_where_the_status_is_broken_a_newer_one_might_be_gone(run: Path, status: str | None) -> None:
    write(run / "run_status.json", status)
    write(run / "metrics.jsonl", STEPS)
    (note,) = found_in(run).notes
    assert "run_status.json is missing or cannot be read, so the run may have had a newer checkpoint than" in note
    assert note.endswith("step_00000010")


def test_a_run_of_which_nothing_tells_begins_again_and_says_so(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    write(run / "run_status.json", None)
    assert found_in(run).notes == []
    write(run / "config.yaml", "model: {}")
    assert found_in(run).notes == ["the run starts from the beginning: its files have no step and no checkpoint"]


def test_without_its_number_a_run_cannot_tell_its_checkpoints(run: Path) -> None:
    def look() -> CheckpointChoice:
        return choose_checkpoint(RunDirectory(run), ALONE, trusted=False)

    (run / ".run_id").unlink(missing_ok=True)
    with pytest.raises(InputError, match=r"may be another run's: .*\.run_id is missing; add --trust"):
        look()
    (run / ".run_id").write_text("another")
    with pytest.raises(InputError, match=r"step_00000010 was not written by this run; add --trust"):
        look()


def test_what_resumes_a_run() -> None:
    assert resume_hint("run", "run", fresh=False) == "the same command"
    assert resume_hint("run", "run", fresh=True) == "the same command without --fresh"
    assert resume_hint("run-3", "run", fresh=True) == "the same command with --model_name run-3 instead of --fresh"


@pytest.mark.parametrize(
    ("taken", "told"),
    [
        (10, ""),
        (11, "; step 11 was taken before, and is repeated"),
        (15, "; steps 11 to 15 were taken before, and are repeated"),
    ],
)
def test_steps_that_come_again_are_told(taken: int, told: str) -> None:
    line = resumed_line(Path("step_00000010"), Progress(step=10, tokens=5), 20, taken)
    assert line == f"resumed  from step_00000010, step 10 of 20{told}"


SKIPPED = "".join(f'{{"step": {step}, "loss": null, "skipped": true}}\n' for step in (11, 12))


def test_a_checkpoint_after_which_every_step_was_skipped_is_suspected(run: Path) -> None:
    write(run / "metrics.jsonl", '{"step": 10, "loss": 1}\n' + SKIPPED)
    (note,) = found_in(run).notes
    assert note.startswith("warning: steps 11 to 12, all after ")
    assert "--resume_step 5 goes back to " in note
    write(run / "metrics.jsonl", '{"step": 10, "loss": 1}\n' + SKIPPED + '{"step": 13, "loss": 1}\n')
    assert found_in(run).notes == []
    write(run / "metrics.jsonl", '{"step": 11, "loss": 1}\n{"step": 12, "loss": null, "skipped": true}\n')
    assert found_in(run).notes == [], "a step after the checkpoint was good"
    shutil.rmtree(run / "checkpoints" / "step_00000005")
    write(run / "metrics.jsonl", SKIPPED)
    assert found_in(run).notes[0].endswith("so its weights may be ruined; there is no earlier checkpoint")


def test_the_step_that_is_asked_for_is_taken_and_no_other(run: Path) -> None:
    found = choose_checkpoint(RunDirectory(run), ALONE, trusted=True, step=5)
    assert found.checkpoint is not None
    assert found.checkpoint.path.name == "step_00000005"
    assert [path.name for path in found.replaced] == ["step_00000010"]
    assert found.notes == [f"{run}/checkpoints/step_00000010 is set aside: the run goes back to an earlier step"]
    with pytest.raises(InputError, match=r"resume_step: .* has no checkpoint of step 7; it has 5, 10"):
        choose_checkpoint(RunDirectory(run), ALONE, trusted=True, step=7)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(InputError, match="has no checkpoint of step 5; it has none"):
        choose_checkpoint(RunDirectory(run), ALONE, trusted=True, step=5)


@pytest.mark.parametrize(
    ("first_skipped", "words"),
    [
        (12, "the same command resumes from the checkpoint of step 10, whose weights are good"),
        (
            11,
            "of step 10 may hold ruined weights: to go back to the checkpoint of step 5, add --resume_step 5 to the command",
        ),
        (
            7,
            "of step 10 may hold ruined weights: to go back to the checkpoint of step 5, add --resume_step 5 to the command",
        ),
        (
            6,
            "of step 10 may hold ruined weights, and no earlier one is good: --fresh starts a new run beside this one",
        ),
    ],
)
def test_where_to_go_back_to_after_steps_that_were_skipped(run: Path, first_skipped: int, words: str) -> None:
    found = find_checkpoints(run / "checkpoints")
    assert rollback_advice(found, first_skipped, "the same command").endswith(words)
    assert rollback_advice([], first_skipped, "the same command") == (
        "no checkpoint was complete; the same command starts from the beginning"
    )


def test_a_damaged_checkpoint_is_not_the_rollback_advice(run: Path) -> None:
    (run / "checkpoints" / "step_00000005" / "checkpoint.json").write_text("{}")
    found = find_checkpoints(run / "checkpoints")
    assert "no earlier one is good: --fresh" in rollback_advice(found, 11, "the same command")


def test_what_resumes_a_run_that_went_back() -> None:
    assert resume_hint("run", "run", fresh=False, goes_back=True) == "the same command without --resume_step"
