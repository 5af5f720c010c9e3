"""Row 26 of the fault matrix: the writer of a checkpoint dies during training."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from faults.jobs import Job, assert_same

BOUND = 60.0

Start = Callable[..., Job]
Undisturbed = Callable[..., Job]


def manifest(job: Job, step: int) -> Any:
    return json.loads((job.checkpoint(step) / "checkpoint.json").read_text())


@pytest.mark.faults
def test_row_26_what_is_saved_is_the_state_at_the_save(start_job: Start, undisturbed: Undisturbed, layout: str) -> None:
    """The writers wait until the weights have changed; the files are those of a save that training waited for."""
    keep = ["--keep_checkpoints", "3"]
    job = start_job(layout)
    job.start(*keep, slow={"place": "part", "seconds": 2.0, "step": 5})
    assert job.wait() == 0, job.output()
    for rank in (0, 1):
        assert int((job.folder / f"left_part.{rank}").read_text()) > 6
    reference = undisturbed(layout, *keep, "--async_checkpoint", "false")
    for step in (5, 10, 14):
        ours, theirs = manifest(job, step), manifest(reference, step)
        assert ours["files"] == theirs["files"]  # their digests
        assert ours["tensors"] == theirs["tensors"]
    assert_same(job, reference)


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
def test_row_26_the_writer_dies(start_job: Start, undisturbed: Undisturbed, layout: str, rank: int) -> None:
    job = start_job(layout)
    job.start(writer={"rank": rank, "step": 8}, pace=0.3)
    assert job.wait(BOUND) != 0
    status = job.status()
    assert status["state"] == "failed"
    assert "step_00000010 cannot be written: ValueError('no such luck')" in status["cause"]
    assert max(job.losses()) in {10, 11}  # the next step tells all ranks
    lines = [line for line in job.output().splitlines() if "error: checkpoint" in line]
    assert len(lines) == 2, job.output()
    assert job.checkpoints() == [5]
    job.finish()
    assert "step_00000005, step 5 of 14" in job.output()
    assert_same(job, undisturbed(layout))
