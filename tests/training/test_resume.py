"""Which checkpoint a run goes on from, and when it does not begin again."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from scalegpt.backends import World
from scalegpt.errors import InputError
from scalegpt.training.resume import Found, newest_whole_checkpoint
from scalegpt.training.rundir import RunDirectory

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


def found_in(folder: Path) -> Found:
    return newest_whole_checkpoint(RunDirectory(folder), ALONE, trusted=True)


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
    assert note.startswith("warning: the checkpoint of step 10 is gone; going back to ")


@pytest.mark.parametrize("hurt", ["empty", "no folder"])
def test_a_run_whose_checkpoints_are_gone_does_not_begin_again(run: Path, hurt: str) -> None:
    shutil.rmtree(run / "checkpoints")
    if hurt == "empty":
        (run / "checkpoints").mkdir()
    with pytest.raises(
        InputError, match=r"had a checkpoint of step 10, and there is none in .*; put it back, or --fresh"
    ):
        found_in(run)


@pytest.mark.parametrize(
    "status", [None, "{}", "[]", "broken", '{"checkpoint_step": null}', '{"checkpoint_step": "10"}']
)
def test_a_run_that_is_not_known_to_have_had_any_begins(run: Path, status: str | None) -> None:
    shutil.rmtree(run / "checkpoints")
    path = run / "run_status.json"
    path.unlink() if status is None else path.write_text(status)
    assert found_in(run) == Found(None)
