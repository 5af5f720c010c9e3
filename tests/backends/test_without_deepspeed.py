"""DeepSpeed is an extra of the package: without it everything else runs, and asking for it is one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scalegpt.config.backends import BACKENDS
from scalegpt.config.presets import resolve
from scalegpt.errors import InputError
from scalegpt.hardware.gpus import find_card
from scalegpt.hardware.machine import Machine
from scalegpt.planner.checks import check_installed, installed_backends
from scalegpt.planner.search.layouts import layouts
from scalegpt.planner.search.question import Question

ROOT = Path(__file__).resolve().parents[2]
TRAIN = "train --preset tiny --tokenizer byte --vocab_size 257 --n_layer 1 --n_embd 8 --n_head 1 --block_size 16 "
TRAIN += "--micro_batch 2 --tokens_per_step 32 --max_iters 1 --compile off --device cpu --precision fp32 --input_file "

IMPORT_ALL = """
import importlib, pkgutil, scalegpt as package
for each in pkgutil.walk_packages(package.__path__, "scalegpt."):
    if each.name not in {"scalegpt.__main__", "scalegpt.train"}:  # programs, not to be imported
        importlib.import_module(each.name)
"""


def python(program: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run a program in which ``import deepspeed`` fails."""
    hidden = f"import sys; sys.modules['deepspeed'] = None; sys.path.insert(0, {str(ROOT)!r})\n{program}"
    return subprocess.run([sys.executable, "-c", hidden], cwd=folder, capture_output=True, text=True, timeout=300)


def command(words: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    return python(f"from scalegpt.cli.main import main; sys.exit(main({words.split()!r}))", folder)


def test_every_module_can_be_imported(tmp_path: Path) -> None:
    done = python(IMPORT_ALL, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_asking_for_it_says_so_in_one_line_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some text\n" * 200)
    done = command(f"{TRAIN}text.txt --backend deepspeed --zero_stage 2", tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "backend deepspeed: its package is not installed here" in line
    assert "pip install 'scalegpt[deepspeed]'" in line
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize("backend", ["plain", "fsdp"])
def test_the_other_backends_train(backend: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some text\n" * 200)
    done = command(f"{TRAIN}text.txt --backend {backend}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "runs" / "tiny" / "run_status.json").read_text())["state"] == "finished"


def test_a_plan_for_it_is_made_and_names_the_package(tmp_path: Path) -> None:
    done = command("plan --preset 500M_1024 --gpu a100-40gb --gpus 8 --backend deepspeed --json", tmp_path)
    assert done.returncode == 0, done.stderr
    notes = json.loads(done.stdout)["notes"]
    assert [note for note in notes if "DeepSpeed is not installed here; run pip install 'scalegpt[deepspeed]'" in note]


def test_it_is_known_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    assert installed_backends() == tuple(BACKENDS)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    assert installed_backends() == ("plain", "fsdp")
    with pytest.raises(InputError, match="not installed here"):
        check_installed("deepspeed")


def test_the_trainers_search_leaves_it_out() -> None:
    machine = Machine.with_card(find_card("a100-40gb"), gpus=8)
    question = Question(resolve(preset="500M_1024"), machine, backends=("plain", "fsdp"))
    assert {layout.backend for layout in layouts(question)} == {"fsdp"}
