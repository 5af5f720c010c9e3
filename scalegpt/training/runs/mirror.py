"""A copy of a run's small files beside its checkpoints, from which another machine continues the run.

A resume reads more than a checkpoint: the run's id, its settings and layout, the recent losses for the guards, the data
ledger, the status, the tokenizer. All these files are in the run's folder, which is on the disk of rank 0's machine. Before a
checkpoint outside that folder is committed, they are copied to the folder ``run/`` beside it. A start on a machine that
lacks the folder, or has an older state of it, fetches them first. Then it resumes as with any other folder. The same holds
for checkpoints in another folder (``checkpoint_dir``), which may be on a disk that all machines share.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from scalegpt.checkpoint.address import ADVICE, PART_BYTES, Address, Place
from scalegpt.checkpoint.reader import read_limited, unreadable
from scalegpt.checkpoint.store import RUN_COPY, step_of
from scalegpt.errors import InputError, RunError
from scalegpt.storage import is_temporary, retried, temporary_name
from scalegpt.structured import CONFIG_LIMIT
from scalegpt.training.runs.directory import RUN_ID, RunDirectory
from scalegpt.training.runs.files import writing

_REPORT, _STACKS = "report.html", "stacks_rank_"
"""Files that are not copied, and the beginning of their names: they are made again, or tell of one machine."""


class Mirror:
    """Keeps the copy of a run's files. Rank 0 only.

    Args:
        directory: the run's directory.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory
        self._sent: dict[str, tuple[int, int]] = {}

    def update(self) -> None:
        """Copy the files that have changed since the last call; nothing where the checkpoints are in the run's folder.

        Raises:
            RunError: a file cannot be copied.
        """
        place = self.directory.checkpoints
        if not self.directory.is_kept_elsewhere():
            return
        for path, about in _copied(self.directory.path):
            now = about.st_size, about.st_mtime_ns
            if self._sent.get(path.name) != now:
                _send(path, about.st_size, place / RUN_COPY / path.name)
                self._sent[path.name] = now


def fetch(directory: RunDirectory) -> str | None:
    """Fetch the copy of a run's files, if the run's folder is missing, or ends before the newest checkpoint. Rank 0 only.

    Returns:
        A line to print; None: nothing was fetched.

    Raises:
        InputError: the copy cannot be read, or the folder cannot be written.
    """
    place, newest = directory.checkpoints, directory.newest_checkpoint()
    source = place / RUN_COPY
    if newest is None or not directory.is_kept_elsewhere():
        return None
    try:
        names = [name for name in _names_in(source) if _is_copied(name)]
        if RUN_ID not in names or not _is_wanted(directory, source, step_of(newest)):
            return None
        with writing(directory.path):
            directory.path.mkdir(parents=True, exist_ok=True)
        # The id comes first, since it allows a repetition; the configuration last, since it makes a run of the folder.
        for name in sorted(names, key=lambda each: (each == directory.config.name, each != RUN_ID)):
            _fetch(source / name, directory.path / name)
    except OSError as error:
        raise unreadable(source, error) from None
    except RunError as error:
        raise InputError(str(error)) from None
    return f"files    {directory.path}/ was fetched from {source}, which is newer"


def _names_in(folder: Place) -> list[str]:
    if isinstance(folder, Address):
        return list(folder.objects())
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def _is_wanted(directory: RunDirectory, source: Place, newest: int) -> bool:
    """Whether the folder lacks the run, or has a state of the same run from before the step of the newest checkpoint."""
    if not directory.config.is_file() and directory.is_blank():
        return True
    there = read_limited(source / RUN_ID, CONFIG_LIMIT).decode(errors="replace").strip()
    is_whole = directory.config.is_file() and directory.read_past().last_step >= newest
    return directory.read_id() == there and not is_whole


def _copied(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in sorted(folder.iterdir()):
        with suppress(FileNotFoundError):  # it was deleted meanwhile
            if _is_copied(path.name) and path.is_file():
                yield path, path.stat()


def _is_copied(name: str) -> bool:
    if name == RUN_ID:
        return True
    is_hidden = name.startswith(".") or "/" in name or "\0" in name
    return not (is_hidden or is_temporary(Path(name)) or name == _REPORT or name.startswith(_STACKS))


def _send(path: Path, size: int, to: Place) -> None:
    """Copy the first ``size`` bytes of a file, which may be growing."""
    try:
        if isinstance(to, Address):
            to.persistently(lambda: _upload(path, size, to))
        else:
            to.parent.mkdir(parents=True, exist_ok=True)
            retried(lambda: _copy(path, to))
    except OSError as error:
        advice = ADVICE if isinstance(to, Address) else "free disk space or make the folder writable"
        raise RunError(f"{path} cannot be copied to {to}: {error.strerror}; {advice}") from error


def _upload(path: Path, size: int, to: Address) -> None:
    with path.open("rb") as file:
        if size <= PART_BYTES:
            to.try_writing(file.read(size))
            return
        with to.writing(size) as out:
            for start in range(0, size, PART_BYTES):
                out.write(file.read(min(PART_BYTES, size - start)))


def _copy(path: Path, to: Path) -> None:
    temporary = temporary_name(to)
    shutil.copyfile(path, temporary)
    temporary.replace(to)


def _fetch(source: Place, path: Path) -> None:
    if isinstance(source, Path):
        with writing(path):
            _copy(source, path)
        return
    temporary = temporary_name(path)
    with writing(temporary):
        temporary.write_bytes(b"")
    for part in source.parts(source.size() or 0):
        with writing(temporary), temporary.open("ab") as file:
            file.write(part)
    with writing(path):
        temporary.replace(path)
