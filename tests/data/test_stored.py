"""Tokens in files: read like an array, and a file that changes under us is an error that says so."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from scalegpt import storage
from scalegpt.data.stored import MOST_OPEN, NO_ID, Part, StoredTokens
from scalegpt.errors import RunError

IDS = np.arange(1000, dtype="<u2")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    IDS.tofile(tmp_path / "train.bin")
    return tmp_path / "train.bin"


def test_it_reads_like_an_array(path: Path) -> None:
    tokens = StoredTokens.of_file(path)
    assert len(tokens) == 1000
    assert (tokens[0], tokens[-1], tokens[np.int64(7)]) == (0, 999, 7)
    for part in (slice(3, 9), slice(None, 5), slice(-5, None), slice(990, 2000), slice(7, 7), slice(9, 3)):
        assert np.array_equal(tokens[part], IDS[part])
    assert np.array_equal(np.asarray(tokens), IDS)
    assert tokens[2:4].dtype == np.dtype("<u2")
    with pytest.raises(IndexError):
        tokens[1000]


def test_a_file_that_becomes_shorter_is_an_error_of_one_line(path: Path) -> None:
    tokens = StoredTokens.of_file(path)
    os.truncate(path, 800)
    assert tokens[390:400].tolist() == IDS[390:400].tolist()
    with pytest.raises(RunError, match=r"train.bin had 1,000 tokens when it was opened and has 400 now") as raised:
        tokens[398:402]
    assert "\n" not in str(raised.value)


def test_a_deleted_file_is_still_read(path: Path) -> None:
    tokens = StoredTokens.of_file(path)
    path.unlink()
    assert np.array_equal(tokens[:], IDS)


@pytest.mark.parametrize("failures", [2, 3])
def test_a_read_that_fails_is_retried(path: Path, monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
    real, attempts = os.pread, 0

    def failing(*arguments: object) -> bytes:
        nonlocal attempts
        attempts += 1
        if attempts <= failures:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(storage, "RETRY_SECONDS", (0.0, 0.0))
    monkeypatch.setattr(os, "pread", failing)
    tokens = StoredTokens.of_file(path)
    if failures <= len(storage.RETRY_SECONDS):
        assert tokens[5:7].tolist() == [5, 6]
    else:
        with pytest.raises(
            RunError, match=r"train.bin cannot be read at token offset 5: Input/output error; check the disk"
        ):
            tokens[5:7]
    assert attempts == 3


def test_an_error_that_does_not_pass_is_not_retried(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = []

    def failing(*_: object) -> bytes:
        attempts.append(1)
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(os, "pread", failing)
    with pytest.raises(RunError, match="Bad file descriptor"):
        StoredTokens.of_file(path)[5:7]
    assert len(attempts) == 1


def test_a_read_that_is_given_in_parts_is_put_together(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda file, count, offset: real(file, min(count, 33), offset))
    assert np.array_equal(StoredTokens.of_file(path)[:], IDS)


def parts_of(folder: Path, sizes: list[int], dtype: str = "<u2", header: int = 0) -> list[Part]:
    """Files that hold 0, 1, 2, … in turn, each after a header of zeros."""
    parts, first = [], 0
    for number, size in enumerate(sizes):
        ids = np.arange(first, first + size, dtype=dtype)
        path = folder / f"{number:05}.bin"
        path.write_bytes(bytes(header) + ids.tobytes())
        parts.append(Part(path, header, size, ids.dtype))
        first += size
    return parts


@pytest.mark.parametrize("sizes", [[1000], [300, 0, 1, 699], [1] * 100, [0, 5, 995, 0]])
def test_several_files_read_like_one(tmp_path: Path, sizes: list[int]) -> None:
    tokens = StoredTokens(parts_of(tmp_path, sizes, header=6))
    ids = np.arange(sum(sizes))
    assert len(tokens) == len(ids)
    for first, count in ((0, len(ids)), (0, 1), (len(ids) - 1, 1), (3, 7), (90, 10), (4, 0), (len(ids), 0)):
        found = tokens.read(first, count)
        assert (found.dtype, found.flags.writeable) == (np.dtype("<u2"), False)
        assert found.tolist() == ids[first : first + count].tolist()
    assert [tokens[index] for index in range(len(ids))] == ids.tolist()
    last = next(number for number in reversed(range(len(sizes))) if sizes[number])
    assert tokens.place(len(ids) - 1) == (tmp_path / f"{last:05}.bin", sizes[last] - 1)


def test_few_of_many_files_are_open_at_once(tmp_path: Path) -> None:
    def open_files() -> int:
        return sum(tmp_path in path.resolve().parents for path in Path("/proc/self/fd").iterdir())

    tokens = StoredTokens(parts_of(tmp_path, [2] * (MOST_OPEN + 20)))
    assert open_files() == 0
    assert tokens.tolist() == list(range(2 * (MOST_OPEN + 20)))
    assert open_files() == MOST_OPEN
    assert tokens[:4].tolist() == [0, 1, 2, 3]
    del tokens
    assert open_files() == 0


def test_a_file_that_is_gone_when_it_is_first_read(tmp_path: Path) -> None:
    tokens = StoredTokens(parts_of(tmp_path, [2] * (MOST_OPEN + 1)))
    (tmp_path / "00003.bin").unlink()
    assert tokens[4:6].tolist() == [4, 5]
    with pytest.raises(RunError, match=r"00003\.bin cannot be read at token offset 1: No such file"):
        tokens[7]


def test_files_of_other_types(tmp_path: Path) -> None:
    parts = []
    for name in ("u1", "<i2", "<i4", "<i8", "<u8", "<u4"):
        path = tmp_path / f"{name[-2:]}.bin"
        np.array([1, 100], dtype=name).tofile(path)
        parts.append(Part.whole(path, np.dtype(name)))
    tokens = StoredTokens(parts)
    assert tokens.dtype == np.dtype("<u4")
    assert tokens.tolist() == [1, 100] * 6
    assert StoredTokens(parts[:1]).dtype == np.dtype("<u2")
    np.array([-1, 1 << 40], dtype="<i8").tofile(tmp_path / "i8.bin")
    np.array([-1, -5], dtype="<i4").tofile(tmp_path / "i4.bin")
    assert tokens[6:8].tolist() == [NO_ID, NO_ID]
    assert min(tokens[4:6]) > 1 << 31


def test_a_part_of_a_file(tmp_path: Path) -> None:
    (part,) = parts_of(tmp_path, [100], header=4)
    assert StoredTokens([part.cut(90, 10), part.cut(0, 3)]).tolist() == [*range(90, 100), 0, 1, 2]
