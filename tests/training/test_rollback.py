"""Going back behind a spike: to which checkpoint, and what becomes of the files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scalegpt.checkpoint.manifest import Progress
from scalegpt.checkpoint.reader import Checkpoint
from scalegpt.checkpoint.store import find_checkpoints, step_of
from scalegpt.config import TrainConfig
from scalegpt.errors import RunError
from scalegpt.training.resilience.guards import Spike
from scalegpt.training.resilience.rollback import check_rollbacks, roll_back_files, rollback_candidates
from scalegpt.training.runs.directory import RunDirectory
from stretches import of_one_file

SPIKE = Spike(50, 9.0, 2.0, 2.4, begins=True)
STRETCH = of_one_file(1, 0, 4, 16, 1337, 5000, "train.bin", "digest", "start")
TRAIN = TrainConfig(spike_window=20, max_rollbacks=2)


def now(**changes: Any) -> Progress:
    return Progress(**{"step": 50, "tokens": 50 * 64, "sequences": 200, **changes})


@pytest.mark.parametrize(
    ("steps", "chosen"),
    [((10, 20, 29, 40), [29, 20, 10, 40]), ((10, 30), [10, 30]), ((30, 40), [30, 40]), ((50, 60), []), ((), [])],
)
def test_the_newest_before_the_window_is_preferred_and_then_the_oldest_in_it(
    tiny_run: Callable[..., Path], steps: tuple[int, ...], chosen: list[int]
) -> None:
    folder = tiny_run(steps=steps) / "checkpoints"
    assert [step_of(path) for path in rollback_candidates(folder, SPIKE, 20)] == chosen


def test_files_go_back_with_the_run_and_the_data_goes_on(tiny_run: Callable[..., Path]) -> None:
    directory = RunDirectory(tiny_run(steps=(20, 40, 45)))
    directory.ledger.append(STRETCH)
    directory.metrics.write_text("".join(f'{{"step": {step}, "loss": 2.0}}\n' for step in range(1, 51)))
    checkpoint = Checkpoint.open(directory.checkpoints / "step_00000020")
    back = roll_back_files(directory, SPIKE, checkpoint, now(left_out=3, rollbacks=1), STRETCH, 20)
    assert [path.name for path in find_checkpoints(directory.checkpoints)] == ["step_00000020"]
    assert [line["step"] for line in directory.read_steps()] == list(range(1, 21))
    assert (back.progress.step, back.progress.sequences) == (20, 200)
    assert (back.progress.left_out, back.progress.rollbacks) == (200 - 120, 2)
    assert directory.ledger.read() == [STRETCH, back.stretch]
    assert back.stretch.window_of(21) == 200
    assert back.stretch.reason.startswith("rolled back: loss spike at step 50: 9.0000")
    assert back.stretch.reason.endswith("windows 120 to 199 are skipped")


def test_a_run_goes_back_so_often_only() -> None:
    check_rollbacks(SPIKE, TRAIN, 1)
    with pytest.raises(RunError, match=r"loss spike at step 50: .*, after 2 rollbacks; lower --learning_rate"):
        check_rollbacks(SPIKE, TRAIN, 2)


def test_without_a_checkpoint_there_is_no_way_back(tmp_path: Path) -> None:
    assert rollback_candidates(tmp_path / "absent", SPIKE, 20) == []


def test_what_is_not_known_to_be_ours_is_set_aside_on_the_way_back(tiny_run: Callable[..., Path]) -> None:
    directory = RunDirectory(tiny_run(steps=(20, 25, 45)))
    (directory.checkpoints / "step_00000045").rename(directory.checkpoints / "step_00000048")
    (directory.checkpoints / "step_00000049").symlink_to("nowhere")
    directory.ledger.append(STRETCH)
    checkpoint = Checkpoint.open(directory.checkpoints / "step_00000020")
    roll_back_files(directory, SPIKE, checkpoint, now(), STRETCH, 20)
    left = sorted(path.name for path in directory.checkpoints.iterdir())
    assert left == ["step_00000020", "step_00000048.damaged", "step_00000049.damaged"]
