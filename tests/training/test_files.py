"""Files of a run are tried before anything is trained for them."""

import errno
import tempfile
from pathlib import Path
from typing import Any

import pytest

from scalegpt.errors import InputError
from scalegpt.training.runs.files import try_writing


def test_what_can_be_written_or_is_not_there_yet_will_do(tmp_path: Path) -> None:
    try_writing(tmp_path, tmp_path / "checkpoints")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_takes_no_files_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write where modes forbid it, but not into an immutable folder, which not every file system has."""
    real = tempfile.TemporaryFile

    def fails_in_one(*, dir: Path) -> Any:
        if dir.name == "checkpoints":
            raise OSError(errno.EPERM, "Operation not permitted")
        return real(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", fails_in_one)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match=r"checkpoints cannot be written: Operation not permitted; make it writable"):
        try_writing(tmp_path, tmp_path / "checkpoints")
