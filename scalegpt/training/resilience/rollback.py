"""Going back behind a loss spike: an earlier checkpoint, later data.

What made the loss spike may be in the weights already when it is seen. So the run goes back to a checkpoint from before the
window by which the spike was measured, and on from there with the data after the spike: steps and schedule go on from the
checkpoint, and the windows of the steps in between, with those of the spike, are left out.
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
from scalegpt.training.runs.history import History, read_history
from scalegpt.training.runs.resume import verified


@dataclass(frozen=True)
class RollbackTarget:
    """Where a run goes back to.

    Attributes:
        checkpoint: what to load.
        progress: where the run stands then, the data's place being past the spike.
        stretch: the data that the next steps consume.
        history: what ``metrics.jsonl`` says of the steps up to the checkpoint's.
    """

    checkpoint: Path
    progress: Progress
    stretch: Stretch
    history: History


def restore(backend: Backend, checkpoint: Checkpoint, progress: Progress) -> None:
    """Give a backend the state that a verified checkpoint holds; all ranks must call it together.

    Where another optimizer wrote it, the weights alone: all moments begin at zero. The count of steps goes on, so that a run
    resumed once more is the same run; AdamW's first updates are then smaller, by (1 - β₁)/√(1 - β₂) at first.
    """
    theirs = checkpoint.manifest.header.train.get("optimizer", "adamw")

    def read(name: str, key: str, start: int, count: int) -> Tensor:
        restarts = key != WEIGHT and theirs != backend.run.train.optimizer
        return torch.zeros(count) if restarts else checkpoint.read(name, key, start, count)

    # The optimizer's own count leaves out the steps that were skipped.
    backend.load_pieces(read, progress.step - progress.skipped_steps)
    backend.load_scaler(progress.loss_scale, progress.good_steps)


def ways_back(folder: Path, spike: Spike, window: int) -> list[Path]:
    """The checkpoints from before a spike, those to be preferred first.

    These are the newest that is older than the spike's window of steps, those before it, and then the others, oldest first.
    """
    found = [path for path in store.find_checkpoints(folder) if store.step_of(path) < spike.step]
    older = [path for path in found if store.step_of(path) < spike.step - window]
    return [*reversed(older), *found[len(older) :]]


def whole_before(
    folder: Path, spike: Spike, window: int, world: World, say: Callable[[str], None]
) -> Checkpoint | None:
    """The checkpoint to go back to behind a spike, verified; all ranks look for it together.

    Args:
        folder: the run's checkpoints.
        spike: to go back behind.
        window: steps by which the spike was measured.
        world: the ranks.
        say: tells of those that are damaged.

    Returns:
        None where there is none from before the spike.

    Raises:
        RunError: there are some, and none is whole.
        UnreadableError: one cannot be read now.
    """
    reasons: list[str] = []
    for path in world.on_first(lambda: ways_back(folder, spike, window)):
        checkpoint, reason = verified(path, world)
        if checkpoint is not None:
            return checkpoint
        say(f"warning: {reason}; the run does not go back to it")
        reasons.append(reason)
    if reasons:
        raise RunError(f"the run cannot go back behind the {spike}: {'; '.join(reasons)}")
    return None


def check_rollbacks(spike: Spike, train: TrainConfig, rollbacks: int) -> None:
    """Refuse to go back more often than a run may.

    Raises:
        RunError: it went back as often as that.
    """
    if rollbacks >= train.max_rollbacks:
        raise RunError(
            f"{spike}, after {rollbacks} rollbacks; lower --learning_rate (with --allow_change learning_rate), look at "
            "the data, or raise --max_rollbacks, and run the command again"
        )


def go_back(
    directory: RunDirectory,
    spike: Spike,
    checkpoint: Checkpoint,
    *,
    now: Progress,
    stretch: Stretch,
    window: int,
) -> RollbackTarget:
    """Take a run's files back to an earlier checkpoint; the first rank does this, all load the state afterwards.

    Whenever this is cut short, the run goes on from the checkpoint chosen, or from one after it, meets the same spike, and
    goes back again.

    Args:
        directory: of the run; its metrics must not be open.
        spike: why.
        checkpoint: the verified one to go back to.
        now: where the run stands, the step of the spike included.
        stretch: the ledger's line in force.
        window: steps by which spikes are measured.

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
        reason=f"rolled back: {spike}; windows {place} to {now.sequences - 1} are left out",
    )
    with writing(directory.ledger.path):
        directory.ledger.append(later)
    return RollbackTarget(checkpoint.path, progress, later, history)
