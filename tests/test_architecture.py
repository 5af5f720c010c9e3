"""The rules of the house that import-linter has no word for; `lint-imports` checks the layers."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted((ROOT / "scalegpt").rglob("*.py"))
MOST_LINES = 400


def imported(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it, by its full name."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_there_is_something_to_check() -> None:
    assert len(MODULES) > 30
    assert "torch.distributed" in imported(ROOT / "scalegpt" / "backends" / "world.py")


@pytest.mark.parametrize("path", sorted((ROOT / "scalegpt" / "model").rglob("*.py")), ids=lambda path: path.stem)
def test_the_model_knows_nothing_of_ranks(path: Path) -> None:
    assert not {name for name in imported(path) if name.startswith(("torch.distributed", "deepspeed"))}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_can_be_read_at_a_sitting(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES, f"{path} has {lines} lines: split it where it falls apart by itself"


COMMANDS = (
    "--help", "params --preset tiny", "presets", "gpus", "gpus 4090", "train --help", "sample --help", "plan --help",
    "checkpoint --help", "checkpoint verify --help",
    "plan --preset tiny --gpu 4090", "plan --preset tiny --gpu cpu", "plan --preset tiny",
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_that_need_no_torch_do_not_load_it(command: str) -> None:
    program = (
        "import sys; from scalegpt.cli.main import main\n"
        f"try: main({command.split()!r})\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'numpy', 'deepspeed', 'rich'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stderr.strip() == "[]"
