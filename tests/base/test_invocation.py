"""The commands that help texts and plans print are those that run in this installation."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from scalegpt.cli.main import main
from scalegpt.cli.train import make_parser
from scalegpt.system import invocation
from scalegpt.system.invocation import program, train_command

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = {"python": [], "torchrun": ["--nproc_per_node", "2"], "deepspeed": ["--num_gpus", "2"]}


@pytest.fixture
def installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment with three programs, which is not on PATH; the current folder is the one above it."""
    folder = tmp_path / ".venv" / "bin"
    folder.mkdir(parents=True)
    for name in LAUNCHERS:
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "elsewhere"))
    monkeypatch.chdir(tmp_path)
    return folder


def test_a_program_is_named_by_its_path_unless_a_shell_finds_the_same(
    installation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in LAUNCHERS:
        assert program(name) == [f".venv/bin/{name}"]
    monkeypatch.setenv("PATH", str(installation))
    for name in LAUNCHERS:
        assert program(name) == [name]
    other = installation.parent / "other"
    other.mkdir()
    (other / "python").write_text("#!/bin/sh\n")
    (other / "python").chmod(0o755)
    monkeypatch.setenv("PATH", f"{other}{os.pathsep}{installation}")
    assert program("python") == [".venv/bin/python"]
    monkeypatch.chdir(other)
    assert program("python") == [str(installation / "python")]
    monkeypatch.chdir(installation)
    assert program("python") == ["./python"]


def test_a_launcher_without_a_script_is_its_module(installation: Path) -> None:
    (installation / "torchrun").unlink()
    assert program("torchrun") == [".venv/bin/python", "-m", "torch.distributed.run"]


@pytest.mark.parametrize(
    ("launcher", "checkout", "wheel"),
    [
        ("python", "launch/train.py", "-m scalegpt.train"),
        ("torchrun", "--nproc_per_node 2 launch/train.py", "--nproc_per_node 2 -m scalegpt.train"),
        ("deepspeed", "--num_gpus 2 launch/train.py", "--num_gpus 2 --module scalegpt.train"),
    ],
)
def test_a_wheel_names_the_module(
    installation: Path, monkeypatch: pytest.MonkeyPatch, launcher: str, checkout: str, wheel: str
) -> None:
    monkeypatch.setattr(invocation, "script", lambda: installation.parents[1] / "launch" / "train.py")
    assert train_command(launcher, *LAUNCHERS[launcher]) == f".venv/bin/{launcher} {checkout}"
    monkeypatch.setattr(invocation, "script", lambda: None)
    assert train_command(launcher, *LAUNCHERS[launcher]) == f".venv/bin/{launcher} {wheel}"


def test_the_script_is_that_of_this_checkout() -> None:
    assert invocation.script() == ROOT / "launch" / "train.py"


def test_the_help_names_commands_of_this_installation() -> None:
    assert f"  {train_command('deepspeed')} --preset" in make_parser().format_help()


def test_the_printed_command_and_the_module_start_training(tmp_path: Path) -> None:
    """From another folder, without a PATH of use: as far as the first thing that is wrong with the flags."""
    environment = {"PATH": "/nowhere", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    for command in (shlex.split(train_command()), [sys.executable, "-m", "scalegpt.train"]):
        done = subprocess.run(
            [*command, "--n_layer", "0"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("scalegpt train: error: "), done.stderr


def test_deepspeeds_flag_before_the_command_is_passed_over(capsys: pytest.CaptureFixture[str]) -> None:
    """``deepspeed --module scalegpt train …`` puts it there."""
    for flag in ("--local_rank=0", "--local-rank=1"):
        assert main([flag, "--version"]) == 0
        assert capsys.readouterr().out.startswith("scalegpt ")
