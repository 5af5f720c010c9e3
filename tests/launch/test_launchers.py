"""The command lines of docs/TRAINING.md, word for word as a user starts them, on two ranks of this machine's CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch_flags import SHAPE, TEXT

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
LAUNCHERS = {
    "python": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "deepspeed": [str(BIN / "deepspeed"), "--num_accelerators", "2"],
}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "bottles.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def launch(launcher: str, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "SCALEGPT_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [*LAUNCHERS[launcher], str(ROOT / "launch" / "train.py"), *flags],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


DEEPSPEED = ["-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--module"]
MODULE = {
    "python": ["-m", "scalegpt.train"],
    "torchrun": [*LAUNCHERS["torchrun"][1:], "-m", "scalegpt.train"],
    "deepspeed": [*DEEPSPEED, "scalegpt.train"],
    "deepspeed, package": [*DEEPSPEED, "scalegpt", "train"],
}
"""How Python starts an installed wheel, which has no ``launch/train.py``."""


def test_a_wheel_has_its_presets_its_cards_and_its_command(tmp_path: Path, installed: Path) -> None:
    """In an empty folder, with no path to the repository."""

    def run(*words: str) -> str:
        command = [str(installed.with_name("scalegpt")), *words]
        environment = {"PATH": os.defpath, "HOME": str(tmp_path), "LANG": "C.UTF-8"}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout

    plan = json.loads(run("plan", "--preset", "500M_1024", "--gpu", "a100-40gb", "--backend", "deepspeed", "--json"))
    assert plan["choice"]["fits"]
    assert "scalegpt.train" in plan["choice"]["command"]
    assert json.loads(run("params", "--preset", "Qwen3-0.6B", "--json"))["parameters"] == 596_049_920
    assert "--preset" in run("completion", "bash")
    code = "import scalegpt; print(scalegpt.__file__)"
    assert Path(subprocess.check_output([installed, "-c", code], cwd=tmp_path, text=True)).is_relative_to(
        installed.parents[1]
    )


@pytest.mark.parametrize("launcher", MODULE)
@pytest.mark.slow
def test_an_installed_package_trains_without_a_compiler_or_a_home(
    tmp_path: Path, text: Path, installed: Path, launcher: str
) -> None:
    """No ninja, g++ or shell on PATH, and no place for extensions: DeepSpeed builds nothing, and leaves nothing in memory."""
    layout = ["--backend", "fsdp"]
    if launcher.startswith("deepspeed"):
        layout = ["--backend", "deepspeed", "--zero-stage", "2", "--ds_config", "zero2.json"]
    environment = {
        "PATH": "/nowhere", "HOME": "/proc/nowhere", "TORCH_EXTENSIONS_DIR": "/proc/nowhere", "DS_ACCELERATOR": "cpu",
        "SCALEGPT_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "LANG": "C.UTF-8",
    }  # fmt: skip
    shared = Path("/dev/shm")
    before = set(shared.glob("deepspeed*"))
    flags = [
        *SHAPE,
        *layout,
        "--input_file",
        str(text),
        "--model_name",
        "run",
        "--max_iters",
        "2",
        "--micro_batch",
        "4",
    ]
    done = subprocess.run(
        [str(installed), *MODULE[launcher], *flags],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert status(tmp_path, "run")["state"] == "finished"
    assert set(shared.glob("deepspeed*")) == before


def losses(folder: Path, name: str) -> dict[int, float]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return {entry["step"]: entry["loss"] for entry in map(json.loads, lines) if "loss" in entry}


def status(folder: Path, name: str) -> Any:
    return json.loads((folder / "runs" / name / "run_status.json").read_text())


@pytest.mark.slow
def test_three_launchers_train_the_same_run(tmp_path: Path, text: Path) -> None:
    layouts = {
        "python": ["--backend", "plain"],
        "torchrun": ["--backend", "fsdp", "--zero-stage", "2"],
        "deepspeed": ["--backend", "deepspeed", "--zero-stage", "1"],
    }
    for name, layout in layouts.items():
        flags = [*SHAPE, *layout, "--input_file", str(text), "--model_name", name, "--max_iters", "10"]
        done = launch(name, tmp_path, *flags, "--micro_batch", "4")
        assert done.returncode == 0, done.stdout + done.stderr
        assert status(tmp_path, name)["state"] == "finished"
        assert (tmp_path / "runs" / name / "checkpoints" / "step_00000010" / "checkpoint.json").is_file()
    expected = losses(tmp_path, "python")
    assert sorted(expected) == list(range(1, 11))
    for name in ("torchrun", "deepspeed"):
        found = losses(tmp_path, name)
        assert all(abs(found[step] - loss) <= 1e-4 * loss for step, loss in expected.items()), (found, expected)


@pytest.mark.slow
def test_a_run_goes_on_under_another_launcher(tmp_path: Path, text: Path) -> None:
    common = [*SHAPE, "--input_file", str(text), "--schedule", "constant"]
    undisturbed = launch("python", tmp_path, *common, "--model_name", "whole", "--max_iters", "15")
    assert undisturbed.returncode == 0, undisturbed.stderr
    legs = [("deepspeed", "deepspeed", "5"), ("torchrun", "fsdp", "10"), ("python", "plain", "15")]
    for launcher, backend, until in legs:
        done = launch(launcher, tmp_path, *common, "--model_name", "relay", "--backend", backend, "--max_iters", until)
        assert done.returncode == 0, done.stdout + done.stderr
    expected, found = losses(tmp_path, "whole"), losses(tmp_path, "relay")
    assert found.keys() == expected.keys()
    assert all(abs(found[step] - loss) <= 1e-4 * loss for step, loss in expected.items()), (found, expected)


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
@pytest.mark.slow
def test_bad_input_ends_every_rank_with_one_line(tmp_path: Path, launcher: str) -> None:
    done = launch(launcher, tmp_path, *SHAPE, "--input_file", "missing.txt", "--backend", "fsdp")
    assert done.returncode != 0
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "scalegpt train: error:" in line]
    assert len(lines) == 1, done.stdout + done.stderr
    assert "missing.txt" in lines[0]
    assert not (tmp_path / "runs").exists()


def test_more_ranks_than_devices_are_refused(tmp_path: Path, text: Path) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = {
        **os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(cores + 1), "LOCAL_WORLD_SIZE": str(cores + 1)
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "train.py"), *SHAPE, "--input_file", str(text), "--backend", "fsdp"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert f"{cores + 1} ranks on this machine, but only {cores} CPU cores" in done.stderr
