"""What others wrote, in files and names, is shown by every command and obeyed by no terminal."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from manifests import rewrite
from scalegpt.cli.main import main
from scalegpt.cli.output import json_text
from scalegpt.data.tokenizers import make_tokenizer
from scalegpt.training.output.logger import Logger

EVIL = "\x1b]0;owned\x07\x9b2J\u202e"
"""Sets a terminal's title, clears its screen, and turns the direction of its text."""

CARD = "- {name: 'NAME', aliases: [evil], capability: 8.6, gib: [8, 'NAME'], tflops: 5, gbps: 5, host_gbps: 5, link: pcie}\n"


@pytest.fixture
def out(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command; all that it prints, which must be harmless."""

    def run(*words: Any, status: int = 0) -> str:
        capsys.readouterr()
        assert main([str(word) for word in words]) == status
        seen = capsys.readouterr()
        text = seen.out + seen.err
        assert not set(EVIL) & {c for c in text if not c.isprintable()}, text
        return text

    return run


def test_control_characters_of_a_catalogue_are_written_out(
    out: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "gpus.yaml"
    escaped = EVIL.encode("unicode_escape").decode()
    path.write_text(CARD.replace("'NAME'", f'"{escaped}x"'))
    monkeypatch.setenv("SCALEGPT_GPUS", str(path))
    shown = "\\x1b]0;owned\\x07\\x9b2J\\u202ex"
    assert shown in out("gpus")
    assert shown in out("gpus", "evil")
    assert json.loads(out("gpus", "evil", "--json"))["name"] == f"{EVIL}x"
    assert shown in out("plan", "--gpu", "evil", "--preset", "tiny")
    out("plan", "--gpu", "evil", "--preset", "tiny", "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert shown in page
    assert not set(EVIL) & {c for c in page if not c.isprintable()}


def test_control_characters_of_a_checkpoint_are_written_out(out: Callable[..., str], tiny_run: Any) -> None:
    run = tiny_run(f"run{EVIL}", steps=(10,))
    path = run / "checkpoints/step_00000010"

    def change(document: dict[str, Any]) -> None:
        document["run"] = document["written_by"]["version"] = EVIL
        document["config"]["name"] = EVIL

    rewrite(path, change)
    assert "\\x1b]0;owned" in out("checkpoint", "show", run)
    assert json.loads(out("checkpoint", "show", run, "--json"))["run"] == EVIL
    for command in ("list", "verify", "show"):
        out("checkpoint", command, run)
        out("checkpoint", command, path, "--json")
    (path / "rank_00000.weights.safetensors").unlink()
    assert "\\x1b]0;owned" in out("checkpoint", "verify", run, status=1)
    out("checkpoint", "convert", run, "--out", run / "out", status=2)


def test_control_characters_of_file_names_are_written_out(out: Callable[..., str], tmp_path: Path) -> None:
    folder = tmp_path / f"text{EVIL}\nwith a line"
    folder.mkdir()
    (folder / f"a{EVIL}.txt").write_text("A text to read. " * 50)
    made = out("data", "prepare", folder, "--out", tmp_path / f"out{EVIL}", "--tokenizer", "byte")
    assert "\\x1b]0;owned" in made
    assert re.search(r"^sources .*\\nwith a line.*/a\\x1b]0;owned", made, re.MULTILINE)
    assert len(made.splitlines()) < 12
    out("data", "inspect", tmp_path / f"out{EVIL}")
    json.loads(out("data", "inspect", tmp_path / f"out{EVIL}", "--json"))
    for words in (("checkpoint", "list"), ("sample",), ("data", "inspect"), ("params", "--config_file")):
        assert "absent\\x1b]0;owned" in out(*words, tmp_path / f"absent{EVIL}", status=2)


@pytest.mark.parametrize(
    "words",
    [
        [EVIL], ["plan", f"--{EVIL}"], ["plan", f"--gpu={EVIL}"], ["params", f"--n_layer={EVIL}"], ["presets", EVIL, "tiny"],
        ["data", EVIL], ["plan", EVIL], ["params", f"--preset={EVIL}"], ["train", "--allow_change", EVIL],
        ["params", "--n_layer", EVIL, "--debug"],
    ],
)  # fmt: skip
def test_control_characters_of_the_command_line_are_written_out(out: Callable[..., str], words: list[str]) -> None:
    text = out(*words, status=2)
    assert "\\x1b" in text
    errors = [line for line in text.splitlines() if ": error: " in line]
    assert errors == text.splitlines()[:1]
    assert (text.count("\n") > 1) == ("--debug" in words)


def test_an_error_is_never_long(out: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"model": {"n_layer": ["x"] * 10_000}, "k" * 100_000: 1}))
    for words in (
        ["x" * 100_000],
        ["plan", "--" + "x" * 100_000],
        ["gpus", "x" * 100_000],
        ["params", "--config_file", path],
    ):
        text = out(*words, status=2)
        assert text.startswith("scalegpt")
        assert (text.count(": error: "), text.count("\n")) == (1, 1)
        assert len(text) < 1000


def test_a_sample_is_raw_in_a_pipe_and_visible_on_a_terminal(
    tiny_run: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(tokenizer=make_tokenizer("byte"))
    words = ["sample", str(run), "--device", "cpu", "--max_new_tokens", "2", "--prompt", "a\x1b[2Jb"]
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("a\x1b[2Jb")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("a\\x1b[2Jb")


def test_a_run_s_log_shows_samples(capsys: pytest.CaptureFixture[str]) -> None:
    Logger(speaks=True, total=1, every=1).say(f"sample:\n{EVIL}")
    assert capsys.readouterr().out == "sample:\n\\x1b]0;owned\\x07\\x9b2J\\u202e\n"


def test_json_keeps_letters_and_escapes_control_characters() -> None:
    values = {"é\u202e": ["\x9b", "\u2028", "\U000e0041", "\ud800", "\n\t", "😀"]}
    text = json_text(values)
    assert json.loads(text) == values
    assert "é" in text
    assert "😀" in text
    assert not set("\u202e\x9b\u2028\U000e0041\ud800") & set(text)


def test_a_system_error_is_one_line(out: Callable[..., str], tmp_path: Path) -> None:
    target = tmp_path / "loop"
    target.symlink_to("loop")
    for words in (["checkpoint", "list"], ["data", "inspect"], ["params", "--config_file"], ["sample"]):
        text = out(*words, target, status=2)
        assert text.count("\n") == 1
        assert "a bug in ScaleGPT" not in text
