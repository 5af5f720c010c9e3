"""Pages of a library's error become one line and a file."""

from pathlib import Path

import pytest
import torch

from scalegpt.backends import World
from scalegpt.errors import RunError
from scalegpt.training.resilience.failure import handle_failure, in_one_line
from scalegpt.training.resilience.heartbeat import Heartbeats
from scalegpt.training.resilience.watchdog import Watchdog
from scalegpt.training.runs.directory import RunDirectory

PAGES = "C++ compile error\n" + "\x1b[31merror: no such header\n" * 200


class CompilerError(RuntimeError):
    """As torch's inductor raises it."""


CompilerError.__module__ = "torch._inductor.exc"


def raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:
        return caught


def test_a_compilers_output_goes_into_a_file(tmp_path: Path) -> None:
    line = in_one_line(raised(CompilerError(PAGES)), tmp_path, 3)
    file = tmp_path / "error_rank_3.txt"
    assert line == (
        f"CompilerError: C++ compile error; the full message is in {file}; --compile off trains without compiling"
    )
    text = file.read_text()
    assert text.count("error: no such header") == 200
    assert "Traceback" in text
    assert "\x1b" not in text
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("text", ["", "short", "two\nlines"])
def test_a_short_error_speaks_for_itself(tmp_path: Path, text: str) -> None:
    assert in_one_line(ValueError(text), tmp_path, 0) is None
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fails_too_keeps_the_line(tmp_path: Path) -> None:
    assert (
        in_one_line(ValueError("x" * 1000), tmp_path / "missing", 0)
        == f"ValueError: {'x' * 300}; --debug shows the full message"
    )


def test_the_run_ends_with_that_line(tmp_path: Path) -> None:
    world = World(0, 1, 0, 1, torch.device("cpu"))
    dog = Watchdog(RunDirectory(tmp_path), Heartbeats(tmp_path, world), first=0, later=0)
    dog.beats.open()
    ending = handle_failure(raised(CompilerError(PAGES)), dog, plan=None, on_oom="stop")  # type: ignore[arg-type]
    assert isinstance(ending.error, RunError)
    assert str(ending.error) == ending.halt.cause
    assert "error_rank_0.txt" in ending.halt.cause
    assert len(ending.halt.cause) < 400
