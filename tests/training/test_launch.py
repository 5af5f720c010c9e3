"""Restarts of a launcher find what its first start began with ``--fresh``."""

import json
import os
from pathlib import Path

import psutil
import pytest

from scalegpt.system.processes import birth_of
from scalegpt.training.runs.directory import STARTED_BY
from scalegpt.training.runs.launch_marks import (
    begun_before,
    launch_marks,
    note_going_back,
    runs_named,
    went_back_before,
)

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0"}
NAMED = {**TORCHRUN, "TORCHELASTIC_RUN_ID": "job 7"}
SLURM = {"SLURM_JOB_ID": "123"}


def begin(root: Path, name: str, environment: dict[str, str]) -> None:
    (root / name).mkdir()
    (root / name / STARTED_BY).write_text(json.dumps(launch_marks(environment)))


def test_without_a_launcher_there_is_nothing_to_tell_starts_by(tmp_path: Path) -> None:
    assert launch_marks({}) == {}
    begin(tmp_path, "run", {})
    assert begun_before(tmp_path, "run", {}) is None


def test_torchruns_process_is_known_again(tmp_path: Path) -> None:
    (agent,) = launch_marks(TORCHRUN).values()
    assert agent.endswith(f" {os.getppid()} {birth_of(os.getppid())}")
    assert begun_before(tmp_path, "run", TORCHRUN) is None
    begin(tmp_path, "run-2", TORCHRUN)
    assert begun_before(tmp_path, "run", TORCHRUN) == "run-2"
    assert begun_before(tmp_path, "other", TORCHRUN) is None


def test_torchruns_process_is_known_again_after_the_clock_was_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(tmp_path, "run-2", TORCHRUN)
    moved = psutil.Process(os.getppid()).create_time() + 5
    monkeypatch.setattr(psutil.Process, "create_time", lambda _self: moved)
    assert begun_before(tmp_path, "run", TORCHRUN) == "run-2"


def test_another_torchrun_began_something_else(tmp_path: Path) -> None:
    begin(tmp_path, "run-2", TORCHRUN)
    marks = json.loads((tmp_path / "run-2" / STARTED_BY).read_text())
    (tmp_path / "run-2" / STARTED_BY).write_text(json.dumps({"agent": marks["agent"].replace(" ", " 1", 1)}))
    assert begun_before(tmp_path, "run", TORCHRUN) is None


@pytest.mark.parametrize(
    ("first", "again"),
    [(NAMED, {**NAMED, "TORCHELASTIC_RESTART_COUNT": "1"}), (SLURM, {**SLURM, "SLURM_RESTART_COUNT": "2"})],
)
def test_a_jobs_name_counts_only_at_a_restart(tmp_path: Path, first: dict[str, str], again: dict[str, str]) -> None:
    begin(tmp_path, "run", first)
    begin(tmp_path, "run-2", first)
    for folder in ("run", "run-2"):  # on another machine than the first time
        path = tmp_path / folder / STARTED_BY
        path.write_text(json.dumps({key: mark for key, mark in launch_marks(first).items() if key != "agent"}))
    assert begun_before(tmp_path, "run", first) is None
    assert begun_before(tmp_path, "run", again) == "run-2"


def test_runs_of_a_name_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("run-10", "run-9", "run", "run-x", "run-2b", "running", "arun"):
        (tmp_path / name).mkdir()
    assert [path.name for path in runs_named(tmp_path, "run")] == ["run", "run-9", "run-10"]


@pytest.mark.parametrize("content", ["", "[]", "{", "{}"])
def test_a_broken_mark_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / STARTED_BY).write_text(content)
    assert begun_before(tmp_path, "run", TORCHRUN) is None


def test_a_restart_does_not_go_back_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in TORCHRUN.items():
        monkeypatch.setenv(key, value)
    assert not went_back_before(tmp_path, 5)
    note_going_back(tmp_path, 5)
    assert went_back_before(tmp_path, 5)
    assert not went_back_before(tmp_path, 6)
    assert not went_back_before(tmp_path, 5, {}), "the same command, given anew, goes back again"
    (tmp_path / ".went_back").write_text("[]")
    assert not went_back_before(tmp_path, 5)
