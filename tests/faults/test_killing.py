"""Rows 1 to 4 and 13 of the fault matrix: SIGKILL, in a step and at every place of a save."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from faults.jobs import ROOT, Job, assert_same

BOUND = 60.0
"""Seconds within which the others must have ended; torchrun alone may take 30 of them."""

FOR_EVER = 600.0

Start = Callable[..., Job]
Undisturbed = Callable[..., Job]

SAVING = {
    "row 2, shards": {"place": "write", "left": [5], "files": 2},
    "row 3, before the manifest": {"place": "assemble", "left": [5], "files": 6},
    "row 3, before the rename": {"place": "commit", "left": [5], "files": 5},
    "row 4, rotation": {"place": "rotate", "left": [10], "files": 4},
}
"""Where all are killed while the checkpoint of step 10 is written or that of step 5 deleted, which checkpoints are whole
then, and how many files the incomplete one has: of two ranks weights, moments and a record, and then the manifest for the
records."""

QUICK = ("zero2", "row 2, shards")
"""That of ``make test``."""


def is_alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.faults
@pytest.mark.parametrize("victim", [0, 1])
def test_row_1_a_rank_is_killed_in_a_step(start_job: Start, undisturbed: Undisturbed, layout: str, victim: int) -> None:
    job = start_job(layout)
    job.start(slow={"place": "reduce", "seconds": FOR_EVER, "step": 7, "rank": victim})
    job.wait_for_place("reduce", rank=victim)
    lost = job.rank(victim)
    lost.kill()
    assert job.wait(BOUND) != 0
    status = job.status()
    assert (status["state"], status["step"]) == ("failed", 6)
    assert f"rank {victim} (process {lost.pid} on" in status["cause"]
    assert " has ended; its last heartbeat was in step " in status["cause"]
    job.finish()
    assert "step_00000005, step 5 of 14" in job.output()
    assert_same(job, undisturbed(layout))


@pytest.mark.parametrize(
    ("layout", "row"),
    [
        pytest.param(layout, row, marks=pytest.mark.slow if (layout, row) == QUICK else pytest.mark.faults)
        for layout in ("zero2", "fsdp2")
        for row in SAVING
    ],
)
def test_rows_2_3_4_all_are_killed_while_saving(
    start_job: Start, undisturbed: Undisturbed, layout: str, row: str
) -> None:
    what, keep = SAVING[row], ["--keep_checkpoints", "1"]
    job = start_job(layout)
    job.start(*keep, slow={"place": what["place"], "seconds": FOR_EVER, "step": 8})
    job.wait_for_place(str(what["place"]), rank=0)
    owner = int((job.run / ".lock").read_text())
    job.wait_until(lambda: [_count(folder) for folder in job.leftovers()] == [what["files"]], BOUND, "its files")
    job.kill()
    job.wait_until(lambda: not is_alive(owner), BOUND, "the owner of the lock is dead")
    assert job.checkpoints() == what["left"]
    job.finish(*keep)
    assert f"checkpoints/step_{what['left'][0]:08d}, step {what['left'][0]} of 14" in job.output()
    assert job.leftovers() == []
    assert job.checkpoints() == [14]
    assert_same(job, undisturbed(layout))


def _count(folder: Path) -> int:
    return len(list(folder.iterdir()))


@pytest.mark.faults
def test_row_13_a_crash_under_max_restarts(start_job: Start, undisturbed: Undisturbed, layout: str) -> None:
    job = start_job(layout)
    job.start(restarts=1, crash={"rank": 1, "step": 8})
    assert job.wait() == 0, job.output()
    assert (job.folder / "crash.1").exists()
    assert "step_00000005, step 5 of 14" in job.output()
    assert_same(job, undisturbed(layout))


@pytest.mark.faults
def test_row_13_a_restart_goes_on_with_what_fresh_began(
    start_job: Start, undisturbed: Undisturbed, layout: str
) -> None:
    job = start_job(layout)
    job.finish("--max_iters", "1")
    earlier = job.losses()
    job.start("--fresh", restarts=1, crash={"rank": 1, "step": 8})
    assert job.wait() == 0, job.output()
    assert "a new run in runs/run-2; the same command with --model_name run-2 instead of --fresh" in job.output()
    assert "runs/run-2/checkpoints/step_00000005, step 5 of 14" in job.output()
    assert job.losses() == earlier
    assert sorted(path.name for path in (job.folder / "runs").iterdir()) == ["run", "run-2"]
    job.run = job.folder / "runs" / "run-2"
    assert_same(job, undisturbed(layout))


@pytest.mark.faults
def test_the_script_that_kills_at_random(tmp_path: Path) -> None:
    """In two pieces, and refused with other arguments; it compares by itself."""
    command = [sys.executable, str(ROOT / "benchmarks" / "kill_run.py"), "--folder", str(tmp_path), "--kills", "2"]

    def run(*words: str) -> "subprocess.CompletedProcess[str]":
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            [*command, *words], env=environment, capture_output=True, text=True, timeout=600, check=False
        )

    first = run("--pause_after", "1")
    assert first.returncode == 0, first.stderr
    assert "paused after 1 of 2 kills; the same command resumes" in first.stdout
    assert "holds other kills: seed 1, fsdp2" in run("--seed", "2").stderr
    second = run()
    assert second.returncode == 0, second.stdout + second.stderr
    summary = json.loads(second.stdout.splitlines()[-1])
    assert (summary["kills"], summary["failures"], summary["same_losses"], summary["same_weights"]) == (
        2,
        [],
        True,
        True,
    )
