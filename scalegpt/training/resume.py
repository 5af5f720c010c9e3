"""Which checkpoint a run goes on from: the newest that is whole, and that the run itself has written."""

from dataclasses import dataclass, replace
from pathlib import Path

from scalegpt.backends import World
from scalegpt.backends.base import LossScaler
from scalegpt.checkpoint.manifest import DamagedError, Header, Progress
from scalegpt.checkpoint.reader import Checkpoint
from scalegpt.checkpoint.store import find_checkpoints, step_of
from scalegpt.config import RunConfig
from scalegpt.data.ledger import Stretch
from scalegpt.data.shards import TokenSet
from scalegpt.errors import InputError
from scalegpt.planner.batches import BatchPlan
from scalegpt.training.rundir import RunDirectory
from scalegpt.training.tokens import check_tokens, other_tokens


@dataclass(frozen=True)
class Found:
    """What there is to go on from.

    Attributes:
        checkpoint: verified; None where the run has none yet.
        damaged: newer ones that are not whole, and what is wrong with each.
        missed: the step of a newer one still that the run is known to have had.
    """

    checkpoint: Checkpoint | None
    damaged: tuple[tuple[Path, str], ...] = ()
    missed: int | None = None

    @property
    def notes(self) -> list[str]:
        """What the user is told of the damaged ones and of those that are gone."""
        assert self.checkpoint is not None or not self.damaged
        gone = [] if self.missed is None else [f"the checkpoint of step {self.missed} is gone"]
        where = self.checkpoint.path if self.checkpoint is not None else None
        return [
            f"warning: {reason}; going back to {where}, the last good checkpoint"
            for reason in (*gone, *(reason for _, reason in self.damaged))
        ]


def newest_whole_checkpoint(directory: RunDirectory, world: World, *, trusted: bool) -> Found:
    """Find and verify the checkpoint to go on from; all ranks must call it together, and share the reading.

    Args:
        directory: the run's.
        world: the ranks.
        trusted: take a checkpoint that another run has written.

    Raises:
        InputError: there are checkpoints, but none that is whole; or one that is of another version, or of another run; or
            the run is known to have had some, and they are gone.
    """
    candidates, run, known = world.on_first(
        lambda: (find_checkpoints(directory.checkpoints), directory.read_id(), directory.read_newest_step())
    )
    missed = known if known is not None and (not candidates or step_of(candidates[-1]) < known) else None
    damaged: list[tuple[Path, str]] = []
    for path in reversed(candidates):
        checkpoint, reason = verified(path, world)
        if checkpoint is None:
            damaged.append((path, reason))
            continue
        if checkpoint.manifest.header.run != run and not trusted:
            raise InputError(
                f"{path} was not written by this run; add --trust_checkpoint if you know where it comes from, "
                "or --fresh to start anew beside it"
            )
        return Found(checkpoint, tuple(damaged), missed)
    if damaged:
        several = f"none of the {len(damaged)} checkpoints is whole: " if len(damaged) > 1 else ""
        raise InputError(f"{several}{damaged[0][1]}, and there is no earlier one; --fresh starts anew beside this run")
    if missed is not None:
        raise InputError(
            f"{directory.path} had a checkpoint of step {missed}, and there is none in {directory.checkpoints}; "
            "put it back, or --fresh starts anew beside this run"
        )
    return Found(None)


def verified(path: Path, world: World) -> tuple[Checkpoint | None, str]:
    """The checkpoint, if every rank finds its share of the files whole; else what is wrong. All must call it together.

    Raises:
        InputError: it is whole, but nothing that we can read.
    """
    checkpoint, problem = None, None
    try:
        checkpoint = Checkpoint.open(path)
        checkpoint.verify(rank=world.rank, size=world.size)
    except InputError as error:
        problem = error
    problems = [each for each in world.gather(problem) if each is not None]
    for each in problems:
        if not isinstance(each, DamagedError):
            raise each
    if problems or checkpoint is None:
        return None, str(problems[0])
    checkpoint.accept()
    return checkpoint, ""


def starting_point(
    found: Found, directory: RunDirectory, run: RunConfig, data: TokenSet, digest: str, *, allowed: frozenset[str]
) -> tuple[Progress, dict[str, str]]:
    """Where a run begins or goes on, and what of its tokens is otherwise than before.

    Args:
        found: the checkpoint to go on from.
        directory: the run's.
        run: the run.
        data: what it trains on now.
        digest: SHA-256 of the data.
        allowed: what may have changed.

    Raises:
        InputError: the checkpoint was trained on other tokens, and that is not allowed.
    """
    if found.checkpoint is None:
        return Progress(step=0, tokens=0), {}
    header = found.checkpoint.manifest.header
    others = other_tokens(header, data, digest, directory.ledger.stretch_of(header.progress.step))
    check_tokens(found.checkpoint.path, run, others.keys() - allowed, others)
    return _with_scale(header, run), others


def _with_scale(header: Header, run: RunConfig) -> Progress:
    """Where a checkpoint left the run; a changed precision begins with its own loss scale."""
    precision = run.train.precision
    if header.config["train"].get("precision", precision) == precision:
        return header.progress
    return replace(header.progress, loss_scale=LossScaler.for_precision(precision).scale, good_steps=0)


def first_stretch(run: RunConfig, plan: BatchPlan, data: TokenSet, digest: str, progress: Progress) -> Stretch:
    """From which window on the next steps take theirs."""
    return Stretch(
        first_step=progress.step + 1,
        first_window=progress.sequences,
        windows_per_step=plan.sequences,
        block_size=plan.block_size,
        seed=run.train.seed,
        tokens=len(data.train),
        file=str(data.files["train"].path.absolute()),
        data=digest,
        reason="resumed with a change" if progress.step else "start",
    )
