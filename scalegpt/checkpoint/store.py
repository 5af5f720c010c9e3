"""The folder of a run's checkpoints: finding, keeping and deleting them.

A checkpoint is a directory, for example ``step_00001000``. It gets this name by a rename when all its files are on the
disk, and loses the name by another rename before it is deleted. A directory with such a name is therefore complete,
unless something else damaged it. The newest checkpoint is found from the names alone; no file points to it.

A link to a directory is a checkpoint like any other. Deleting it deletes the link, not its target.

At an address (:mod:`scalegpt.checkpoint.address`) there are no renames. There a checkpoint is what has a manifest: it is
written after all other objects, and deleted before them. Objects without a manifest are leftovers.
"""

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from scalegpt.checkpoint.address import Address, Place
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
"""The ending that :func:`set_aside` adds to a name: a damaged checkpoint, or one of a step that a rollback undid."""

RUN_COPY = "run"
"""The folder beside checkpoints outside the run's folder that holds a copy of the run's files."""

_KEPT_OR_ASIDE = re.compile(rf"{NAME.pattern}(?:\.(?:{DAMAGED}|{REPLACED})(?:-[0-9]+)?)?")
"""The names of a folder of one checkpoint at an address, whether it counts or was set aside."""


def step_of(checkpoint: Place) -> int:
    """The step in the name of a checkpoint's directory."""
    return int(checkpoint.name.removeprefix("step_"))


def find_checkpoints(folder: Place) -> list[Place]:
    """The checkpoints in a folder, earliest step first, damaged or not.

    Raises:
        UnreadableError: the folder cannot be read now, so it may hold checkpoints.
    """
    return [path for path in named_as_checkpoints(folder) if is_folder(path)]


def named_as_checkpoints(folder: Place) -> list[Place]:
    """All paths in a folder that have a checkpoint's name, even files and broken links, by step; empty if no folder exists.

    Raises:
        UnreadableError: the folder cannot be read now.
    """
    try:
        if isinstance(folder, Address):
            names = [name for name, objects in _folders_at(folder).items() if MANIFEST in objects]
        else:
            names = _names_in(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise unreadable(folder, error) from error
    return sorted((folder / name for name in names if NAME.fullmatch(name)), key=step_of)


def _names_in(folder: Path) -> list[str]:
    return retried(lambda: [entry.name for entry in os.scandir(folder)])


def _folders_at(folder: Address) -> dict[str, set[str]]:
    """Folders of checkpoints at an address, set aside or not → the names of their objects."""
    found: dict[str, set[str]] = {}
    for path in folder.objects():
        name, _, rest = path.partition("/")
        if rest and _KEPT_OR_ASIDE.fullmatch(name):
            found.setdefault(name, set()).add(rest)
    return found


def set_aside_in(folder: Place) -> list[Place]:
    """The checkpoints in a folder that training has renamed (:func:`set_aside`), in the order of their names."""
    if isinstance(folder, Address):
        names = [name for name, objects in _folders_at(folder).items() if MANIFEST in objects]
    else:
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return [folder / name for name in sorted(names) if _KEPT_OR_ASIDE.fullmatch(name) and not NAME.fullmatch(name)]


def is_checkpoint(path: Place) -> bool:
    """Whether a path is a directory with the name of a checkpoint, or a directory with a manifest.

    Raises:
        UnreadableError: the path cannot be accessed now.
    """
    if is_folder(path) and NAME.fullmatch(path.absolute().name):
        return True
    try:
        return (path / MANIFEST).is_file()
    except OSError as error:
        raise unreadable(path, error) from error


def best_checkpoint(found: Sequence[Place]) -> Place | None:
    """The checkpoint with the lowest validation loss, the earliest if losses are equal; None if no checkpoint has one.

    A checkpoint's loss is that of the last evaluation up to its step.
    """
    return _best({path: _progress_of(path) for path in found})


def prune(folder: Place, keep: int, *, keep_best: bool = False) -> list[str]:
    """Delete the remains of interrupted saves and deletions, and all checkpoints except the newest.

    Only checkpoints with a valid manifest count among the newest. Three kinds of older checkpoints are never deleted:
    those that cannot be read now, since one may be the best; misnamed ones; and those of another version.

    Args:
        folder: the folder of the run's checkpoints; nothing else may write there at the same time.
        keep: number of newest checkpoints to keep.
        keep_best: whether to keep the checkpoint with the lowest validation loss too.

    Returns:
        A line for each path that could not be deleted.

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


def remove_leftovers(folder: Place) -> list[str]:
    """Delete the remains of interrupted saves and deletions. Returns a line for each path that could not be deleted."""
    if isinstance(folder, Path):
        return [problem for leftover in sorted(folder.glob(".step_*.tmp")) for problem in _remove(leftover)]
    try:
        folder.abort_uploads()
        whole = [name for name, objects in sorted(_folders_at(folder).items()) if MANIFEST not in objects]
    except OSError as error:
        return [f"leftovers in {folder} cannot be deleted: {error.strerror}"]
    return [problem for name in whole for problem in _remove(folder / name)]


def remove_amendments(folder: Place) -> None:
    """Delete the temporary files of interrupted calls of :func:`scalegpt.checkpoint.writer.amend`; at an address are none.

    Raises:
        OSError: a checkpoint's directory cannot be written.
    """
    for path in find_checkpoints(folder):
        if isinstance(path, Path):
            remove_temporaries(path, MANIFEST)


def forget_after(folder: Place, step: int) -> None:
    """Delete the checkpoints of later steps, the newest first, because a run that is rolled back takes these steps again.

    A checkpoint that must not be deleted is renamed (:func:`set_aside`), since its step will be saved again. If a checkpoint
    can be renamed but not deleted, the next pruning deletes it.

    Raises:
        OSError: a checkpoint cannot be renamed.
        UnreadableError: the folder cannot be read now.
    """
    for path in reversed(named_as_checkpoints(folder)):
        if step_of(path) <= step:
            continue
        if is_folder(path) and _is_ours_to_delete(_progress_of(path)):
            _remove(_take_away(path))
        else:
            set_aside(path)


def set_aside(checkpoint: Place, why: str = DAMAGED) -> Place:
    """Rename a checkpoint so that its step can be saved again, and return the new path.

    At an address the objects are copied inside the store. The copy gets its manifest last; then the original loses its.
    """
    number, aside = 1, checkpoint.with_name(f"{checkpoint.name}.{why}")
    while _is_there(aside):
        number += 1
        aside = checkpoint.with_name(f"{checkpoint.name}.{why}-{number}")
    if isinstance(checkpoint, Path):
        checkpoint.rename(checkpoint.with_name(aside.name))
        sync_folder(checkpoint.parent)
        return aside
    for name in sorted(checkpoint.objects(), key=lambda each: each == MANIFEST):
        (checkpoint / name).copy_to(checkpoint.with_name(aside.name) / name)
    _remove(_take_away(checkpoint))
    return aside


def _is_there(path: Place) -> bool:
    return path.exists() if isinstance(path, Address) else os.path.lexists(path)


def _progress_of(checkpoint: Place) -> Progress | InputError:
    """A checkpoint's progress, or the error for a manifest that cannot be used."""
    try:
        return read_manifest(checkpoint).header.progress
    except InputError as error:
        return error


def _is_ours_to_delete(progress: Progress | InputError) -> bool:
    """Whether pruning may delete a checkpoint. An unreadable or misnamed one, or one of another version, is kept."""
    return isinstance(progress, Progress) or (
        isinstance(progress, DamagedError) and not isinstance(progress, MisnamedError)
    )


def _best(known: dict[Place, Progress | InputError]) -> Place | None:
    losses = [
        (progress.val_loss, step_of(path), path)
        for path, progress in known.items()
        if isinstance(progress, Progress) and progress.val_loss is not None
    ]
    return min(losses)[2] if losses else None


def _delete(checkpoint: Place) -> list[str]:
    try:
        aside = _take_away(checkpoint)
    except OSError as error:
        return [f"{checkpoint} cannot be deleted: {error.strerror}"]
    return _remove(aside)


def _take_away(checkpoint: Place) -> Place:
    """Rename a checkpoint before its deletion, so that a partly deleted directory is not taken for a checkpoint.

    At an address its manifest is deleted instead.
    """
    if isinstance(checkpoint, Address):
        (checkpoint / MANIFEST).unlink(missing_ok=True)
        return checkpoint
    aside = checkpoint.with_name(f".{checkpoint.name}.deleted.tmp")
    checkpoint.rename(aside)
    sync_folder(checkpoint.parent)
    return aside


def _remove(path: Place) -> list[str]:
    """Delete a directory, or a link but not its target. Returns a line if that fails."""
    try:
        if isinstance(path, Address):
            for name in path.objects():
                (path / name).unlink(missing_ok=True)
        elif path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path)
    except OSError as error:
        return [f"{path} cannot be deleted: {error.strerror}"]
    return []
