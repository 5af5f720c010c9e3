"""Chooses and locks a run's folder, finds the checkpoint to resume from, and writes the folder's first files."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalegpt.backends import World
from scalegpt.checkpoint import store
from scalegpt.checkpoint.manifest import Progress
from scalegpt.config import RunConfig
from scalegpt.data.windows.ledger import Stretch
from scalegpt.errors import InputError
from scalegpt.planner.batches import BatchPlan
from scalegpt.planner.memory.states import training_bytes
from scalegpt.storage import check_space, remove_temporaries
from scalegpt.training.request import Request
from scalegpt.training.resilience.stopping import StopRequest
from scalegpt.training.runs.directory import RunDirectory
from scalegpt.training.runs.files import try_writing, write_whole, writing
from scalegpt.training.runs.launch_marks import launch_marks, note_going_back
from scalegpt.training.runs.metrics_file import History, read_history
from scalegpt.training.runs.mirror import Mirror
from scalegpt.training.runs.resume import CheckpointChoice, choose_checkpoint, starting_progress
from scalegpt.training.runs.summary import total_steps
from scalegpt.training.setup.data import ReadyData
from scalegpt.training.setup.machines import check_shared


@dataclass(frozen=True)
class Start:
    """The folder and the checkpoint from which a run starts or resumes.

    Attributes:
        directory: the run's directory, locked.
        choice: the checkpoint that the run resumes from, if there is one.
        progress: the checkpoint's progress; step 0 without a checkpoint.
        history: what ``metrics.jsonl`` says about the steps up to the progress.
        changes: settings and data that differ from the run so far, each as ``old → new``.
        notes: lines to print.
    """

    directory: RunDirectory
    choice: CheckpointChoice
    progress: Progress
    history: History
    changes: dict[str, str]
    notes: tuple[str, ...]


def open_run(
    request: Request, run: RunConfig, batch: BatchPlan, data: ReadyData, world: World, stop: StopRequest
) -> Start:
    """Choose and lock the run's folder, and find the checkpoint to resume from; all ranks must call it together.

    Raises:
        InputError: the folder holds another run, or cannot be written; or that of the checkpoints is not there on all
            machines; or the disk has too little space; or another process trains the run; or the run has checkpoints, but
            cannot resume from any of them.
        Stopped: a rank was asked to stop.
    """
    directory, changes = world.on_first(lambda: _claim(request, run, batch, world.size))
    stop.check(world)
    # Lock before the checkpoints are read: another process may be writing them.
    weaknesses = world.on_first(directory.lock)
    try:
        check_shared(directory, world)
        choice = choose_checkpoint(directory, world, trusted=request.trust_checkpoint, step=request.resume_step)
        progress, token_changes = world.on_first(
            lambda: starting_progress(choice, directory, run, data.tokens, data.digest, allowed=request.allow_change)
        )
        history = world.on_first(lambda: read_history(directory.metrics, progress.step, run.train.spike_window))
        gaps = world.on_first(lambda: directory.gaps(history))
    except BaseException:
        directory.unlock()
        raise
    notes = (*(f"warning: {each}" for each in weaknesses), *choice.notes, *(f"warning: {gap}" for gap in gaps))
    return Start(directory, choice, progress, history, {**changes, **token_changes}, notes)


def _claim(request: Request, run: RunConfig, batch: BatchPlan, ranks: int) -> tuple[RunDirectory, dict[str, str]]:
    """Choose the run's directory, and check that it is writable and has enough disk space. Rank 0 only.

    Returns:
        The directory, and the settings that differ from the run so far, each as ``old → new``.
    """
    directory = RunDirectory.choose(request.runs_dir, run, fresh=request.fresh, allowed=request.allow_change)
    parent = request.runs_dir
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"runs_dir {parent}: {error.strerror}; choose another --runs_dir") from None
    if not os.access(parent, os.W_OK):
        raise InputError(f"runs_dir {parent} cannot be written; choose another --runs_dir")
    try_writing(directory.path)
    if isinstance(directory.checkpoints, Path):
        try_writing(directory.checkpoints)
        _check_space(directory.checkpoints, run, batch)
    return directory, directory.changes(run, ranks=ranks)


def _check_space(folder: Path, run: RunConfig, batch: BatchPlan) -> None:
    """Refuse a run whose checkpoints do not fit on the disk: those that are kept, and one more while one is replaced.

    Raises:
        InputError: the disk has too few free bytes.
    """
    train = run.train
    ever = 1 + (total_steps(train, batch) // train.checkpoint_every if train.checkpoint_every else 0)
    more = min(ever, train.keep_checkpoints + train.keep_best + 1) - len(store.find_checkpoints(folder))
    states = training_bytes(run.model, train)
    check_space(folder, max(0, more) * (sum(states.values()) - states["gradients"]))


def write_start(
    start: Start,
    run: RunConfig,
    plan: dict[str, Any],
    stretch: Stretch,
    resume_step: int | None,
    kept: Mapping[str, bytes],
) -> None:
    """Clean the run's folder, and write the files that it needs before the first step. Rank 0 only, which holds the lock.

    If the run has no steps left, only cleans the folder.

    Args:
        start: where the run starts.
        run: the configuration.
        plan: the content of ``plan.json``.
        stretch: the data ledger's entry (a range of steps with the same data and batch) for the next steps.
        resume_step: step that ``--resume_step`` asks for; None: not given.
        kept: files that make the run independent of their originals, as name → content: the tokenizer's, and those of
            the model with which the run began.
    """
    directory, step = start.directory, start.progress.step
    with writing(directory.path):
        remove_temporaries(directory.path)
        store.remove_leftovers(directory.checkpoints)  # the next pruning reports what cannot be deleted
        store.remove_amendments(directory.checkpoints)
        for path in store.named_as_checkpoints(directory.checkpoints):
            if store.step_of(path) > step:  # the run takes and saves this step again
                store.set_aside(path, store.REPLACED if path in start.choice.replaced else store.DAMAGED)
        if resume_step is not None:
            note_going_back(directory.path, resume_step)
    if step >= plan["steps"] > 0 and directory.config.is_file():
        return
    directory.create(run, plan, launch_marks())
    for name, content in kept.items():
        with writing(directory.path / name):
            write_whole(directory.path / name, content)
    directory.forget_after(start.history)
    with writing(directory.ledger.path):
        directory.ledger.append(stretch)
    Mirror(directory).update()
