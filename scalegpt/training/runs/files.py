"""Writing a run's files: whole or not at all, and with an error that names the file."""

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scalegpt.errors import InputError, RunError
from scalegpt.storage import retried, write_atomic


def finite(value: Any) -> Any:
    """The value, or None for a number that JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file of the run that could not be written.

    Raises:
        RunError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path} cannot be written: {error.strerror}; free disk space or make the folder writable, "
            "and start the run again"
        ) from error


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader or a crash finds the old or the new content; an error that may pass is retried.

    Raises:
        OSError: it cannot be written.
    """
    retried(lambda: write_atomic(path, text))


def try_writing(*folders: Path) -> None:
    """Refuse folders in which no file can be made; those that do not exist yet pass.

    Raises:
        InputError: names the folder.
    """
    for folder in filter(Path.is_dir, folders):
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise InputError(f"{folder} cannot be written: {error.strerror}; make it writable") from None
