"""Large token files are read whole once, and again only if they have changed."""

import os
from pathlib import Path

import numpy as np
import pytest

from scalegpt.config import DataConfig
from scalegpt.data import cache, token_file
from scalegpt.data.cache import checked
from scalegpt.data.foreign.given import open_given
from scalegpt.errors import InputError
from token_files import write_datatrove

BYTES = DataConfig(tokenizer="byte")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALEGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "LARGE_BYTES", 0)
    monkeypatch.setattr(cache, "_SETTLED_NS", -(10**12))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read whole."""
    real, names = token_file._scan_part, list[str]()
    monkeypatch.setattr(token_file, "_scan_part", lambda part, *rest: names.append(part.path.name) or real(part, *rest))  # type: ignore[func-returns-value]
    return names


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tokens").mkdir()
    for number in range(3):
        write_datatrove(tmp_path / f"tokens/{number}.ds", [[number, 1, 2]] * 20)
    return tmp_path / "tokens"


def digest(folder: Path) -> str:
    tokens = open_given(folder, BYTES)
    checked(tokens)
    tokens.check_vocabulary(257)
    return tokens.digest


def test_they_are_read_once(folder: Path, read: list[str]) -> None:
    first = digest(folder)
    assert sorted(read) == ["0.ds", "1.ds", "2.ds", "2.ds"]  # the end of the last file is held out
    assert digest(folder) == first
    assert len(read) == 4


def test_a_change_is_noticed_even_if_the_time_is_set_back(folder: Path, read: list[str]) -> None:
    first, path = digest(folder), folder / "1.ds"
    before = path.stat()
    path.write_bytes(np.full(60, 300, dtype="<u2").tobytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(InputError, match=r"1\.ds holds id 300 at token offset 0, outside the vocabulary of 257"):
        digest(folder)
    path.write_bytes(np.full(60, 30, dtype="<u2").tobytes())
    assert digest(folder) != first


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', '{"a": ["b", "c"]}', "{"])
def test_a_damaged_memory_is_not_believed(folder: Path, read: list[str], content: str, tmp_path: Path) -> None:
    first = digest(folder)
    (file,) = (tmp_path / "cache/checked").iterdir()
    file.write_text(content)
    assert digest(folder) == first
    assert len(read) == 8


def test_what_has_just_changed_is_not_remembered(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_SETTLED_NS", 10**12)
    digest(folder)
    assert not (tmp_path / "cache").exists()


def test_small_sets_are_always_read(folder: Path, read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "LARGE_BYTES", 1 << 30)
    assert digest(folder) == digest(folder)
    assert len(read) == 8
