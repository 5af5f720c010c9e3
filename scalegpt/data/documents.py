"""Find the files that inputs name or hold."""

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from scalegpt.data.ours import folder_of_ours
from scalegpt.errors import InputError


@dataclass(frozen=True)
class Document:
    """A file to read.

    Attributes:
        path: where it is.
        name: how it is called whatever folder it lies in: its path inside the folder that the user named.
        real: where it is with all links followed, which tells two paths to one file.
        folder: the folder that the user named, or None for a file that the user named.

    """

    path: Path
    name: str
    real: Path
    folder: Path | None = None


def find_documents(inputs: Sequence[str | Path]) -> list[Document]:
    """List the files that the inputs name or hold, sorted by name, none twice.

    Folders are searched to any depth, through symbolic links too, each folder once. Hidden files and folders are left
    out, and folders of prepared tokens, which are no text. The folder of a run is listed itself, to be counted as skipped.

    Args:
        inputs: files and folders.

    Raises:
        InputError: no input, or one that does not exist.

    """
    if not inputs:
        raise InputError("no input was given; name text files or folders of them")
    found: dict[Path, Document] = {}
    for given in map(Path, inputs):
        if is_prepared(given):
            raise InputError(
                f"{given} holds tokens already prepared; give it alone as --input_file, or name text files"
            )
        if is_folder(given):
            _refuse_run(given)
            for path in _walk(given, set()):
                real = real_path(path)
                found.setdefault(real, Document(path, path.relative_to(given).as_posix(), real, given))
        else:
            _check_exists(given)
            # A named file is held to more than one that lies in a folder: the name wins.
            found[real_path(given)] = Document(given, given.name, real_path(given))
    return sorted(found.values(), key=lambda document: (document.name, str(document.path)))


def _refuse_run(folder: Path) -> None:
    if is_run(folder):
        raise InputError(f"{folder} is the folder of a run, which holds no text to train on; name the text itself")


def is_run(folder: Path) -> bool:
    """Say whether a folder is that of a run, or of a checkpoint."""
    try:
        return folder_of_ours({entry.name for entry in os.scandir(folder)}) is not None
    except OSError:
        return False


def is_prepared(folder: Path) -> bool:
    """Say whether a folder holds token files, ours or nanoGPT's."""
    try:
        return stat.S_ISREG((folder / "train.bin").stat().st_mode)
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """Say whether a path leads to a folder; a broken or circular link and a place that cannot be seen do not."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def real_path(path: Path) -> Path:
    """Return a path with all links followed, as far as they lead anywhere."""
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # a link that leads to itself
        return path.absolute()


def _check_exists(path: Path) -> None:
    try:
        path.stat()
    except FileNotFoundError:
        raise InputError(f"input {path} does not exist; name a text file or a folder of them") from None
    except (OSError, ValueError) as error:
        raise InputError(
            f"input {path} cannot be read: {getattr(error, 'strerror', error)}; name a text file"
        ) from None


def _walk(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """Yield the files below a folder in sorted order, and a folder that cannot be listed itself, to be counted."""
    real = real_path(folder)
    if real in seen:  # a symbolic link back to where we have been
        return
    seen.add(real)
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        yield folder
        return
    for entry in entries:
        path = folder / entry.name
        if entry.name.startswith("."):
            continue
        if not is_folder(path) or is_run(path):  # a run is no text, but it is to be counted
            yield path
        elif not is_prepared(path):
            yield from _walk(path, seen)
