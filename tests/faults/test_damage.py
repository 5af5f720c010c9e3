"""Rows 14, 15 and 16 of the fault matrix: checkpoints whose files were changed, cut, emptied or deleted."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from faults.jobs import Job, assert_same
from scalegpt.backends import World
from scalegpt.errors import InputError
from scalegpt.training.runs.directory import RunDirectory
from scalegpt.training.runs.resume import choose_checkpoint

Start = Callable[..., Job]
Undisturbed = Callable[..., Job]

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
KEEP = ["--keep_checkpoints", "3"]
FILES = [
    "checkpoint.json",
    *(f"rank_0000{rank}.{kind}.safetensors" for rank in (0, 1) for kind in ("weights", "moments")),
]


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES: dict[str, Callable[[Path], None]] = {
    "first byte": lambda path: flip(path, 0), "middle byte": lambda path: flip(path, path.stat().st_size // 2),
    "last byte": lambda path: flip(path, -1), "truncate": truncate, "zero": zero, "empty": empty, "delete": Path.unlink,
}  # fmt: skip


@pytest.mark.faults
def test_rows_14_15_every_damage_of_every_file_is_named(undisturbed: Undisturbed, layout: str, tmp_path: Path) -> None:
    job = undisturbed(layout, *KEEP).copy_to(tmp_path)
    newest, spare = job.checkpoint(14), tmp_path / "spare"
    assert {path.name for path in newest.iterdir()} == set(FILES)
    for file in FILES:
        shutil.copy(newest / file, spare)
        for how, damage in DAMAGES.items():
            damage(newest / file)
            found = choose_checkpoint(RunDirectory(job.run), ALONE, trusted=False)
            assert found.checkpoint is not None
            assert found.checkpoint.path == job.checkpoint(10), (file, how)
            assert str(newest / file) in found.notes[0]
            assert f"going back to {job.checkpoint(10)}, the last good checkpoint" in found.notes[0]
            shutil.copy(spare, newest / file)
    found = choose_checkpoint(RunDirectory(job.run), ALONE, trusted=False)
    assert found.checkpoint is not None
    assert found.checkpoint.path == newest


@pytest.mark.faults
def test_rows_14_15_a_run_goes_on_from_the_last_good_one(
    start_job: Start, undisturbed: Undisturbed, layout: str
) -> None:
    """The newest with a byte changed, the one before it cut: back to the third."""
    job = start_job(layout)
    shutil.copytree(undisturbed(layout, *KEEP).run, job.run)
    flip(job.checkpoint(14) / FILES[4], -5)
    truncate(job.checkpoint(10) / FILES[1])
    job.finish(*KEEP)
    for step, file, what in ((14, FILES[4], "its SHA-256 is not"), (10, FILES[1], "bytes, not")):
        line = next(each for each in job.output().splitlines() if f"step_{step:08d}/{file} is damaged" in each)
        assert line.startswith("warning: ")
        assert what in line
        assert "going back to runs/run/checkpoints/step_00000005, the last good checkpoint" in line
        assert job.checkpoint(step).with_suffix(".damaged").is_dir()
    assert "step_00000005, step 5 of 14" in job.output()
    assert_same(job, undisturbed(layout, *KEEP))


@pytest.mark.faults
def test_rows_14_15_a_run_goes_on_without_its_newest_manifest_and_shard(
    start_job: Start, undisturbed: Undisturbed, layout: str
) -> None:
    job = start_job(layout)
    shutil.copytree(undisturbed(layout, *KEEP).run, job.run)
    flip(job.checkpoint(14) / "checkpoint.json", 1000)
    (job.checkpoint(14) / FILES[2]).unlink()
    job.finish(*KEEP)
    assert "step_00000014/checkpoint.json is damaged" in job.output()
    assert "step_00000010, step 10 of 14" in job.output()
    assert_same(job, undisturbed(layout, *KEEP))


@pytest.mark.faults
def test_row_16_nothing_points_to_the_newest_checkpoint(
    start_job: Start, undisturbed: Undisturbed, layout: str
) -> None:
    """There is no pointer of ours; what other programs leave for one, empty or dangling, leads nobody astray."""
    job = start_job(layout)
    shutil.copytree(undisturbed(layout, *KEEP).run, job.run)
    checkpoints = job.run / "checkpoints"
    (checkpoints / "latest").write_text("")
    (job.run / "latest").write_text("step_00000099")
    (checkpoints / "step_latest").symlink_to("step_00000099")
    (checkpoints / "step_00000099").symlink_to("nowhere")
    (checkpoints / "step_00000098").write_text("no folder")
    found = choose_checkpoint(RunDirectory(job.run), ALONE, trusted=False)
    assert found.checkpoint is not None
    assert found.checkpoint.path == job.checkpoint(14)
    shutil.rmtree(job.checkpoint(14))
    shutil.rmtree(job.checkpoint(10))
    job.finish(*KEEP)
    assert (
        "warning: the checkpoint of step 14 is missing; going back to runs/run/checkpoints/step_00000005"
        in job.output()
    )
    assert "step_00000005, step 5 of 14" in job.output()
    assert_same(job, undisturbed(layout, *KEEP))


@pytest.mark.faults
def test_row_16_a_run_whose_checkpoints_are_gone_does_not_begin_again(
    start_job: Start, undisturbed: Undisturbed, layout: str
) -> None:
    job = start_job(layout)
    shutil.copytree(undisturbed(layout, *KEEP).run, job.run)
    shutil.rmtree(job.run / "checkpoints")
    before = job.losses()
    job.start(*KEEP)
    assert job.wait() != 0
    assert "had a checkpoint of step 14, which is missing from runs/run/checkpoints" in job.output()
    assert job.losses() == before
    for step in (5, 10, 14):
        folder = job.checkpoint(step)
        folder.mkdir(parents=True)
    with pytest.raises(InputError, match="none of the 3 checkpoints is whole"):
        choose_checkpoint(RunDirectory(job.run), ALONE, trusted=False)


@pytest.mark.faults
def test_row_16_a_killed_run_whose_first_checkpoint_is_gone_does_not_begin_again(start_job: Start, layout: str) -> None:
    """It was written while training went on, and the kill came before the next."""
    job = start_job(layout)
    job.start(pace=0.2)
    job.wait_for_step(8)
    job.kill()
    assert job.checkpoints() == [5]
    shutil.move(job.run / "checkpoints" / "step_00000005", job.folder)
    before = (job.run / "metrics.jsonl").read_bytes()
    for status in (None, ""):  # what it knows, and then that it is not known
        if status is not None:
            (job.run / "run_status.json").write_text(status)
        job.start()
        assert job.wait() != 0
        assert (job.run / "metrics.jsonl").read_bytes() == before
    assert "had a checkpoint of step 5, which is missing from runs/run/checkpoints" in job.output()
    assert "there is no checkpoint in runs/run/checkpoints, and runs/run/run_status.json does not say" in job.output()
