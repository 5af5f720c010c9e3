"""Every script in examples/ runs as a user starts it, and prints what it promises."""

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from scalegpt.architecture.counting import count_parameters
from scalegpt.config.presets import resolve

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LONGEST = 40

Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], one_thread: None) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCALEGPT_CACHE", str(tmp_path / "cache"))

    def start(name: str, *words: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *words])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return start


def test_all_are_short_and_listed() -> None:
    listed = re.findall(r"^\| `(\w+\.py)", (EXAMPLES / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in EXAMPLES.glob("*.py"))
    assert all(len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST for path in EXAMPLES.glob("*.py"))


def test_cards_are_compared(run: Run) -> None:
    head, *rows, _, command = run("compare_cards.py").splitlines()
    assert head.split()[0] == "card"
    assert [row.split()[:2] for row in rows] == [
        [card, "yes"] for card in ("rtx4090", "a100-40gb", "a100-80gb", "h100-sxm")
    ]
    assert "--preset 500M_1024" in command


def test_a_longer_block_costs_places(run: Run) -> None:
    _, *rows = run("long_context.py").splitlines()
    expected = {
        str(block): f"{count_parameters(resolve(preset='350M_1024', flags={'block_size': block}).model).total:,}"
        for block in (256, 1024, 4096, 16384)
    }
    assert dict(row.split()[:2] for row in rows) == expected


def test_a_model_is_trained_resumed_and_used(run: Run) -> None:
    Path("text.txt").write_text("the same line again and again\n" * 400, encoding="utf-8")
    last = run("train.py", "text.txt").splitlines()[-1]
    steps, first, final = re.fullmatch(r"runs/example: (\d+) steps, loss ([\d.]+) to ([\d.]+)", last).groups()  # type: ignore[union-attr]
    assert int(steps) == 20
    assert float(final) < float(first)
    assert run("resume.py", "runs/example", "30").splitlines()[-1] == "runs/example: finished, from step 20 to step 30"
    wrote = run("generate.py", "runs/example", "the same")
    assert wrote.startswith("step 30, 2 layers")
    assert wrote.count("--- temperature") == wrote.count("\nthe same") == 3
