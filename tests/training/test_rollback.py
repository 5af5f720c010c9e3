"""Going back behind a spike: to which checkpoint, and what becomes of the files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scalegpt.checkpoint.manifest import Progress
from scalegpt.checkpoint.store import find_checkpoints
from scalegpt.config import TrainConfig
from scalegpt.data.ledger import Stretch
from scalegpt.errors import RunError
from scalegpt.training.guards import Spike
from scalegpt.training.rollback import choose_checkpoint, go_back
from scalegpt.training.rundir import RunDirectory

SPIKE = Spike(50, 9.0, 2.0, 2.4, begins=True)
STRETCH = Stretch(1, 0, 4, 16, 1337, 5000, "train.bin", "digest", "start")
TRAIN = TrainConfig(spike_window=20, max_rollbacks=2)


def now(**changes: Any) -> Progress:
    return Progress(**{"step": 50, "tokens": 50 * 64, "sequences": 200, **changes})


@pytest.mark.parametrize(
    ("steps", "chosen"),
    [((10, 20, 29, 40), 29), ((10, 30), 10), ((30, 40), 30), ((40, 49), 40), ((50, 60), None), ((), None)],
)
def test_the_newest_before_the_window_is_chosen_or_else_the_oldest(
    tiny_run: Callable[..., Path], steps: tuple[int, ...], chosen: int | None
) -> None:
    folder = tiny_run(steps=steps) / "checkpoints"
    found = choose_checkpoint(folder, SPIKE, 20)
    assert (found.name if found else None) == (f"step_{chosen:08d}" if chosen else None)


def test_files_go_back_with_the_run_and_the_data_goes_on(tiny_run: Callable[..., Path]) -> None:
    directory = RunDirectory(tiny_run(steps=(20, 40, 45)))
    directory.ledger.append(STRETCH)
    directory.metrics.write_text("".join(f'{{"step": {step}, "loss": 2.0}}\n' for step in range(1, 51)))
    back = go_back(directory, SPIKE, TRAIN, now=now(left_out=3, rollbacks=1), stretch=STRETCH)
    assert back is not None
    assert [path.name for path in find_checkpoints(directory.checkpoints)] == ["step_00000020"]
    assert [line["step"] for line in directory.read_steps()] == list(range(1, 21))
    assert (back.progress.step, back.progress.sequences) == (20, 200)
    assert (back.progress.left_out, back.progress.rollbacks) == (200 - 120, 2)
    assert directory.ledger.read() == [STRETCH, back.stretch]
    assert back.stretch.window_of(21) == 200
    assert back.stretch.reason.startswith("rolled back: loss spike at step 50: 9.0000")
    assert back.stretch.reason.endswith("windows 120 to 199 are left out")


def test_a_run_goes_back_so_often_only(tiny_run: Callable[..., Path]) -> None:
    directory = RunDirectory(tiny_run(steps=(20,)))
    with pytest.raises(RunError, match=r"loss spike at step 50: .*, after 2 rollbacks; lower --learning_rate"):
        go_back(directory, SPIKE, TRAIN, now=now(rollbacks=2), stretch=STRETCH)
    assert find_checkpoints(directory.checkpoints)


def test_without_a_checkpoint_there_is_no_way_back(tmp_path: Path) -> None:
    assert go_back(RunDirectory(tmp_path), SPIKE, TRAIN, now=now(), stretch=STRETCH) is None
