"""The host's memory and cores under the limits of control groups, in both of their versions."""

import os
from pathlib import Path
from typing import Any

import psutil
import pytest

from scalegpt.system.cores import available_bytes, usable_cores

GIB = 2**30
FREE = 64 * GIB


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 GiB that the kernel calls available, and 16 cores."""
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=FREE))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)


def write(root: Path, **files: Any) -> None:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


def group(root: Path, folder: str, **files: Any) -> None:
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / folder / name.replace("_", ".", 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


def test_without_limits_it_is_all_the_machines(tmp_path: Path) -> None:
    assert (available_bytes(tmp_path), usable_cores(tmp_path)) == (FREE, 16)
    write(tmp_path, proc__self__cgroup="0::/user.slice")
    group(tmp_path, "user.slice", memory_max="max", memory_current=GIB, cpu_max="max 100000")
    assert (available_bytes(tmp_path), usable_cores(tmp_path)) == (FREE, 16)


def test_a_container_of_version_two(tmp_path: Path) -> None:
    write(tmp_path, proc__self__cgroup="0::/")
    group(tmp_path, "", memory_max=16 * GIB, memory_current=6 * GIB, memory_stat=f"anon 1\ninactive_file {2 * GIB}",
          cpu_max="250000 100000")  # fmt: skip
    assert (available_bytes(tmp_path), usable_cores(tmp_path)) == (12 * GIB, 2)


def test_a_group_around_ours_limits_it_too(tmp_path: Path) -> None:
    write(tmp_path, proc__self__cgroup="0::/jobs/7/step")
    group(tmp_path, "jobs/7/step", memory_max="max", cpu_max="max 100000")
    group(tmp_path, "jobs/7", memory_max=8 * GIB, memory_current=GIB, cpu_max="50000 100000")
    group(tmp_path, "jobs", memory_max=32 * GIB, memory_current=GIB, cpu_max="800000 100000")
    assert (available_bytes(tmp_path), usable_cores(tmp_path)) == (7 * GIB, 1)


def test_a_group_that_is_full_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path, proc__self__cgroup="0::/full")
    group(tmp_path, "full", memory_max=GIB, memory_current=2 * GIB)
    assert available_bytes(tmp_path) == 0


def test_version_one(tmp_path: Path) -> None:
    write(tmp_path, proc__self__cgroup="5:memory:/docker/a\n4:cpu,cpuacct:/docker/a\n1:name=systemd:/docker/a")
    group(tmp_path, "memory/docker/a", memory_limit_in_bytes=4 * GIB, memory_usage_in_bytes=3 * GIB,
          memory_stat=f"inactive_file 1\ntotal_inactive_file {GIB}")  # fmt: skip
    group(tmp_path, "cpu/docker/a", cpu_cfs_quota_us=400000, cpu_cfs_period_us=100000)
    assert (available_bytes(tmp_path), usable_cores(tmp_path)) == (2 * GIB, 4)
    group(tmp_path, "memory/docker/a", memory_limit_in_bytes=9223372036854771712)
    group(tmp_path, "cpu/docker/a", cpu_cfs_quota_us=-1)
    assert (available_bytes(tmp_path), usable_cores(tmp_path)) == (FREE, 16)


def test_version_one_seen_from_inside_a_container(tmp_path: Path) -> None:
    write(tmp_path, proc__self__cgroup="5:memory:/docker/a")
    group(tmp_path, "memory", memory_limit_in_bytes=4 * GIB, memory_usage_in_bytes=GIB)
    assert available_bytes(tmp_path) == 3 * GIB


def test_the_real_machine_has_some() -> None:
    assert available_bytes() > 0
    assert 1 <= usable_cores() <= 16


def test_planner_trainer_and_data_ask_the_same_function() -> None:
    from scalegpt.backends import world
    from scalegpt.data import prepare
    from scalegpt.hardware import detect

    assert detect.usable_cores is world.usable_cores is prepare.usable_cores is usable_cores
