"""The dialogue of ``scalegpt sample``: on a real terminal, and fed by a pipe."""

import fcntl
import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scalegpt.cli.main import main
from scalegpt.data.tokenizers import make_tokenizer

LETTERS = "\n abcdefghijklmnopqrstuvwxyz"
WORDS = ["--device", "cpu", "--max_new_tokens", "12"]


def fed(run: Path, lines: str, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    return main(["sample", str(run), "--interactive", *WORDS, *words])


def continuation(run: Path, prompt: str, seed: int, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["sample", str(run), "--prompt", prompt, "--seed", str(seed), "--json", *WORDS]) == 0
    return str(json.loads(capsys.readouterr().out)["continuation"])


def test_each_line_is_continued_with_the_next_seeds_until_an_empty_line(
    tiny_run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny_run(tokenizer=make_tokenizer("char", LETTERS.replace("\n", "")))
    assert fed(run, "abc\n\nunread\n", monkeypatch, "--seed", "5") == 0
    captured = capsys.readouterr()
    assert "an empty line or Ctrl-D ends" in captured.err
    assert captured.out == f"> {continuation(run, 'abc', 5, capsys)}\n> "
    assert fed(run, "abc\nx!\nabc\n", monkeypatch, "--seed", "5", "--num_samples", "2") == 0
    captured = capsys.readouterr()
    first, second, third, fourth = (continuation(run, "abc", seed, capsys) for seed in (5, 6, 9, 10))
    line = "-" * 40
    assert captured.out == f"> {first}\n{line}\n{second}\n> > {third}\n{line}\n{fourth}\n> \n"
    assert "scalegpt sample: character '!' (U+0021)" in captured.err


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, words: list[str]) -> None:
        self.ours, theirs = pty.openpty()

        def take() -> None:
            fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)  # so that Ctrl-C becomes SIGINT

        environment = {**os.environ, "TERM": "dumb", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "scalegpt", *words], stdin=theirs, stdout=theirs, stderr=theirs, env=environment,
            start_new_session=True, preexec_fn=take,
        )  # fmt: skip
        os.close(theirs)
        self.shown = ""

    def wait_for(self, pattern: str) -> str:
        """Read until the pattern is found in what has not been returned yet; what was shown up to its end."""
        deadline = time.monotonic() + 300
        while not (found := re.search(pattern, self.shown)):
            assert time.monotonic() < deadline, (pattern, self.shown)
            assert self.process.poll() is None or select.select([self.ours], [], [], 0)[0], self.shown
            if select.select([self.ours], [], [], 1)[0]:
                self.shown += os.read(self.ours, 65536).decode()
        text, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return text

    def type(self, keys: str) -> None:
        os.write(self.ours, keys.encode())


@pytest.fixture
def terminal(tiny_run: Any) -> Iterator[Terminal]:
    """``scalegpt sample RUN`` without a prompt, on a terminal; a continuation goes on until it is stopped."""
    run = tiny_run(tokenizer=make_tokenizer("char", LETTERS))
    made = Terminal(["sample", str(run), "--device", "cpu", "--max_new_tokens", str(10**9)])
    yield made
    made.process.kill()
    made.process.wait()
    os.close(made.ours)


@pytest.mark.slow
def test_on_a_terminal_it_asks_ctrl_c_stops_a_continuation_and_ctrl_d_ends(terminal: Terminal) -> None:
    assert "Ctrl-C stops a continuation" in terminal.wait_for("> ")
    terminal.type("abc\r")
    terminal.wait_for(r"abc\r\n[a-z \r\n]{200}")
    terminal.type("\x03")
    terminal.wait_for(r"\n> ")
    terminal.type("\x10\r")  # Ctrl-P: the line before
    terminal.wait_for(r"abc\r\n[a-z \r\n]{200}")
    terminal.type("\x03")
    terminal.wait_for(r"\n> ")
    terminal.type("dropped")
    terminal.wait_for("dropped")
    time.sleep(0.5)  # a signal between the echo and readline's wait for a key would be seen only at the next key
    terminal.type("\x03")
    terminal.wait_for(r"\n> ")
    terminal.type("\x04")
    assert terminal.process.wait(300) == 0
