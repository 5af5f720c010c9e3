"""Rows 11, 12 and 22 of the fault matrix: a rank that stands still, a loader that stalls, memory that does not suffice."""

import signal
from collections.abc import Callable

import pytest

from faults.jobs import Job, assert_same

PACE = 0.4
TIMEOUTS = ["--step_timeout", "5", "--first_step_timeout", "60"]
BOUND = 120.0
"""The time-out, finding out who is to blame, and the 30 s after which a launcher kills a rank that does not react."""

Start = Callable[..., Job]
Undisturbed = Callable[..., Job]


@pytest.mark.faults
def test_row_11_a_stopped_rank_is_named(start_job: Start, undisturbed: Undisturbed, layout: str) -> None:
    job = start_job(layout)
    job.start(*TIMEOUTS, pace=PACE)
    job.wait_for_step(3)
    victim = job.rank(1)
    victim.send_signal(signal.SIGSTOP)
    assert job.wait(BOUND) != 0
    cause = job.status()["cause"]
    assert job.status()["state"] == "failed"
    assert "takes more than 5 s: rank 1 (process" in cause
    assert f"process {victim.pid} on" in cause
    assert "the process writes no heartbeats any more" in cause
    assert cause in job.output()
    assert "in _take_step" in (job.run / "stacks_rank_0.txt").read_text()
    job.finish(*TIMEOUTS)
    assert_same(job, undisturbed(layout))


@pytest.mark.faults
def test_row_12_a_stalled_loader_is_named_and_the_restart_finishes(
    start_job: Start, undisturbed: Undisturbed, layout: str
) -> None:
    job = start_job(layout)
    job.start(*TIMEOUTS, restarts=1, stall={"rank": 1, "step": 7})
    assert job.wait(BOUND) == 0, job.output()
    assert "step 7 takes more than 5 s: rank 1 (process" in job.output()
    assert "step 7, loader: the others wait for it" in job.output()
    assert "worker.py" in (job.run / "stacks_rank_1.txt").read_text()
    assert (job.run / "stacks_rank_0.txt").is_file()
    assert_same(job, undisturbed(layout))


@pytest.mark.faults
def test_a_slow_rank_is_named(start_job: Start, layout: str) -> None:
    """It computes longer; the steps of both ranks take equally long, since they wait for each other."""
    job = start_job(layout)
    job.finish("--max_iters", "40", burn={"rank": 1, "seconds": 0.1})
    (line,) = [line for line in job.output().splitlines() if "the median of the ranks for its own work" in line]
    assert line.startswith("warning: rank 1 takes ")


@pytest.mark.faults
def test_row_22_out_of_memory_on_one_rank(start_job: Start, undisturbed: Undisturbed, layout: str) -> None:
    job = start_job(layout)
    job.start(oom={"rank": 1, "step": 7, "above": 2})
    assert job.wait(BOUND) != 0
    status = job.status()
    assert (status["state"], status["step"]) == ("failed", 6)
    assert "out of memory on rank 1 in step 7, forward and backward" in status["cause"]
    assert "use --micro_batch 2 (" in status["cause"]
    assert job.output().count("error: out of memory on rank 1 in step 7") >= 1
    job.finish()
    assert_same(job, undisturbed(layout))


@pytest.mark.slow
def test_row_22_on_oom_shrink_goes_on_at_half_the_micro_batch(start_job: Start, undisturbed: Undisturbed) -> None:
    """In the quick half, for one layout."""
    job = start_job("fsdp2")
    dropout = ["--dropout", "0"]  # what is drawn for it depends on the micro batch
    job.start("--on_oom", "shrink", *dropout, restarts=1, oom={"rank": 1, "step": 7, "above": 2})
    assert job.wait(BOUND) == 0, job.output()
    assert "micro_batch: 2" in job.config()
    assert "tokens_per_step: 512" in job.config()
    assert "micro batch 2: the run was out of memory with 4" in job.output()
    expected = undisturbed("fsdp2", *dropout).losses()
    assert job.losses().keys() == expected.keys()
    assert all(abs(loss - expected[step]) <= 1e-5 * expected[step] for step, loss in job.losses().items())
