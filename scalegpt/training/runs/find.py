"""Finds the checkpoint that a path and the setting ``checkpoint`` mean, in a run that may be training at the same time."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from scalegpt.checkpoint import store
from scalegpt.checkpoint.address import Address, Place
from scalegpt.checkpoint.inspection import Verdict, examine
from scalegpt.checkpoint.manifest import MANIFEST, WEIGHTS, DamagedError, UnreadableError
from scalegpt.checkpoint.reader import Checkpoint, is_folder, unreadable
from scalegpt.checkpoint.store import best_checkpoint, checkpoint_name, find_checkpoints, is_checkpoint
from scalegpt.config.inference import BEST, LAST
from scalegpt.errors import InputError, nearest
from scalegpt.text import shown
from scalegpt.training.runs.directory import RunDirectory
from scalegpt.training.runs.records import CHECKPOINTS

Result = TypeVar("Result")

RUN_FILES = ("run_status.json", "config.yaml", "metrics.jsonl")
"""Files that identify a run's folder before its first checkpoint."""

STEP = "step_"
"""The beginning of the name of a checkpoint's folder."""

MOST_NAMED = 6
"""The most checkpoints that a message names."""


def chosen_checkpoint(path: Place, which: str) -> Place:
    """Return the path of one checkpoint of a run, or for ``last`` the path itself, which :func:`with_newest` resolves.

    Args:
        path: a run's folder, or a checkpoint's folder; at an address, the folder of the run's checkpoints, or of one.
        which: ``last``, ``best`` (the lowest held-out loss), or the number of a step. Whether the step has a checkpoint
            is not checked.

    Raises:
        InputError: ``which`` is none of these; or it is not ``last`` and the path is not a run; or it is ``best`` and
            no checkpoint of the run has a held-out loss.
    """
    if which == LAST:
        return path
    if which != BEST and not re.fullmatch("[0-9]{1,15}", which):
        raise InputError(f"checkpoint must be a step, {BEST} or {LAST}, not {shown(which)}")
    found = checkpoints_of(path)
    if found == [path]:
        raise InputError(
            f"{path} is a checkpoint itself; give its run's folder to choose another, or omit --checkpoint"
        )
    if which != BEST:
        return found[0].with_name(checkpoint_name(int(which)))
    best = best_checkpoint(found)
    if best is None:
        raise InputError(f"no checkpoint of {path} has a held-out loss; use --checkpoint {LAST}, or a step")
    return best


def with_newest(path: Place, work: Callable[[Place], Result]) -> Result:
    """Call ``work`` with the checkpoint that a path means, and return its result.

    A run in training deletes old checkpoints. If it deletes the checkpoint in use, ``work`` is called again with the
    newest checkpoint.

    Args:
        path: a run's folder, which stands for its newest checkpoint, or a checkpoint's folder.
        work: a function of the path of the checkpoint.

    Raises:
        InputError: there is no checkpoint, the checkpoint that the user named was deleted, or ``work`` raises it.
    """
    while True:
        checkpoint = newest_checkpoint(path)
        try:
            return work(checkpoint)
        except (InputError, OSError):
            if is_folder(checkpoint):
                raise
            refuse_deleted(path, checkpoint)


def open_weights(checkpoint: Place) -> Checkpoint:
    """Open a checkpoint and verify its weights.

    Raises:
        InputError: there is no checkpoint, or it is damaged. Other checkpoints are not tried: the user did not ask for one.
    """
    with naming_earlier(checkpoint):
        stored = Checkpoint.open(checkpoint)
        stored.verify((WEIGHTS,))
    return stored


@contextmanager
def naming_earlier(checkpoint: Place) -> Iterator[None]:
    """Add a hint to an error about a damaged checkpoint that the block raises: which checkpoint to use instead.

    Raises:
        DamagedError: the checkpoint is damaged; the message ends with the hint.
    """
    try:
        yield
    except DamagedError as error:
        beside = find_checkpoints(checkpoint.parent)
        is_one_of_them = checkpoint in beside  # false for a copy whose name has no step
        kind = "an earlier" if is_one_of_them else "another"
        instead = beside[: beside.index(checkpoint)] if is_one_of_them else beside
        hint = f"give {kind} checkpoint by its path: {instead[-1]}" if instead else "there is no earlier checkpoint"
        raise DamagedError(f"{error}; {hint}") from None


def examine_all(path: Place) -> list[Verdict]:
    """Examine all checkpoints of a run, or a single one.

    Checkpoints that training deletes at the same time are skipped.

    Args:
        path: a run's folder, or a checkpoint's folder.

    Raises:
        InputError: there is no checkpoint, or the checkpoint that the user named was deleted.
    """
    verdicts: list[Verdict] = []
    while not verdicts:  # repeated if all were deleted meanwhile: then there are newer checkpoints
        for checkpoint in checkpoints_of(path):
            try:
                verdicts.append(examine(checkpoint))
            except OSError:
                if is_folder(checkpoint):
                    raise
            if not is_folder(checkpoint):
                refuse_deleted(path, checkpoint)
        verdicts = [verdict for verdict in verdicts if is_folder(verdict.path)]
    return verdicts


def refuse_deleted(path: Place, checkpoint: Place) -> None:
    """Refuse to continue if the user named the checkpoint that was deleted.

    Raises:
        InputError: the user named this checkpoint.
    """
    if checkpoint == path:
        raise InputError(
            f"{path} was deleted while it was being read; name another checkpoint, or its run for the newest"
        )


def newest_checkpoint(path: Place) -> Place:
    """Return the path itself if it is a checkpoint, else the newest checkpoint of the run at the path.

    Raises:
        InputError: the path does not exist, is neither a run nor a checkpoint, or is a run without checkpoints.
    """
    return checkpoints_of(path)[-1]


def checkpoints_of(path: Place) -> list[Place]:
    """Return the path itself if it is a checkpoint, else all checkpoints of the run at the path, oldest first.

    Raises:
        InputError: the path does not exist, cannot be read, is neither a run nor a checkpoint, or is a run without
            checkpoints.
    """
    if isinstance(path, Address):
        if is_checkpoint(path):
            return [path]
        if found := find_checkpoints(path) or find_checkpoints(path):
            return found
        raise InputError(
            f"{path} is no checkpoint and holds none; give CHECKPOINT_DIR/NAME, or one of the checkpoints in it"
        )
    try:
        is_there = path.exists()
    except OSError as error:
        raise unreadable(path, error) from error
    if not is_there:
        raise InputError(_missing(path))
    if is_checkpoint(path):
        return [path]
    # Search twice: during the first search the trainer may replace the only checkpoint with a new one.
    if found := _found_in(path) or _found_in(path):
        return found
    run = path.parent if path.name == CHECKPOINTS else path
    if _is_run(run):
        raise InputError(_no_checkpoint(run))
    raise InputError(f"{path} is neither a run nor a checkpoint{_runs_hint(path)}")


def set_aside_in(path: Place) -> list[Place]:
    """Return the checkpoints of a run that training has renamed (:func:`store.set_aside`), in the order of their names."""
    return [found for folder in _folders_of(path) for found in store.set_aside_in(folder)]


def check_run(path: Path) -> None:
    """Refuse a path that is not a run.

    Raises:
        InputError: the path does not exist, or is not a run.
    """
    if not path.exists():
        raise InputError(_missing(path))
    if not _is_run(path):
        raise InputError(f"{path} is not a run{_runs_hint(path)}")


def _folders_of(path: Place) -> list[Place]:
    """Return the folders that may hold the checkpoints of a run's folder, or of a folder of checkpoints."""
    return [path] if isinstance(path, Address) else [RunDirectory(path).checkpoints, path]


def _found_in(path: Place) -> list[Place]:
    """Return the checkpoints in a run's folder, or in a folder of checkpoints, oldest first."""
    return next((found for folder in _folders_of(path) if (found := find_checkpoints(folder))), [])


def _is_run(path: Path) -> bool:
    return (path / CHECKPOINTS).is_dir() or any((path / name).is_file() for name in RUN_FILES)


def _no_checkpoint(run: Path, name: str = "") -> str:
    """Return the error message for a run that has no checkpoint of this name, no checkpoint yet, or none any more."""
    found = [each.name for each in _found_in(run)]
    if found:
        named = found if len(found) <= MOST_NAMED else [found[0], "…", *found[2 - MOST_NAMED :]]
        return f"run {run} has no checkpoint {name}; it has {', '.join(named)}"
    step = RunDirectory(run).read_past().newest
    if step is None:
        return f"run {run} has no checkpoint yet: train it longer, or lower --checkpoint_every"
    return (
        f"run {run} had a checkpoint of step {step}, which is missing from {RunDirectory(run).checkpoints}; restore it"
    )


def _missing(path: Path) -> str:
    """Return the error message for a run or checkpoint that does not exist. It names what was probably meant."""
    folder = path.parent
    run = folder.parent if folder.name == CHECKPOINTS else folder
    if CHECKPOINTS in {path.name, folder.name} or path.name.startswith(STEP):
        if not run.exists():
            return _missing(run)
        if _is_run(run):
            return _no_checkpoint(run, path.name)
    return f"run {path} does not exist{_nearest_run(path)}"


def _nearest_run(path: Path) -> str:
    """Return a hint: the run that was probably meant, or what to do if there is none."""
    usual = Path("runs") / path
    if not path.is_absolute() and usual.is_dir():
        return f"; did you mean {usual}?"
    names = _runs_in(path.parent)
    return nearest(path.name, names) if names else "; train one first: scalegpt train --help"


def _runs_hint(path: Path) -> str:
    """Return a hint that names the runs in a folder; if there are none, the hint says which folder to give."""
    inside = _runs_in(path)
    return (
        f"; it contains these runs: {', '.join(inside)}" if inside else "; give a run's folder, for example runs/NAME"
    )


def _runs_in(folder: Path) -> list[str]:
    """Return the names of the runs and checkpoints in a folder."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if _may_be_meant(path))


def _may_be_meant(path: Path) -> bool:
    """Whether a path is a run, a checkpoint, or a folder with checkpoints. One that cannot be read is not offered."""
    try:
        has_marks = any((path / mark).exists() for mark in (CHECKPOINTS, MANIFEST, *RUN_FILES))
        return has_marks or bool(path.is_dir() and find_checkpoints(path))
    except (OSError, UnreadableError):
        return False
