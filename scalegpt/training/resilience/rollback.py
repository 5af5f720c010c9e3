"""Rollback after a loss spike: an earlier checkpoint, and later data.

The cause of a spike may be in the weights before the loss shows it. So the run goes back to a checkpoint from before the
steps by which the spike was measured. Steps and schedule continue from the checkpoint, the data from after the spike: the
windows of the steps in between, and those of the spike, are skipped.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from scalegpt.backends import Backend, World
from scalegpt.backends.base import WEIGHT
from scalegpt.checkpoint import store
from scalegpt.checkpoint.manifest import Progress
from scalegpt.checkpoint.reader import Checkpoint
from scalegpt.config import TrainConfig
from scalegpt.data.ledger import Stretch
from scalegpt.errors import RunError
from scalegpt.training.resilience.guards import Spike
from scalegpt.training.runs.directory import RunDirectory
from scalegpt.training.runs.files import writing
from scalegpt.training.runs.metrics_file import History, read_history
from scalegpt.training.runs.resume import verified


@dataclass(frozen=True)
class RollbackTarget:
    """What a run rolls back to.

    Attributes:
        checkpoint: the one to load.
        progress: the checkpoint's, with the data after the spike.
        stretch: the data that the next steps consume.
        history: what ``metrics.jsonl`` says of the steps up to the checkpoint's.
    """

    checkpoint: Path
    progress: Progress
    stretch: Stretch
    history: History


def restore(backend: Backend, checkpoint: Checkpoint, progress: Progress) -> None:
    """Give a backend the state that a verified checkpoint holds; all ranks must call it together.

    Where another optimizer wrote it, only the weights are read: all moments begin at zero. The count of steps continues,
    so that resuming once more gives the same run; AdamW's updates are then smaller at first, by (1 - β₁)/√(1 - β₂).
    """
    optimizer = checkpoint.manifest.header.train.get("optimizer", "adamw")

    def read(name: str, key: str, start: int, count: int) -> Tensor:
        restarts = key != WEIGHT and optimizer != backend.run.train.optimizer
        return torch.zeros(count) if restarts else checkpoint.read(name, key, start, count)

    # The optimizer does not count skipped steps.
    backend.load_pieces(read, progress.step - progress.skipped_steps)
    backend.load_scaler(progress.loss_scale, progress.good_steps)


def rollback_candidates(folder: Path, spike: Spike, window: int) -> list[Path]:
    """The checkpoints from before a spike, the preferred one first.

    First come those that are older than the spike's window of steps, newest first, then the others, oldest first.
    """
    found = [path for path in store.find_checkpoints(folder) if store.step_of(path) < spike.step]
    older = [path for path in found if store.step_of(path) < spike.step - window]
    return [*reversed(older), *found[len(older) :]]


def find_target(folder: Path, spike: Spike, window: int, world: World, say: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint to roll back to, verified; all ranks must call it together.

    Returns:
        None where there is no checkpoint from before the spike.

    Raises:
        RunError: there are some, but none is whole.
        UnreadableError: one cannot be read now.
    """
    reasons: list[str] = []
    for path in world.on_first(lambda: rollback_candidates(folder, spike, window)):
        checkpoint, reason = verified(path, world)
        if checkpoint is not None:
            return checkpoint
        say(f"warning: {reason}; the run does not go back to it")
        reasons.append(reason)
    if reasons:
        raise RunError(f"the run cannot roll back for the {spike}: {'; '.join(reasons)}")
    return None


def check_rollbacks(spike: Spike, train: TrainConfig, rollbacks: int) -> None:
    """Refuse one rollback more than a run may make.

    Raises:
        RunError: it has made ``max_rollbacks``.
    """
    if rollbacks >= train.max_rollbacks:
        raise RunError(
            f"{spike}, after {rollbacks} rollbacks; lower --learning_rate (with --allow_change learning_rate), look at "
            "the data, or raise --max_rollbacks, and run the command again"
        )


def roll_back_files(
    directory: RunDirectory, spike: Spike, checkpoint: Checkpoint, now: Progress, stretch: Stretch, window: int
) -> RollbackTarget:
    """Take a run's files back to an earlier checkpoint; first rank only. All ranks load the state afterwards.

    If it is interrupted, the run resumes from that checkpoint or a later one, meets the same spike, and rolls back again.

    Args:
        directory: of the run; its metrics must not be open.
        spike: the reason.
        checkpoint: the verified one to roll back to.
        now: the progress including the step of the spike.
        stretch: the last line of the ledger.
        window: number of steps by which spikes are measured.

    Raises:
        RunError: a file cannot be written.
    """
    then = checkpoint.manifest.header.progress
    place = then.sequences
    progress = replace(
        then,
        sequences=now.sequences,
        left_out=then.left_out + now.sequences - place,
        rollbacks=now.rollbacks + 1,
    )
    with writing(directory.checkpoints):
        store.forget_after(directory.checkpoints, then.step)
    history = read_history(directory.metrics, then.step, window)
    directory.forget_after(history)
    later = replace(
        stretch,
        first_step=then.step + 1,
        first_window=now.sequences,
        reason=f"rolled back: {spike}; windows {place} to {now.sequences - 1} are skipped",
    )
    with writing(directory.ledger.path):
        directory.ledger.append(later)
    return RollbackTarget(checkpoint.path, progress, later, history)
