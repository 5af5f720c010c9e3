"""Rollback after a loss spike: continue from an earlier checkpoint, with later data.

The weights may be damaged some steps before the loss shows it. The run therefore goes back to a checkpoint that is
older than the ``spike_window`` steps with which the spike was compared, if there is one. The step number and the
learning rate schedule continue from the checkpoint. The data continue after the spike: the windows of all steps from
the checkpoint to the spike are skipped.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scalegpt.backends import Backend, World
from scalegpt.backends.base import WEIGHT
from scalegpt.checkpoint import store
from scalegpt.checkpoint.address import Place
from scalegpt.checkpoint.manifest import Progress
from scalegpt.checkpoint.reader import Checkpoint
from scalegpt.config import TrainConfig
from scalegpt.data.windows.ledger import Stretch
from scalegpt.errors import RunError
from scalegpt.training.resilience.guards import Spike
from scalegpt.training.runs.directory import RunDirectory
from scalegpt.training.runs.files import writing
from scalegpt.training.runs.metrics_file import History, read_history
from scalegpt.training.runs.resume import verified


@dataclass(frozen=True)
class RollbackTarget:
    """The state that a run rolls back to.

    Attributes:
        checkpoint: path of the checkpoint to load.
        progress: the checkpoint's progress, with its position in the data moved behind the spike.
        stretch: the data ledger's entry (a range of steps with the same data and batch) for the next steps.
        history: what ``metrics.jsonl`` says about the steps up to the checkpoint's step.
    """

    checkpoint: Place
    progress: Progress
    stretch: Stretch
    history: History


def restore(backend: Backend, checkpoint: Checkpoint, progress: Progress) -> None:
    """Load the state of a verified checkpoint into a backend; all ranks must call it together.

    If the run now uses another optimizer than the checkpoint's, only the weights are read, and all moments begin at
    zero. The optimizer's step count still continues, since every resume computes it from the run's steps. AdamW's bias
    correction is therefore too weak for moments that begin at zero: the first update is scaled by (1 - β₁)/√(1 - β₂).
    The checkpoint of an imported model has neither moments nor steps; both begin at zero.
    """
    header = checkpoint.manifest.header
    is_imported = header.progress.step == 0 and all(
        name.startswith(f"{WEIGHT}/") for name in checkpoint.manifest.tensors
    )
    optimizer = header.train.get("optimizer", "adamw")

    def read(name: str, key: str, start: int, count: int) -> Tensor:
        restarts = key != WEIGHT and (is_imported or optimizer != backend.run.train.optimizer)
        return torch.zeros(count) if restarts else checkpoint.read(name, key, start, count)

    # The optimizer's step count leaves out skipped steps.
    backend.load_pieces(read, progress.step - progress.skipped_steps)
    backend.load_scaler(progress.loss_scale, progress.good_steps)


def rollback_candidates(folder: Place, spike: Spike, window: int) -> list[Place]:
    """List the checkpoints from before a spike, in the order in which to try them.

    First come the checkpoints older than the spike's window of steps, newest first. Then come those within the window,
    oldest first.

    Args:
        folder: the folder of the run's checkpoints.
        spike: the spike.
        window: number of recent steps with which a loss is compared.
    """
    found = [path for path in store.find_checkpoints(folder) if store.step_of(path) < spike.step]
    older = [path for path in found if store.step_of(path) < spike.step - window]
    return [*reversed(older), *found[len(older) :]]


def find_target(
    folder: Place, spike: Spike, window: int, world: World, say: Callable[[str], None]
) -> Checkpoint | None:
    """Find and verify the checkpoint to roll back to; all ranks must call it together.

    Returns:
        The checkpoint; None where there is none from before the spike.

    Raises:
        RunError: there are checkpoints from before the spike, but all are damaged.
        UnreadableError: a checkpoint cannot be read now.
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
    """Refuse a rollback beyond the ``max_rollbacks`` that a run may make.

    Raises:
        RunError: the run has already made ``max_rollbacks`` rollbacks.
    """
    if rollbacks >= train.max_rollbacks:
        raise RunError(
            f"{spike}, after {rollbacks} rollbacks; lower --learning_rate (with --allow_change learning_rate), look at "
            "the data, or raise --max_rollbacks, and run the command again"
        )


def roll_back_files(
    directory: RunDirectory, spike: Spike, checkpoint: Checkpoint, now: Progress, stretch: Stretch, window: int
) -> RollbackTarget:
    """Take a run's files back to the step of an earlier checkpoint. Rank 0 only; all ranks load the state afterwards.

    If the process ends before this is done, the next start resumes from that checkpoint or a later one, meets the same
    spike, and rolls back again.

    Args:
        directory: the run's directory; ``metrics.jsonl`` must not be open.
        spike: the spike that causes the rollback.
        checkpoint: the verified checkpoint to roll back to.
        now: the run's progress, including the step of the spike.
        stretch: the data ledger's last entry (a range of steps with the same data and batch), which covers the current step.
        window: number of recent steps with which a loss is compared.

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
