"""Damaged files of text and records; ``SCALEGPT_FUZZ_RECORDS=10000`` runs more of them."""

import os
import subprocess
import sys
from pathlib import Path

CASES = int(os.environ.get("SCALEGPT_FUZZ_RECORDS", "300"))


def test_damaged_files_are_read_right_or_refused_in_a_line() -> None:
    words = [sys.executable, str(Path(__file__).with_name("records.py")), "--cases", str(CASES)]
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert f"{CASES} cases, 0 with faults" in done.stdout
