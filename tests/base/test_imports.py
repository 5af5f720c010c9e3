"""Each module that needs torch can be the first of ours that a program imports."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import importlib, os, sys
import torch
failed = []
for name in sys.argv[1:]:
    child = os.fork()  # a fresh interpreter each would import torch each time
    if child == 0:
        importlib.import_module(name)
        sys.stdout.flush()
        os._exit(0)
    if os.waitpid(child, 0)[1] != 0:
        failed.append(name)
sys.exit(" ".join(failed) or 0)
"""


@pytest.mark.slow
def test_each_module_can_be_imported_first() -> None:
    files = [
        path.relative_to(ROOT).with_suffix("")
        for package in ("backends", "checkpoint", "inference", "model", "optim", "training")
        for path in sorted((ROOT / "scalegpt" / package).rglob("*.py"))
    ]
    names = [".".join(path.parts).removesuffix(".__init__") for path in files]
    assert "scalegpt.model.recompute" in names
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *names], cwd=ROOT, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr
