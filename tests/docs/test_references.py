"""Every path and every dotted name that a document or a docstring mentions exists."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = tuple(
    path
    for pattern in ("*.md", "docs/*.md", "configs/*.md")
    for path in sorted(ROOT.glob(pattern))
    if path.stem != "CHANGELOG"
)
SOURCES = tuple(
    path
    for top in ("scalegpt", "launch", "benchmarks", "examples", "tests")
    for path in sorted((ROOT / top).rglob("*.py"))
)
TOPS = ("scalegpt", "tests", "benchmarks", "launch", "configs", "ds_configs", "docs", "examples")

PLACES = (ROOT, ROOT / "scalegpt", ROOT / "tests")
"""What a path may be relative to."""

FOREIGN = {
    "bf16_optimizer.py", "stage3.py", "stage_1_and_2.py", "deepspeed_*.py", "fsdp/_fully_shard",
    "scripts/train/benchmarking/README.md", "scripts/train/benchmarking", "config/train_gpt2.py", "launch.py", "data/mine",
}  # fmt: skip
"""Files of DeepSpeed, torch, other trainers and examples."""

OF_A_RUN = {"checkpoints/", ".heartbeats/", ".trackers/", "runs/", "step_00001000/"}
"""Folders that a run makes."""


@cache
def ours() -> tuple[frozenset[str], frozenset[str]]:
    """The names of our files and of our folders."""
    files = [
        *ROOT.glob("*"),
        *(path for top in TOPS for path in (ROOT / top).rglob("*") if "__pycache__" not in path.parts),
    ]
    return (
        frozenset(path.name for path in files if path.is_file()),
        frozenset(path.name for path in files if path.is_dir()) | {*TOPS},
    )


@cache
def first_folders() -> frozenset[str]:
    """What a path of ours may begin with."""
    return frozenset(path.name for place in PLACES for path in place.iterdir() if path.is_dir()) - {"runs"}


def exists(word: str) -> bool:
    """Whether a word that may be a path of ours is one; true of every other word."""
    if word in FOREIGN | OF_A_RUN or word.startswith(("~", "/", "build/", "runs/", ".venv/")):
        return True
    files, folders = ours()
    if "/" not in word:
        return not word.endswith((".py", ".md")) or word in files
    if word.count("/") == 1 and word.endswith("/"):
        return word.rstrip("/") in folders
    if word.split("/")[0] in first_folders() or word.endswith((".py", ".md")):
        return any(found for place in PLACES for found in place.glob(word.rstrip("/")))
    return True


def code_of(page: str) -> list[str]:
    """The code of a page in Markdown: its fenced blocks and its spans."""
    blocks = re.findall(r"^```.*?^```", page, re.DOTALL | re.MULTILINE)
    return [*blocks, *re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE))]


def paths_in(code: str) -> list[str]:
    """The words that may be paths."""
    return re.findall(r"(?<![\w./~@-])[\w.~*/-]*(?:/|\.py\b|\.md\b)[\w.*/-]*", code)


@cache
def names_of(path: Path) -> frozenset[str]:
    """The names that a module defines or imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case (
                ast.FunctionDef(name=name)
                | ast.AsyncFunctionDef(name=name)
                | ast.ClassDef(name=name)
                | ast.arg(arg=name)
            ):
                names.add(name)
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                names.add(name)
            case ast.alias():
                names.add((node.asname or node.name).split(".")[0])
    return frozenset(names)


def resolves(dotted: str) -> bool:
    """Whether a dotted name that begins with a package of ours is a module, or is defined in one."""
    place, parts = ROOT, dotted.split(".")
    if parts[0] == "fuzz":
        place = ROOT / "tests"
    while parts and (place / parts[0]).is_dir():
        place = place / parts.pop(0)
    module = place / f"{parts[0]}.py" if parts and (place / f"{parts[0]}.py").is_file() else None
    if module is not None:
        parts.pop(0)
    module = module or place / "__init__.py"
    if not parts:
        return True
    return module.is_file() and names_of(module) >= {part for part in parts if not part.startswith("__")}


def dotted_in(text: str) -> list[str]:
    """The dotted names of our packages; a keyword argument or an address is none."""
    return re.findall(r"(?<![\w./@-])(?:scalegpt|benchmarks)(?:\.[a-zA-Z_]\w*)+(?![\w/])", text)


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_document_names_what_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    words = [word for code in code_of(text) for word in paths_in(code)]
    assert [word for word in words if not exists(word)] == []
    assert [name for name in dotted_in(text) if not resolves(name)] == []


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_document_names_what_a_file_has(page: Path) -> None:
    """``config/train.py: SCHEDULES``: the file defines the name."""
    named = re.findall(r"`([\w./]+\.py): ([A-Za-z_]\w*)`", page.read_text(encoding="utf-8"))
    for path, name in named:
        (module, *_) = [found for place in PLACES for found in place.glob(path)]
        assert name in names_of(module), f"{path}: {name}"


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        there = (page.parent / path) if path else page
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, target


def test_docstrings_and_comments_name_what_exists() -> None:
    missing = []
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        prose = "\n".join(re.findall(r'"""(?:.|\n)*?"""|#.*$', text, re.MULTILINE))
        roles = re.findall(r":(?:mod|func|class|data|meth|attr):`~?(?:\w+\.)*(\w+)`", prose)
        files = re.findall(r"(?<![\w/.])(?:scalegpt|tests|benchmarks|launch)/[\w/]+\.py\b", prose)
        unknown = [name for name in dotted_in(prose) if not resolves(name)]
        unknown += [name for name in roles if name not in everything()]
        unknown += [name for name in files if not exists(name)]
        missing += [f"{path.relative_to(ROOT)}: {name}" for name in unknown]
    assert missing == []


@cache
def everything() -> frozenset[str]:
    """All names that our sources define, and their modules' names."""
    return frozenset().union(*map(names_of, SOURCES), (part for path in SOURCES for part in path.with_suffix("").parts))


def test_what_does_not_exist_is_found() -> None:
    words = paths_in("scalegpt/planner/gpus.yaml tests/nowhere/test_x.py planner/gone/ nothing.py `runs/NAME/x.yaml`")
    assert [word for word in words if not exists(word)] == words[:4]
    assert not resolves("scalegpt.planner.memory.predict.tape")
    assert resolves("scalegpt.planner.memory.tape.Program")
    assert resolves("scalegpt.planner.search")
