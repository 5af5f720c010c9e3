"""Which files of a folder are read: patterns of the user, and .gitignore files as git honours them."""

import random
import subprocess
from pathlib import Path

import pytest

from scalegpt.config import DataConfig
from scalegpt.data.prepare import prepare
from scalegpt.data.text.documents import find_documents
from scalegpt.data.text.ignoring import Selection
from scalegpt.errors import InputError


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def names(folder: Path, selection: Selection) -> list[str]:
    return [document.name for document in find_documents([folder], selection).documents]


TREE = {"a.py": "a", "a.md": "a", "docs/b.md": "b", "docs/c.py": "c", "src/deep/d.py": "d", "src/deep/test_d.py": "t"}


@pytest.mark.parametrize(
    ("include", "exclude", "left"),
    [
        ("*.py", None, ["a.py", "docs/c.py", "src/deep/d.py", "src/deep/test_d.py"]),
        ("*.py,!test_*", None, ["a.py", "docs/c.py", "src/deep/d.py"]),
        ("/*.py, docs/", None, ["a.py", "docs/b.md", "docs/c.py"]),
        ("src/**/*.py", "test_*", ["src/deep/d.py"]),
        (None, "docs/,*.md", ["a.py", "src/deep/d.py", "src/deep/test_d.py"]),
        (None, "src", ["a.md", "a.py", "docs/b.md", "docs/c.py"]),
    ],
)
def test_patterns_of_the_user(tmp_path: Path, include: str | None, exclude: str | None, left: list[str]) -> None:
    write(tmp_path, TREE)
    assert names(tmp_path, Selection(include, exclude)) == left
    assert names(tmp_path / ".", Selection(include, exclude)) == left


def test_what_is_skipped_is_counted_by_reason(tmp_path: Path) -> None:
    write(tmp_path, {**TREE, ".gitignore": "docs/\n"})
    found = find_documents([tmp_path], Selection("*.py", "test_*"))
    assert (
        str(found.skipped) == "1 excluded (src/deep/test_d.py), 1 ignored by .gitignore (docs), 1 not included (a.md)"
    )


def test_patterns_do_not_touch_named_files_and_the_switch_turns_gitignore_off(tmp_path: Path) -> None:
    write(tmp_path, {**TREE, ".gitignore": "*.py\n"})
    assert names(tmp_path / "a.md", Selection("*.py")) == ["a.md"]
    assert names(tmp_path, Selection()) == ["a.md", "docs/b.md"]
    assert names(tmp_path, Selection(gitignore=False)) == sorted(TREE)
    # Only files inside the folder that the user names count: data often lie in a folder that a repository ignores.
    assert names(tmp_path / "docs", Selection()) == ["b.md", "c.py"]


@pytest.mark.parametrize("pattern", ["!", "a\\", "[z-a]"])
def test_a_pattern_that_is_none(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(InputError, match=r"exclude: .* is not a pattern of \.gitignore files"):
        Selection(exclude=pattern)
    write(tmp_path, {**TREE, ".gitignore": f"{pattern}\r\n*.md\r\n"})  # git passes over it, and over a carriage return
    assert "a.md" not in names(tmp_path, Selection())


PARTS = ["a", "b", "ab", "a.txt", "b.txt", "build"]
PATTERNS = [
    "a", "b/", "/a", "/a/", "*.txt", "!*.txt", "!a.txt", "a/b", "a/**", "**/b", "a/**/b", "!b", "build/*", "!build/a.txt",
    "?", "[ab]", "[!a]", "/*", "!/a", "a*", "#a", r"\#a", "a ", r"a\ ", "", "**", "*", "!*/", "!a/", "b/a.txt", "/build/**/a",
]  # fmt: skip


@pytest.mark.parametrize("seed", range(8))
def test_gitignore_files_work_as_in_git(tmp_path: Path, seed: int) -> None:
    """``git ls-files`` lists what git does not ignore, for random trees with random .gitignore files at any depth."""
    rng = random.Random(seed)
    for number in range(6):
        folder = tmp_path / str(number)
        for _ in range(30):
            path = folder.joinpath(*rng.choices(PARTS, k=rng.randint(1, 4)))
            if not path.exists() and not any(parent.is_file() for parent in path.parents):
                write(folder, {str(path.relative_to(folder)): "text"})
        for parent in {folder, *(path.parent for path in folder.rglob("*") if rng.random() < 0.3)}:
            (parent / ".gitignore").write_text("\n".join(rng.sample(PATTERNS, rng.randint(1, 4))) + "\n")
        git = ["git", "-C", str(folder), "-c", "core.excludesFile="]
        subprocess.run([*git, "init", "-q"], check=True)
        listed = subprocess.run(
            [*git, "ls-files", "--others", "--exclude-standard"], check=True, capture_output=True, text=True
        ).stdout.splitlines()
        expected = sorted(name for name in listed if not name.endswith(".gitignore"))
        rules = {str(path): path.read_text() for path in folder.rglob(".gitignore")}
        assert names(folder, Selection()) == expected, rules


def test_the_settings_reach_the_preparation(tmp_path: Path) -> None:
    write(tmp_path / "in", {"a.py": "code " * 50, "b.md": "words " * 50, "c.py": "x " * 50, ".gitignore": "c.py\n"})
    whole, kept = (
        prepare([tmp_path / "in"], tmp_path / name, DataConfig(tokenizer="byte", **given))
        for name, given in (("all", {"gitignore": False}), ("some", {"include": "*.py"}))
    )
    assert [Path(source["path"]).name for source in kept.meta["sources"]] == ["a.py"]
    assert len(whole.meta["sources"]) == 3
    assert kept.meta["skipped"] == {"ignored by .gitignore": 1, "not included": 1}
