"""What a run shows: numbers for people, plain lines where there is no terminal, silence on other ranks."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

from scalegpt.training.loggers import Logger, StepLine
from scalegpt.units import human_count, human_time

LINE = StepLine(20, 3.14159, 6e-4, 1.25, 12_345.0, None, 75.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"), (12.4, "12 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (3900, "1 h 05 min"),
        (2 * 86400 + 3 * 3600 + 59, "2 d 3 h"), (math.nan, "?"),
    ],
)  # fmt: skip
def test_times(seconds: float, text: str) -> None:
    assert human_time(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (950.4, "950"), (9_999, "9999"), (12_345, "12.3k"), (1_250_000, "1.25M"), (math.nan, "?")],
)
def test_counts(number: float, text: str) -> None:
    assert human_count(number) == text


def test_a_step_in_words() -> None:
    assert LINE.text() == "loss 3.1416  12.3k tok/s  lr 6.00e-04  norm 1.25  1 min 15 s left"
    full = StepLine(20, math.nan, 6e-4, math.inf, 12_345.0, 0.423, math.nan, skipped=2)
    assert full.text() == "loss nan  12.3k tok/s  MFU 42.3%  lr 6.00e-04  norm inf  2 skipped  ? left"


def line(step: int) -> StepLine:
    return StepLine(step, 3.0, 1e-3, 1.0, 100.0, None, 1.0)


def test_without_a_terminal_the_first_every_nth_and_the_last_step_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    logger = Logger(speaks=True, total=25, every=10)
    logger.start(0)
    for step in range(1, 26):
        logger.step(line(step))
    logger.say("a [bold]word[/bold] " + "long " * 100)
    logger.stop()
    logger.stop()
    shown = capsys.readouterr().out.splitlines()
    assert [text.split("  ")[0] for text in shown[:-1]] == ["step 1/25", "step 10/25", "step 20/25", "step 25/25"]
    assert shown[-1].startswith("a [bold]word[/bold] long")  # neither markup nor wrapping
    assert len(shown[-1]) > 500


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    logger = Logger(speaks=False, total=1, every=1)
    logger.start(0)
    logger.step(line(1))
    logger.say("a word")
    logger.stop()
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_live_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes the stream for a terminal
    logger = Logger(speaks=True, total=3, every=100)
    logger.start(1)
    logger.step(line(2))
    logger.say("above")
    logger.stop()
    shown = capsys.readouterr().out
    assert "2/3" in shown
    assert "loss 3.0000" in shown
    assert "above" in shown


def test_a_reader_that_goes_ends_nothing() -> None:
    code = (
        "import sys\n"
        "from scalegpt.training.loggers import Logger\n"
        "logger = Logger(speaks=True, total=1, every=1)\n"
        "logger.say('first'); sys.stdin.readline()\n"
        "logger.say('second'); logger.say('third'); sys.exit(7)\n"
    )
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "first\n"
    process.stdout.close()
    process.stdin.write("on\n")
    process.stdin.close()
    assert process.wait(60) == 7
