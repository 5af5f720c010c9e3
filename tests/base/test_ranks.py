"""Which rank we are: read from a launcher's variables, and refused in one line where they contradict themselves."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scalegpt.errors import InputError
from scalegpt.system.ranks import Ranks, ranks_or_alone, read_ranks

ROOT = Path(__file__).resolve().parents[2]
BAD = {
    "WORLD_SIZE=2": "WORLD_SIZE is 2, but RANK is not set; unset WORLD_SIZE to train in one process",
    "WORLD_SIZE=2 RANK=0": "WORLD_SIZE is 2, but LOCAL_RANK is not set",
    "WORLD_SIZE=0": "WORLD_SIZE is 0",
    "WORLD_SIZE=-2 RANK=0 LOCAL_RANK=0": "WORLD_SIZE is '-2', not a number",
    "WORLD_SIZE=two": "WORLD_SIZE is 'two', not a number",
    "WORLD_SIZE=": "WORLD_SIZE is '', not a number",
    f"WORLD_SIZE={'9' * 5000}": "not a number",
    "WORLD_SIZE=²": "not a number",
    "RANK=1": "RANK is 1, but WORLD_SIZE is not set",
    "RANK=x": "RANK is 'x', not a number",
    "LOCAL_RANK=3": "LOCAL_RANK is 3, but WORLD_SIZE is not set",
    "WORLD_SIZE=2 RANK=2 LOCAL_RANK=0": "RANK is 2, but WORLD_SIZE is 2",
    "WORLD_SIZE=4 RANK=2 LOCAL_RANK=2 LOCAL_WORLD_SIZE=2": "LOCAL_RANK is 2, but LOCAL_WORLD_SIZE is 2",
    "WORLD_SIZE=2 RANK=0 LOCAL_RANK=0 LOCAL_SIZE=8": "LOCAL_SIZE is 8, but WORLD_SIZE is 2",
    "WORLD_SIZE=2 RANK=0 LOCAL_RANK=0 LOCAL_WORLD_SIZE=0": "LOCAL_WORLD_SIZE is 0, but WORLD_SIZE is 2",
}


def environment(text: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in text.split(" "))


@pytest.mark.parametrize("text", BAD)
def test_half_set_variables_are_named(text: str) -> None:
    with pytest.raises(InputError, match=r"; unset .* to train in one process, or start the ranks with") as raised:
        read_ranks(environment(text))
    assert BAD[text] in str(raised.value)
    assert len(str(raised.value)) < 200
    assert ranks_or_alone(environment(text)) == Ranks()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("HOME=/", Ranks(0, 1, 0, 1, True)),
        ("WORLD_SIZE=1", Ranks(0, 1, 0, 1, True)),
        ("RANK=0 LOCAL_RANK=0", Ranks(0, 1, 0, 1, True)),
        ("WORLD_SIZE=8 RANK=5 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_ADDR=10.0.0.1", Ranks(5, 8, 1, 2, False)),
        ("WORLD_SIZE=2 RANK=1 LOCAL_RANK=1 LOCAL_SIZE=2 MASTER_ADDR=10.0.0.1", Ranks(1, 2, 1, 2, True)),
        ("WORLD_SIZE=2 RANK=1 LOCAL_RANK=1 MASTER_ADDR=localhost", Ranks(1, 2, 1, 2, True)),
        ("WORLD_SIZE=2 RANK=1 LOCAL_RANK=0 MASTER_ADDR=10.0.0.1", Ranks(1, 2, 0, 2, False)),
    ],
)
def test_a_launchers_variables_are_read(text: str, expected: Ranks) -> None:
    assert read_ranks(environment(text)) == expected
    assert ranks_or_alone(environment(text)) == expected


@pytest.mark.parametrize("text", ["WORLD_SIZE=2", "WORLD_SIZE=two", "RANK=1", "LOCAL_RANK=abc", "RANK=\x1b[31m"])
def test_the_trainer_ends_with_one_line(tmp_path: Path, text: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "train.py"), "--preset", "tiny", "--input_file", "x.txt"],
        cwd=tmp_path, env={**os.environ, **environment(text)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert done.stderr.startswith("scalegpt train: error: ")
    assert BAD.get(text, "not a number") in done.stderr
    assert "\x1b" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_leftover_world_size_does_not_disturb_other_commands() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "scalegpt", "params", "--preset", "tiny"],
        cwd=ROOT, env={**os.environ, "WORLD_SIZE": "abc"}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
