"""The folder of a run's checkpoints: their names, which there are, which are kept.

A checkpoint is a directory ``step_00001000``. It comes into being by a rename, when all its files are on the disk, and loses
its name by another before it is deleted: a directory of that name is complete, or was damaged by others. Which is the newest
follows from the names alone; there is no file that points to it.

A link to a directory is a checkpoint like any other. Where it is deleted, the link goes and its target stays.
"""

import os
import shutil
from pathlib import Path

from scalegpt.checkpoint.manifest import (
    MANIFEST,
    NAME,
    DamagedError,
    MisnamedError,
    Progress,
)
from scalegpt.checkpoint.manifest import checkpoint_name as checkpoint_name
from scalegpt.checkpoint.reader import is_folder, read_manifest, unreadable
from scalegpt.errors import InputError
from scalegpt.storage import remove_temporaries, retried, sync_folder

DAMAGED, REPLACED = "damaged", "replaced"
"""What is added to the name of a checkpoint that is set aside: it is not whole, or the run went back behind it."""


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step_"))


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first; whether they are whole is not looked at.

    Raises:
        UnreadableError: the folder cannot be read now: that is not to have none.
    """
    return [path for path in named_as_checkpoints(folder) if is_folder(path)]


def named_as_checkpoints(folder: Path) -> list[Path]:
    """What has the name of a checkpoint in a folder, a file or a broken link too, by its step; none without the folder.

    Raises:
        UnreadableError: the folder cannot be read now.
    """
    try:
        names = retried(lambda: [entry.name for entry in os.scandir(folder)])
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise unreadable(folder, error) from error
    return sorted((folder / name for name in names if NAME.fullmatch(name)), key=step_of)


def is_checkpoint(path: Path) -> bool:
    """Whether a path is meant to be a checkpoint: it is called one, or has a manifest.

    Raises:
        UnreadableError: it cannot be looked at now.
    """
    if is_folder(path) and NAME.fullmatch(path.absolute().name):
        return True
    try:
        return (path / MANIFEST).is_file()
    except OSError as error:
        raise unreadable(path, error) from error


def best_checkpoint(found: list[Path]) -> Path | None:
    """Of several checkpoints that with the lowest validation loss, the earliest of equals; None where none tells.

    The loss is that of the last evaluation up to the checkpoint's step.
    """
    return _best({path: _progress_of(path) for path in found})


def prune(folder: Path, keep: int, *, keep_best: bool = False) -> list[str]:
    """Delete all but the newest checkpoints, and what interrupted saves and deletions left behind.

    Only what is whole as far as its manifest tells counts among the newest. Of the older ones these stay too: what cannot be
    read now, for it may be the best; what has the name of another step; what is of another version.

    Args:
        folder: the run's checkpoints; nobody else writes there meanwhile.
        keep: how many of the newest stay.
        keep_best: the one with the lowest validation loss stays too.

    Returns:
        What could not be deleted, and why, a line each.

    Raises:
        UnreadableError: the folder cannot be read now.
    """
    problems = remove_leftovers(folder)
    found = find_checkpoints(folder)
    if len(found) <= keep:
        return problems
    known = {path: _progress_of(path) for path in found}
    counted = [path for path, progress in known.items() if isinstance(progress, Progress)]
    if len(counted) <= keep:
        return problems
    best = _best(known) if keep_best else None
    for path in found[: found.index(counted[-keep])]:
        if path != best and _is_ours_to_delete(known[path]):
            problems += _delete(path)
    return problems


def remove_leftovers(folder: Path) -> list[str]:
    """Delete what writers and deleters that are gone left unfinished.

    Returns:
        What could not be deleted, and why, a line each.
    """
    return [problem for leftover in sorted(folder.glob(".step_*.tmp")) for problem in _remove(leftover)]


def remove_amendments(folder: Path) -> None:
    """Delete what interrupted amendments of manifests (:func:`scalegpt.checkpoint.writer.amend`) left in checkpoints.

    Raises:
        OSError: a checkpoint cannot be written.
    """
    for path in find_checkpoints(folder):
        remove_temporaries(path, MANIFEST)


def forget_after(folder: Path, step: int) -> None:
    """Delete the checkpoints of later steps, the newest first: a run that goes back takes these steps again.

    What is not known to be ours is set aside instead, since its step will be saved again.

    Raises:
        OSError: a checkpoint cannot be renamed. What is left of one that was renamed goes with the next pruning.
        UnreadableError: the folder cannot be read now.
    """
    for path in reversed(named_as_checkpoints(folder)):
        if step_of(path) <= step:
            continue
        if is_folder(path) and _is_ours_to_delete(_progress_of(path)):
            _remove(_take_away(path))
        else:
            set_aside(path)


def set_aside(checkpoint: Path, why: str = DAMAGED) -> Path:
    """Rename a checkpoint so that it is none any more: a run that went back behind it will write that step again."""
    number, aside = 1, checkpoint.with_name(f"{checkpoint.name}.{why}")
    while os.path.lexists(aside):
        number += 1
        aside = checkpoint.with_name(f"{checkpoint.name}.{why}-{number}")
    checkpoint.rename(aside)
    sync_folder(checkpoint.parent)
    return aside


def _progress_of(checkpoint: Path) -> Progress | InputError:
    """How far a checkpoint is, or why its manifest cannot be used."""
    try:
        return read_manifest(checkpoint).header.progress
    except InputError as error:
        return error


def _is_ours_to_delete(progress: Progress | InputError) -> bool:
    """Whether a checkpoint that need not be kept may be deleted: what is damaged is of no use, what else is unknown stays."""
    return isinstance(progress, Progress) or (
        isinstance(progress, DamagedError) and not isinstance(progress, MisnamedError)
    )


def _best(known: dict[Path, Progress | InputError]) -> Path | None:
    losses = [
        (progress.val_loss, step_of(path), path)
        for path, progress in known.items()
        if isinstance(progress, Progress)
        and progress.val_loss is not None  # nobody will want to go back to a damaged one
    ]
    return min(losses)[2] if losses else None


def _delete(checkpoint: Path) -> list[str]:
    try:
        aside = _take_away(checkpoint)
    except OSError as error:
        return [f"{checkpoint} cannot be deleted: {error.strerror}"]
    return _remove(aside)


def _take_away(checkpoint: Path) -> Path:
    """Rename a checkpoint that is to be deleted: half deleted, it must not pass for one."""
    aside = checkpoint.with_name(f".{checkpoint.name}.deleted.tmp")
    checkpoint.rename(aside)
    sync_folder(checkpoint.parent)
    return aside


def _remove(path: Path) -> list[str]:
    """Delete a directory with all that is in it; of a link, the link alone.

    Returns:
        Why it could not be deleted; nothing where it was.
    """
    try:
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path)
    except OSError as error:
        return [f"{path} cannot be deleted: {error.strerror}"]
    return []
