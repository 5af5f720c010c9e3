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
    """The value, or None for a number that JSON has no word for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say which file of the run could not be written.

    Raises:
        RunError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path} cannot be written: {error.strerror}; make room, or the folder writable, and start the run again"
        ) from error


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader or a crash finds the old or the new content, never a part.

    An error that may pass is retried.
    """
    retried(lambda: write_atomic(path, text))


def try_writing(*folders: Path) -> None:
    """See that files can be made in the folders that are there, before anything is trained for them.

    Raises:
        InputError: they cannot.
    """
    for folder in folders:
        if not folder.is_dir():
            continue
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise InputError(f"{folder} cannot be written: {error.strerror}; make it writable") from None
