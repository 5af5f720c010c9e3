"""Writes a run's files. Each is replaced as a whole or stays as it was, and an error names the file."""

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scalegpt.checkpoint.address import ADVICE, Address, Place
from scalegpt.errors import InputError, RunError
from scalegpt.storage import retried, write_atomic


def finite(value: Any) -> Any:
    """Return the value with None for NaN and infinities, which JSON does not have, also inside an object."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def writing(path: Place) -> Iterator[None]:
    """Turn an ``OSError`` inside the block into an error that names the file of the run that could not be written.

    Raises:
        RunError: the block raised an ``OSError``.
    """
    try:
        yield
    except OSError as error:
        advice = ADVICE if isinstance(path, Address) else "free disk space or make the folder writable"
        raise RunError(f"{path} cannot be written: {error.strerror}; {advice}, and start the run again") from error


def write_whole(path: Path, text: str | bytes) -> None:
    """Replace a file atomically, and retry after errors that may be temporary.

    A reader finds the old or the new content, even after a crash.

    Raises:
        OSError: the file cannot be written.
    """
    retried(lambda: write_atomic(path, text))


def try_writing(*folders: Path) -> None:
    """Refuse folders in which no file can be made. Folders that do not exist yet are not refused.

    Raises:
        InputError: no file can be made in a folder, which the message names.
    """
    for folder in filter(Path.is_dir, folders):
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise InputError(f"{folder} cannot be written: {error.strerror}; make it writable") from None
