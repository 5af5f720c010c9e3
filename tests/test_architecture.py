"""The rules of the architecture that import-linter cannot express; ``lint-imports`` checks the layers."""

import ast
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted((ROOT / "scalegpt").rglob("*.py"))
SOURCES = sorted(
    path for top in ("scalegpt", "launch", "benchmarks", "examples") for path in (ROOT / top).rglob("*.py")
)
MOST_LINES, MOST_LINES_OF_A_FUNCTION, MOST_FILES = 350, 60, 14


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imported(path: Path) -> frozenset[str]:
    """Every module or name that a file imports, anywhere in it, by its full name."""
    names: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(names)


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_there_is_something_to_check() -> None:
    assert len(MODULES) > 30
    assert "torch.distributed" in imported(ROOT / "scalegpt" / "backends" / "world.py")


@pytest.mark.parametrize("path", sorted((ROOT / "scalegpt" / "model").rglob("*.py")), ids=lambda path: path.stem)
def test_the_model_knows_nothing_of_ranks(path: Path) -> None:
    assert not {name for name in imported(path) if name.startswith(("torch.distributed", "deepspeed"))}


# --- sizes -----------------------------------------------------------------------------------------------------------


def test_modules_are_short() -> None:
    lines = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


def test_functions_can_be_seen_whole() -> None:
    long = {
        f"{name_of(path)}.{node.name}": lines
        for path in SOURCES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > MOST_LINES_OF_A_FUNCTION
    }
    assert long == {}


def test_folders_can_be_overlooked() -> None:
    """``benchmarks/`` itself may hold more: each file there is a command of its own."""
    counts = Counter(str(path.parent.relative_to(ROOT)) for path in SOURCES)
    assert {folder for folder, count in counts.items() if count > MOST_FILES} <= {"benchmarks"}


@pytest.mark.parametrize("path", [path for path in MODULES if path.name == "__init__.py"], ids=name_of)
def test_a_package_says_what_it_holds(path: Path) -> None:
    said = ast.get_docstring(parsed(path)) or ""
    assert said.splitlines()[0].endswith((".", ":"))
    assert len(said.split()) >= 5


# --- circles ---------------------------------------------------------------------------------------------------------


@cache
def imports_between_modules() -> dict[str, frozenset[str]]:
    """Module → the modules of ours that it imports; the package itself is the front door, and part of no circle."""
    ours = {name_of(path): path for path in MODULES}
    graph = {}
    for name, path in ours.items():
        found = imported(path)
        # `from package import module` names the module; the package is meant only where one of its own names is imported.
        taken = {each for each in found if each in ours}
        taken -= {each for each in taken if any(other.rpartition(".")[0] == each for other in taken & found)}
        graph[name] = frozenset(taken - {name, "scalegpt"})
    return {**graph, "scalegpt": frozenset()}


def circle(graph: Mapping[str, frozenset[str] | set[str]]) -> list[str]:
    """A circle of a graph; empty: there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def siblings() -> Iterator[tuple[str, dict[str, set[str]]]]:
    """Each package, with which of its children, packages or modules, imports which other."""
    for package in (name_of(path) for path in MODULES if path.name == "__init__.py"):
        depth, graph = package.count(".") + 1, defaultdict(set)
        for name, taken in imports_between_modules().items():
            for other in taken:
                if name.startswith(f"{package}.") and other.startswith(f"{package}."):
                    child, sibling = name.split(".")[depth], other.split(".")[depth]
                    graph[child] |= {sibling} - {child}
        yield package, graph


def test_no_circle_of_modules() -> None:
    assert circle(imports_between_modules()) == []


def test_no_circle_of_packages() -> None:
    assert {package: found for package, graph in siblings() if (found := circle(graph))} == {}


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) != []
    assert circle({"a": {"b"}, "b": {"c"}, "c": set(), "d": {"a"}}) == []


# --- torch -----------------------------------------------------------------------------------------------------------

COMMANDS = (
    "--help", "params --preset tiny", "presets", "gpus", "gpus 4090", "train --help", "sample --help", "plan --help",
    "eval --help", "doctor --help", "completion bash", "checkpoint --help", "checkpoint verify --help",
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
