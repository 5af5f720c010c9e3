"""The folder of a run's checkpoints: their names, which there are, which are kept.

A checkpoint is a directory ``step_00001000``. It comes into being by a rename, when all its files are on the disk, and loses
its name by another before it is deleted: a directory of that name is complete, or was damaged by others. Which is the newest
follows from the names alone; there is no file that points to it.
"""

import re
import shutil
from pathlib import Path

from scalegpt.checkpoint.manifest import MANIFEST
from scalegpt.checkpoint.reader import read_manifest
from scalegpt.data.writer import sync
from scalegpt.errors import InputError

_NAME = re.compile(r"step_([0-9]{8,})")


def checkpoint_name(step: int) -> str:
    """The directory's name: zero-padded, so that names sort by step."""
    return f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step_"))


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first; whether they are whole is not looked at."""
    found = [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def is_checkpoint(path: Path) -> bool:
    """Whether a path is meant to be a checkpoint: it is called one, or has a manifest."""
    return (path / MANIFEST).is_file() or (path.is_dir() and bool(_NAME.fullmatch(path.name)))


def best_checkpoint(found: list[Path]) -> Path | None:
    """Of several checkpoints that with the lowest validation loss, the earliest of equals; None where none tells.

    The loss is that of the last evaluation before the checkpoint was written.
    """
    losses = []
    for path in found:
        try:
            loss = read_manifest(path).header.progress.val_loss
        except InputError:
            continue  # nobody will want to go back to a damaged one
        if loss is not None:
            losses.append((loss, step_of(path), path))
    return min(losses)[2] if losses else None


def prune(folder: Path, keep: int, *, keep_best: bool = False) -> None:
    """Delete all but the newest checkpoints, and what interrupted saves and deletions left behind.

    Args:
        folder: the run's checkpoints; nobody else writes there meanwhile.
        keep: how many of the newest stay.
        keep_best: the one with the lowest validation loss stays too.
    """
    remove_leftovers(folder)
    found = find_checkpoints(folder)
    doomed = found[:-keep]
    if keep_best and doomed:
        best = best_checkpoint(found)
        doomed = [path for path in doomed if path != best]
    for path in doomed:
        _delete(path)


def remove_leftovers(folder: Path) -> None:
    """Delete what writers and deleters that are gone left unfinished."""
    for leftover in folder.glob(".step_*.tmp"):
        shutil.rmtree(leftover)


def forget_after(folder: Path, step: int) -> None:
    """Delete the checkpoints of later steps, the newest first: a run that goes back takes these steps again."""
    for path in reversed(find_checkpoints(folder)):
        if step_of(path) > step:
            _delete(path)


def set_aside(checkpoint: Path) -> Path:
    """Rename a checkpoint so that it is none any more: a run that went back behind it will write that step again."""
    number, aside = 1, checkpoint.with_name(f"{checkpoint.name}.damaged")
    while aside.exists():
        number += 1
        aside = checkpoint.with_name(f"{checkpoint.name}.damaged-{number}")
    checkpoint.rename(aside)
    sync(checkpoint.parent)
    return aside


def _delete(checkpoint: Path) -> None:
    aside = checkpoint.with_name(f".{checkpoint.name}.deleted.tmp")  # half deleted, it must not pass for a checkpoint
    checkpoint.rename(aside)
    sync(checkpoint.parent)
    shutil.rmtree(aside)
