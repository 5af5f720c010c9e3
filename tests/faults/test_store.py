"""Row 32 of the fault matrix: checkpoints in an object store that fails, and a machine that is lost with the run's folder."""

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from faults.jobs import Job, assert_same
from object_store import ObjectStore, new_bucket, serving
from scalegpt.checkpoint.address import place_of
from scalegpt.checkpoint.manifest import MANIFEST

FOR_EVER = 600.0

Start = Callable[..., Job]
Undisturbed = Callable[..., Job]

LATE = {"before the manifest": ("assemble", [5]), "while rank 1 uploads": ("part", [5])}
"""Where all are killed while the checkpoint of step 10 is saved, and which checkpoints there are then."""


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    with serving() as found:
        yield found


def in_store(job: Job) -> list[str]:
    """Let a job keep its checkpoints in a store, and give its text a path that is the same everywhere; returns the flags."""
    bucket = new_bucket()
    job.saved = place_of(f"{bucket}/runs/run")
    return ["--checkpoint_dir", f"{bucket}/runs", "--input_file", str(job.folder / "text.txt")]


def uncommitted(job: Job) -> set[str]:
    """The folders of objects without a manifest."""
    found: dict[str, set[str]] = {}
    for name in job.saved.objects():
        folder, _, rest = name.partition("/")
        found.setdefault(folder, set()).add(rest)
    return {folder for folder, names in found.items() if folder.startswith("step_") and MANIFEST not in names}


@pytest.mark.parametrize(
    ("layout", "when"),
    [
        pytest.param("fsdp2", "before the manifest", marks=pytest.mark.faults),
        pytest.param("zero2", "while rank 1 uploads", marks=pytest.mark.faults),
    ],
)
def test_a_run_goes_on_on_another_machine(
    start_job: Start, undisturbed: Undisturbed, server: ObjectStore, layout: str, when: str
) -> None:
    place, left = LATE[when]
    job = start_job(layout)
    flags, elsewhere = in_store(job), job.folder / "elsewhere"
    elsewhere.mkdir()
    apart: dict[str, Any] = {"elsewhere": {"rank": 1, "folder": str(elsewhere)}}
    rank = 1 if place == "part" else 0
    with server.failing(0.2) as failed:
        slow = {"place": place, "seconds": FOR_EVER, "step": 8, "rank": rank}
        # Training waits here: else it would have passed step 8 before the first checkpoint is whole.
        job.start(*flags, "--async_checkpoint", "false", slow=slow, **apart)
        where = elsewhere if rank else job.folder
        job.wait_until(lambda: (where / f"at_{place}.{rank}").exists() or job.is_over(), 180, place)
        assert not job.is_over(), job.output()
        job.kill()
        assert job.checkpoints() == left
        assert uncommitted(job) == ({"step_00000010"} if place == "assemble" else uncommitted(job))
        assert not (elsewhere / "runs").exists()
        shutil.rmtree(job.folder / "runs")  # a machine takes the place of the lost one
        job.finish(*flags, **apart)
        assert sum(failed.values()) > 10, failed
    assert f"runs/run/ was fetched from {job.saved}/run" in job.output()
    assert "step_00000005, step 5 of 14" in job.output()
    assert job.checkpoints() == [10, 14]
    assert uncommitted(job) == set()
    assert_same(job, undisturbed(layout))
