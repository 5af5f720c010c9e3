"""Row 27 of the fault matrix: a port that is taken, and two runs in one directory."""

import socket
from collections.abc import Callable

import pytest

from faults.jobs import LAUNCHERS, Job, assert_same

BOUND = 60.0
PORT = 29500
"""What launchers take where nobody names another."""

Start = Callable[..., Job]
Undisturbed = Callable[..., Job]


@pytest.mark.faults
def test_row_27_two_runs_in_one_directory(start_job: Start, undisturbed: Undisturbed, layout: str) -> None:
    """The first stands still meanwhile, or it might be over before the second has come so far."""
    job, second = start_job(layout), start_job(layout)
    job.start(pace=0.3)
    job.wait_for_step(3)
    ranks, owner = [job.rank(0), job.rank(1)], job.rank(0).pid
    for rank in ranks:
        rank.suspend()
    second.start()
    assert second.wait(BOUND) != 0
    for rank in ranks:
        rank.resume()
    lines = [line for line in job.output().splitlines() if "error:" in line]
    refusal = (
        f"scalegpt train: error: runs/run is being trained by process {owner}; wait for it, or choose another --mod"
    )
    assert len([line for line in lines if line.startswith(refusal)]) == len(lines) == 1, job.output()
    assert not job.is_over()
    assert job.wait() == 0, job.output()
    assert_same(job, undisturbed(layout))


@pytest.mark.faults
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_row_27_the_port_is_taken(
    start_job: Start, undisturbed: Undisturbed, layout: str, launcher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launchers as the documentation has them, without a port."""
    job = start_job(layout, launcher)
    with socket.socket() as taken:
        try:
            taken.bind(("", PORT))
            taken.listen()
        except OSError:
            pass  # by another
        job.start(bare=True)
        assert job.wait() == 0, job.output()
    assert_same(job, undisturbed(layout))
