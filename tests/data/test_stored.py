"""Tokens in a file: read like an array, and a file that changes under us is an error that says so."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from scalegpt import storage
from scalegpt.data.stored import StoredTokens
from scalegpt.errors import RunError

IDS = np.arange(1000, dtype="<u2")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    IDS.tofile(tmp_path / "train.bin")
    return tmp_path / "train.bin"


def test_it_reads_like_an_array(path: Path) -> None:
    tokens = StoredTokens(path)
    assert len(tokens) == 1000
    assert (tokens[0], tokens[-1], tokens[np.int64(7)]) == (0, 999, 7)
    for part in (slice(3, 9), slice(None, 5), slice(-5, None), slice(990, 2000), slice(7, 7), slice(9, 3)):
        assert np.array_equal(tokens[part], IDS[part])
    assert np.array_equal(np.asarray(tokens), IDS)
    assert tokens[2:4].dtype == np.dtype("<u2")
    with pytest.raises(IndexError):
        tokens[1000]


def test_a_file_that_becomes_shorter_is_an_error_of_one_line(path: Path) -> None:
    tokens = StoredTokens(path)
    os.truncate(path, 800)
    assert tokens[390:400].tolist() == IDS[390:400].tolist()
    with pytest.raises(RunError, match=r"train.bin had 1,000 tokens when it was opened and has 400 now") as raised:
        tokens[398:402]
    assert "\n" not in str(raised.value)


def test_a_deleted_file_is_still_read(path: Path) -> None:
    tokens = StoredTokens(path)
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
    tokens = StoredTokens(path)
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
        StoredTokens(path)[5:7]
    assert len(attempts) == 1


def test_a_read_that_is_given_in_parts_is_put_together(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda file, count, offset: real(file, min(count, 33), offset))
    assert np.array_equal(StoredTokens(path)[:], IDS)
