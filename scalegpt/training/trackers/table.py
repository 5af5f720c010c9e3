"""The trackers by their names. Checks and opens those that a run logs to."""

import time
from collections.abc import Callable, Collection
from importlib import import_module
from pathlib import Path
from typing import Any

from scalegpt.errors import InputError
from scalegpt.text import brief
from scalegpt.training.runs.records import RunRecords
from scalegpt.training.trackers.base import Past, Position, TrackedRun, Tracker, flat, read_entries
from scalegpt.training.trackers.feed import FOLDER, Feed
from scalegpt.training.trackers.mlflow import MLflow
from scalegpt.training.trackers.tensorboard import TensorBoard
from scalegpt.training.trackers.trackio import Trackio
from scalegpt.training.trackers.wandb import WandB

TABLE: dict[str, type[Tracker]] = {each.NAME: each for each in (TensorBoard, WandB, MLflow, Trackio)}
"""Name in ``log_to`` → the tracker."""


def check_trackers(names: Collection[str], folder: Path) -> None:
    """Refuse trackers that cannot be used, before the run writes anything.

    Args:
        names: the trackers.
        folder: the folder of all runs; it is made if a tracker keeps its record there.

    Raises:
        InputError: a tracker cannot be imported, or its settings cannot work.
    """
    for name in names:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"runs_dir {folder}: {error.strerror}; choose another --runs_dir") from None
        try:
            import_module(TABLE[name].MODULE)
        except Exception as error:  # a broken installation raises anything
            raise InputError(f"log_to {name} cannot be imported ({brief(error, 200)}); install it again") from None
        TABLE[name].check(folder)


def open_trackers(
    names: Collection[str],
    records: RunRecords,
    settings: dict[str, Any],
    plan: dict[str, Any],
    say: Callable[[str], None],
) -> list[Feed]:
    """Open a run's trackers. First cut the run's files to the step from which the run continues.

    The positions of all trackers that the run ever had, also of those that are not used now, are limited to the entries
    in the files. Otherwise a tracker that is used again later would keep steps that have since been replaced.

    Args:
        names: the trackers to log to.
        records: the run's files.
        settings: the resolved settings.
        plan: the content of ``plan.json``.
        say: prints a line.
    """
    known = list((records.path / FOLDER).glob("*.json"))
    if not names and not known:
        return []
    count = last_step = 0
    took = 0.0
    for entry in read_entries(records):
        count, last_step, took = count + 1, entry.step, entry.time
    for path in known:
        position = Position.read(path)
        if position.run is not None and position.acked > count:
            position.limited(count).write(path)
    run = TrackedRun(records, flat(settings), flat(plan))
    past = Past(records, count, last_step, time.time() - took)
    return [Feed(TABLE[name], run, past, say) for name in names]
