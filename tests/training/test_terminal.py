"""What a run shows: numbers for people, plain lines where there is no terminal, silence on other ranks."""

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scalegpt.training.output.logger import Logger
from scalegpt.training.output.step_line import StepLine
from scalegpt.training.output.terminal import hanging
from scalegpt.units import human_count, human_time

ROOT = Path(__file__).resolve().parents[2]

LINE = StepLine(20, 3.14159, 6e-4, 1.25, 12_345.0, None, 75.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"), (12.4, "12 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (3900, "1 h 05 min"),
        (2 * 86400 + 3 * 3600 + 59, "2 d 3 h"), (1e8, "3.2 years"), (math.nan, "?"),
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


DRIVER = """
import os, sys, time
from scalegpt.training.output.logger import Logger
from scalegpt.training.output.step_line import StepLine
logger = Logger(speaks=True, total=10_000, every=100, plain="plain" in sys.argv)
logger.start(1200, planned_bytes=40 * 2**30)
logger.step(StepLine(1234, 3.14159, 6e-4, 1.25, 12345.0, 0.423, 3930, 0, 3.2, 31 * 2**30, 12630))
time.sleep(0.35)  # it is drawn four times a second
logger.say("warning: a message " + "long " * 30)
print("a library prints")
print("to standard error", file=sys.stderr)
if "stop" in sys.argv:
    logger.stop()
    logger.say("done")
if "fail" in sys.argv:
    logger.stop()
    raise ValueError("no")
sys.stdout.flush()
if "rank" in sys.argv:
    os._exit(0)
"""

WHOLE = (
    "step 1234/10000  ━━━─────────────────────  loss 3.1416  held-out 3.2000  12.3k tok/s  MFU 42.3%  31.0/40.0 GiB  "
    "save in 3 h 30 min  1 h 05 min left"
)


def drive(*words: str, columns: int = 100, **environment: str) -> Any:
    terminal = pytest.importorskip("terminal")
    return terminal.run_on_terminal(["-c", DRIVER, *words], columns=columns, **environment)


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        (20, "step 1234/10000"),
        (40, "step 1234/10000  loss 3.1416"),
        (80, "step 1234/10000  ━━────────────────  loss 3.1416  12.3k tok/s  1 h 05 min left"),
        (160, WHOLE),
    ],
)
def test_the_live_line_stays_one_line_below_what_is_printed(columns: int, line: str) -> None:
    screen = drive("rank", columns=columns)
    assert screen.lines[-1] == line
    assert sum("1234" in each for each in screen.lines) == 1
    printed = "".join(screen.lines)
    for text in ("warning: a message long", "a library prints", "to standard error"):
        assert printed.index(text) < printed.index("step 1234")
    assert screen.shows_cursor
    assert b"?25l" not in screen.raw  # never hidden: a process that is killed could not show it again


@pytest.mark.parametrize(("word", "last"), [("stop", "done"), ("fail", "ValueError: no")])
def test_an_end_leaves_no_live_line(word: str, last: str) -> None:
    screen = drive(word)
    assert screen.lines[-1] == last
    assert not any("1234" in each for each in screen.lines)
    assert (screen.shows_cursor, screen.column) == (True, 0)


def test_a_terminal_that_wants_plain_lines_gets_them() -> None:
    for screen in (drive("plain", "stop"), drive("stop", TERM="dumb")):
        assert b"\x1b" not in screen.raw
        assert screen.lines[0].startswith("warning: a message")  # step 1234 is neither the first nor a hundredth
        assert screen.lines[-1] == "done"


def test_no_color_means_no_color() -> None:
    assert re.search(rb"\x1b\[[0-9;]*3[0-9]m", drive("stop").raw)
    assert not re.search(rb"\x1b\[[0-9;]*3[0-9]m", drive("stop", NO_COLOR="1").raw)


def test_a_stale_width_in_the_environment_is_not_believed() -> None:
    assert drive("rank", columns=40, COLUMNS="200").lines[-1] == "step 1234/10000  loss 3.1416"


def test_lines_with_labels_are_broken_at_words() -> None:
    line = "machine  8 × H100, fsdp stage 3, bf16, recompute none"
    assert hanging(line, 30) == "machine  8 × H100, fsdp stage\n         3, bf16, recompute\n         none"
    assert hanging(line, 100) == line
    assert hanging("         " + "word " * 20, 40).count("\n         word") == 3
    for other in (
        "stopped at step 601 of 1000000: SIGINT; the same",
        "step 10/12  loss 3.0  100 tok/s  norm 1.00",
        "x" * 50,
    ):
        assert hanging(other, 30) == other


def test_plain_output_needs_no_rich() -> None:
    code = "import sys\n" + DRIVER + "\nsys.exit('rich' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "to standard error\n")


def test_a_run_on_a_terminal_is_interrupted(tmp_path: Path) -> None:
    terminal = pytest.importorskip("terminal")
    (tmp_path / "text.txt").write_text("To be, or not to be: that is the question.\n" * 400)
    flags = (
        "train --tokenizer byte --n_layer 1 --n_embd 16 --n_head 1 --block_size 16 --micro_batch 2 --max_iters 1000000 "
        "--backend plain --precision fp32 --compile off --sample_tokens 0 --input_file text.txt --model_name run"
    )
    screen = terminal.run_on_terminal(
        ["-m", "scalegpt", *flags.split()], columns=90, cwd=tmp_path, typed={b"tok/s": b"\x03"}, OMP_NUM_THREADS="1"
    )
    assert screen.status == 130
    assert (screen.shows_cursor, screen.column) == (True, 0)
    text = "\n".join(screen.lines)
    assert text.count("scalegpt train: SIGINT: ") == 1
    assert "stopped at step" in text
    assert "loss " not in text.split("checkpoint runs")[0].split("memory ")[-1]  # no piece of the live line is left


def test_a_reader_that_goes_ends_nothing() -> None:
    code = (
        "import sys\n"
        "from scalegpt.training.output.logger import Logger\n"
        "logger = Logger(speaks=True, total=1, every=1)\n"
        "logger.say('first'); sys.stdin.readline()\n"
        "logger.say('second'); logger.say('third'); sys.exit(7)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "first\n"
    process.stdout.close()
    process.stdin.write("on\n")
    process.stdin.close()
    assert process.wait(60) == 7
