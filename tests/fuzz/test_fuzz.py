"""A thousand hostile command lines and files; ``python tests/fuzz/run.py --cases 20000`` runs more."""

import subprocess
import sys
from pathlib import Path

import pytest

from fuzz.cases import Case
from fuzz.worker import faults

CASES, SEED = 1000, 1
ERROR = "scalegpt plan: error: gpu 'x' is not known; give one of `scalegpt gpus`\n"
NO_MEMORY = "this machine does not have enough memory for this command"
TRACEBACK = "Traceback (most recent call last):\n"
NOTE = "scalegpt plan: warning: calibration was not read\n"


@pytest.mark.parametrize(
    ("words", "status", "out", "err"),
    [
        ("plan", 2, "", ""), ("plan", 2, "", ERROR + ERROR), ("plan", 2, "", ERROR + NOTE),
        ("plan", 2, "", "plan: error: x\n"),
        ("plan", 2, "", f"a stray line\n{ERROR}"), ("plan", 0, "", ERROR), ("plan", 3, "", ERROR), ("plan", 1, "", ERROR),
        ("train", 1, "", ""), ("train", 1, "", ERROR + ERROR), ("train", 1, "", TRACEBACK + ERROR),
        ("checkpoint list", 2, "damage", ""), ("checkpoint verify x", 1, "", ""), ("data inspect", 2, "scalegpt data", ""),
        ("checkpoint verify x", 1, "", f"scalegpt checkpoint: error: {NO_MEMORY}\n"),
        ("train", 1, "", "scalegpt train: error: KeyError: 1 (a bug in ScaleGPT; --debug shows the traceback)\n"),
        ("plan", 2, "", ERROR.replace("x", "x" * 1000)), ("plan", 2, "", ERROR.replace("x", "\x1b")), ("plan", 0, "\x9b", ""),
    ],
)  # fmt: skip
def test_the_oracle_sees_a_fault(words: str, status: int, out: str, err: str) -> None:
    assert faults(Case(words.split(), may_fail=words != "plan"), status, out, err)


@pytest.mark.parametrize(
    ("words", "status", "out", "err"),
    [
        ("plan", 0, "a plan", NOTE), ("plan", 3, "a plan", ""), ("plan", 2, "", ERROR), ("plan", 2, "", NOTE + ERROR),
        ("train", 1, "", "a line of a library\n" + ERROR), ("data", 2, "scalegpt data: text to tokens", ""),
        ("", 2, "scalegpt", ""),
        ("checkpoint verify x", 1, "damaged", ""), ("plan --debug", 2, "", ERROR + TRACEBACK),
        ("train", 1, "", f"scalegpt train: error: {NO_MEMORY}\n"),
    ],
)  # fmt: skip
def test_the_oracle_sees_none_where_there_is_none(words: str, status: int, out: str, err: str) -> None:
    assert faults(Case(words.split(), may_fail=words.split()[:1] != ["plan"]), status, out, err) == []


@pytest.mark.slow
def test_hostile_input_is_refused_in_a_line(tmp_path: Path) -> None:
    """Exit status 0, 2 or 3, one line, nothing written, bounded time and memory: see ``run.py``."""
    words = [sys.executable, str(Path(__file__).with_name("run.py")), "--cases", str(CASES), "--seed", str(SEED)]
    done = subprocess.run([*words, "--scratch", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert f"{CASES} cases, 0 with faults" in done.stdout
