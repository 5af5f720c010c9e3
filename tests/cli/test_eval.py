"""``scalegpt eval``: what it prints, and its error lines."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import scalegpt
from scalegpt.cli.main import main

TEXT = "A short text, città and all: it is read in windows of sixteen tokens.\n"


@pytest.fixture(autouse=True)
def _text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT, encoding="utf-8")


def test_json_has_what_the_interface_returns(tiny_run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_run(steps=(10, 20))
    words = ["--input_file", "text.txt", "--stride", "4", "--micro-batch", "2", "--device", "cpu", "--checkpoint", "10"]
    assert main(["eval", str(run), *words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    result = scalegpt.load(run, device="cpu", checkpoint=10).evaluate("text.txt", stride=4, micro_batch=2)
    for key in ("loss", "perplexity", "bits_per_byte", "tokens", "bytes", "documents", "split"):
        assert document[key] == getattr(result, key), key
    assert (document["run"], document["step"], document["input_file"]) == (str(run), 10, "text.txt")
    assert (document["block_size"], document["stride"]) == (16, 4)
    assert document["tokens_per_second"] == pytest.approx(document["tokens"] / document["seconds"])


def test_the_table_has_every_figure(tiny_run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_run()
    assert main(["eval", str(run), "--input_file", "text.txt", "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    result = scalegpt.load(run, device="cpu").evaluate("text.txt")
    rows = dict(line.split(maxsplit=1) for line in captured.out.replace("bits per byte", "bits").splitlines())
    assert rows["loss"] == f"{result.loss:.4f} nats per token"
    assert rows["perplexity"] == f"{result.perplexity:,.3f} per token"
    assert rows["bits"] == f"{result.bits_per_byte:.4f}"
    assert rows["tokens"].startswith("71 scored, ")
    assert rows["bytes"] == "71 of UTF-8"
    assert rows["documents"] == "1"
    assert rows["text"] == "text.txt"
    assert captured.err == ""


def test_a_terminal_sees_the_progress_and_then_a_clear_line(
    tiny_run: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["eval", str(tiny_run()), "--input_file", "text.txt", "--device", "cpu"]) == 0
    shown = capsys.readouterr().err
    assert "scoring 100%  71 tokens" in shown
    assert shown.endswith("\r\x1b[K")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--split", "test"], "invalid choice: 'test'"),
        (["--input_file", "text.txt", "--split", "val"], "has no split val"),
        (["--input_file", "none.txt"], "none.txt"),
        (["--strid", "3"], "did you mean --stride?"),
        (["--stride", "99", "--input_file", "text.txt"], "stride 99 is not from 1 to the model's block_size 16"),
        (["--precision", "int8"], "int8"),
        (["--checkpoint", "30"], "has no checkpoint step_00000030"),
        ([], "give --input_file"),
    ],
)
def test_error_lines(tiny_run: Any, capsys: pytest.CaptureFixture[str], words: list[str], expected: str) -> None:
    assert main(["eval", str(tiny_run()), "--device", "cpu", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert expected in captured.err
