"""``make install`` sets up, and neither trains nor tests."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def steps(target: str, folder: Path) -> str:
    """What make would run for a target, from nothing."""
    shutil.copy(ROOT / "Makefile", folder / "Makefile")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
    done = subprocess.run(
        ["make", "-n", "--no-print-directory", target], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_install_sets_up_and_does_nothing_else(tmp_path: Path) -> None:
    said = steps("install", tmp_path)
    assert '.venv/bin/pip install -q -e ".[deepspeed,hf]"' in said
    assert not any(word in said for word in ("demo.py", "pytest", "mypy", "dev]"))
    assert "demo.py" in steps("demo", tmp_path)
    assert '".[deepspeed,hf,dev,datatrove]"' in steps("tests", tmp_path)


def test_the_lowest_releases_are_those_of_the_extras_too() -> None:
    done = subprocess.run([sys.executable, ".ci/lowest.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    names = {line.partition("==")[0] for line in done.stdout.splitlines()}
    assert {"deepspeed", "ninja", "numpy", "pytest"} <= names


def test_the_readme_names_it() -> None:
    assert "make install" in (ROOT / "README.md").read_text(encoding="utf-8")
