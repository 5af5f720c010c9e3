"""Where a run starts: its folder, claimed and locked, and the checkpoint that it resumes from."""

import os
from dataclasses import dataclass
from typing import Any

from scalegpt.backends import World
from scalegpt.checkpoint import store
from scalegpt.checkpoint.manifest import Progress
from scalegpt.config import RunConfig
from scalegpt.data.ledger import Stretch
from scalegpt.errors import InputError
from scalegpt.planner.batches import BatchPlan
from scalegpt.planner.memory.states import training_bytes
from scalegpt.storage import check_space, remove_temporaries
from scalegpt.training.request import Request
from scalegpt.training.resilience.stopping import StopRequest
from scalegpt.training.runs.directory import RunDirectory
from scalegpt.training.runs.files import try_writing, writing
from scalegpt.training.runs.launch_marks import launch_marks, note_going_back
from scalegpt.training.runs.metrics_file import History, read_history
from scalegpt.training.runs.resume import CheckpointChoice, choose_checkpoint, starting_progress
from scalegpt.training.runs.summary import total_steps
from scalegpt.training.setup.data import ReadyData


@dataclass(frozen=True)
class Start:
    """Where a run starts or resumes.

    Attributes:
        directory: the run's, locked.
        choice: the checkpoint that it resumes from, if there is one.
        progress: what that says; step 0 without one.
        history: what ``metrics.jsonl`` says up to that step.
        changes: what differs from the run so far, each as ``old → new``.
        notes: lines for the user.
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
    """Claim and lock the run's folder, and find its checkpoint; all ranks must call it together.

    Raises:
        InputError: the folder holds another run, cannot be written or lacks room, or another process trains the run; or no
            checkpoint can be resumed from.
        Stopped: a rank was asked to stop.
    """
    directory, changes = world.on_first(lambda: _claim(request, run, batch, world.size))
    stop.check(world)
    # Before the checkpoints are looked at: another process may be writing them.
    weaknesses = world.on_first(directory.lock)
    try:
        choice = choose_checkpoint(directory, world, trusted=request.trust_checkpoint, step=request.resume_step)
        progress, token_changes = world.on_first(
            lambda: starting_progress(choice, directory, run, data.tokens, data.digest, allowed=request.allow_change)
        )
    except InputError:
        directory.unlock()
        raise
    history = world.on_first(lambda: read_history(directory.metrics, progress.step, run.train.spike_window))
    gaps = world.on_first(lambda: directory.gaps(history))
    notes = (*(f"warning: {each}" for each in weaknesses), *choice.notes, *(f"warning: {gap}" for gap in gaps))
    return Start(directory, choice, progress, history, {**changes, **token_changes}, notes)


def _claim(request: Request, run: RunConfig, batch: BatchPlan, ranks: int) -> tuple[RunDirectory, dict[str, str]]:
    """The run's directory, which can be written and has room, and what differs from the run so far; first rank only."""
    directory = RunDirectory.choose(request.runs_dir, run, fresh=request.fresh, allowed=request.allow_change)
    parent = request.runs_dir
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"runs_dir {parent}: {error.strerror}; choose another --runs_dir") from None
    if not os.access(parent, os.W_OK):
        raise InputError(f"runs_dir {parent} cannot be written; choose another --runs_dir")
    try_writing(directory.path, directory.checkpoints)
    _check_space(directory, run, batch)
    return directory, directory.changes(run, ranks=ranks)


def _check_space(directory: RunDirectory, run: RunConfig, batch: BatchPlan) -> None:
    """Refuse a run whose checkpoints the disk cannot hold: those it keeps, and one more while the oldest is replaced.

    Raises:
        InputError: too little is free.
    """
    train = run.train
    ever = 1 + (total_steps(train, batch) // train.checkpoint_every if train.checkpoint_every else 0)
    more = min(ever, train.keep_checkpoints + train.keep_best + 1) - len(store.find_checkpoints(directory.checkpoints))
    states = training_bytes(run.model, train)
    check_space(directory.checkpoints, max(0, more) * (sum(states.values()) - states["gradients"]))


def write_start(start: Start, run: RunConfig, plan: dict[str, Any], stretch: Stretch, resume_step: int | None) -> None:
    """Clean the folder and write what belongs there before the first step; first rank only, which has the lock.

    A finished run keeps its files.
    """
    directory, step = start.directory, start.progress.step
    with writing(directory.path):
        remove_temporaries(directory.path)
        store.remove_leftovers(directory.checkpoints)  # what it cannot delete is reported with the next pruning
        store.remove_amendments(directory.checkpoints)
        for path in store.named_as_checkpoints(directory.checkpoints):
            if store.step_of(path) > step:  # that step will be saved again
                store.set_aside(path, store.REPLACED if path in start.choice.replaced else store.DAMAGED)
        if resume_step is not None:
            note_going_back(directory.path, resume_step)
    if step >= plan["steps"] > 0 and directory.config.is_file():
        return
    directory.create(run, plan, launch_marks())
    directory.forget_after(start.history)
    with writing(directory.ledger.path):
        directory.ledger.append(stretch)
