"""A thousand hostile command lines and files; ``python tests/fuzz/run.py --cases 20000`` runs more."""

import subprocess
import sys
from pathlib import Path

import pytest

CASES, SEED = 1000, 1


@pytest.mark.slow
def test_hostile_input_is_refused_in_a_line(tmp_path: Path) -> None:
    """Exit status 0, 2 or 3, one line, nothing written, bounded time and memory: see ``run.py``."""
    words = [sys.executable, str(Path(__file__).with_name("run.py")), "--cases", str(CASES), "--seed", str(SEED)]
    done = subprocess.run([*words, "--scratch", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert f"{CASES} cases, 0 with faults" in done.stdout
