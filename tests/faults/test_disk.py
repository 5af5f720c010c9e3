"""Rows 17 and 18 of the fault matrix: a disk that is full, may not be written, or says that it is broken."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from faults.jobs import ROOT, Job, assert_same

BOUND = 60.0
PACE = 0.4
MIB = 1 << 20

Start = Callable[..., Job]
Undisturbed = Callable[..., Job]


def mount(*words: str) -> None:
    """Mount something, or skip the test."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small or a read-only disk")
    done = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"root may not mount here: {done.stderr.strip()}")


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[None]:
    """A disk of this many bytes, in memory."""
    place.mkdir()
    mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place))
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@contextmanager
def read_only(place: Path) -> Iterator[None]:
    """Let a folder be read-only for all, root too."""
    mount("--bind", str(place), str(place))
    try:
        mount("-o", "remount,ro,bind", str(place))
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path, *, leave: int) -> Path:
    """Fill a disk except this many bytes."""
    filler = disk / "filler"
    with filler.open("wb") as file:
        while (free := shutil.disk_usage(disk).free) > leave:
            file.write(b"x" * min(free - leave, MIB))
            file.flush()
    return filler


def assert_failed(job: Job, *words: str) -> None:
    """Ended on both ranks with one line each that says so, and the checkpoint of step 5 is left."""
    assert job.wait(BOUND) != 0
    status = job.status()
    assert status["state"] == "failed"
    words = (*words, "step_00000010 cannot be written", "no earlier checkpoint was touched", "start the run again")
    for rank in ("", ": rank 1"):
        lines = [each for each in job.output().splitlines() if each.startswith(f"scalegpt train{rank}: error:")]
        assert all(word in lines[-1] for word in words), job.output()
    assert all(word in status["cause"] for word in words)
    assert job.checkpoints() == [5]
    traces = [line for line in job.output().splitlines() if f'File "{ROOT}' in line]
    # No traceback of ours; torchrun, whose environment may lie in our folder, has its own.
    assert not [line for line in traces if "site-packages" not in line]


def assert_goes_on(job: Job, reference: Job) -> None:
    job.finish()
    assert "step_00000005, step 5 of 14" in job.output()
    assert job.leftovers() == []
    assert_same(job, reference)


@pytest.mark.faults
def test_row_17_room_is_checked_before_the_run_and_before_each_save(
    start_job: Start, undisturbed: Undisturbed, layout: str
) -> None:
    job = start_job(layout)
    runs = job.folder / "runs"
    with small_disk(runs, MIB):
        job.start()
        assert job.wait(BOUND) != 0
        assert "error: not enough disk space for" in job.output()
        assert not (job.run / "config.yaml").exists()
    runs.rmdir()
    with small_disk(runs, 8 * MIB):
        job.start(pace=PACE)
        job.wait_until(lambda: job.checkpoints() == [5], BOUND, "the first checkpoint")
        filler = fill(runs, leave=MIB)
        assert_failed(job, "it needs ", " bytes (0.0 GB free)")
        filler.unlink()
        assert_goes_on(job, undisturbed(layout))


@pytest.mark.faults
def test_row_17_the_disk_fills_while_a_checkpoint_is_written(
    start_job: Start, undisturbed: Undisturbed, layout: str
) -> None:
    job = start_job(layout)
    runs = job.folder / "runs"
    with small_disk(runs, 8 * MIB):
        job.start(slow={"place": "part", "seconds": 3.0, "step": 8}, pace=PACE)
        job.wait_for_place("part", rank=0)
        filler = fill(runs, leave=MIB // 8)
        assert_failed(job, "No space left on device")
        filler.unlink()
        assert_goes_on(job, undisturbed(layout))


@pytest.mark.faults
def test_row_17_a_file_may_not_grow(start_job: Start, undisturbed: Undisturbed, layout: str) -> None:
    """As under a quota; needs no mount."""
    job = start_job(layout)
    job.start(limit={"step": 9, "bytes": 40_000})
    assert_failed(job, "File too large")
    assert_goes_on(job, undisturbed(layout))


@pytest.mark.faults
def test_row_18_the_folder_becomes_read_only(start_job: Start, undisturbed: Undisturbed, layout: str) -> None:
    job = start_job(layout)
    job.start(pace=PACE)
    job.wait_until(lambda: job.checkpoints() == [5], BOUND, "the first checkpoint")
    with read_only(job.run / "checkpoints"):
        assert_failed(job, "Read-only file system")
    assert_goes_on(job, undisturbed(layout))


@pytest.mark.faults
def test_row_18_an_error_of_the_disk_that_passes(start_job: Start, undisturbed: Undisturbed, layout: str) -> None:
    job = start_job(layout)
    job.start(eio={"rank": 0, "step": 8, "times": 2})
    assert job.wait() == 0, job.output()
    assert_same(job, undisturbed(layout))


@pytest.mark.faults
def test_row_18_an_error_of_the_disk_that_stays(start_job: Start, undisturbed: Undisturbed, layout: str) -> None:
    job = start_job(layout)
    job.start(eio={"rank": 1, "step": 8}, pace=PACE)
    assert_failed(job, "Input/output error")
    assert_goes_on(job, undisturbed(layout))
