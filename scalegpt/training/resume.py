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
from scalegpt.training.rundir import RUN_ID, Past, RunDirectory
from scalegpt.training.tokens import check_tokens, other_tokens

NO_PAST = Past(newest=None, is_told=True, steps=0, was_begun=False)
"""That of a run that begins."""


@dataclass(frozen=True)
class Found:
    """What there is to go on from.

    Attributes:
        checkpoint: verified; None where the run has none yet.
        damaged: newer ones that are not whole, and what is wrong with each.
        missed: the step of a newer one still that the run is known to have had.
        past: what the run's files say besides.
    """

    checkpoint: Checkpoint | None
    damaged: tuple[tuple[Path, str], ...] = ()
    missed: int | None = None
    past: Past = NO_PAST

    @property
    def notes(self) -> list[str]:
        """What the user is told of the damaged ones, of those that are gone, and where there was none yet."""
        assert self.checkpoint is not None or not self.damaged
        if self.checkpoint is None:
            steps = self.past.steps
            if steps:
                return [f"begins again: it ended after {steps} steps, before its first checkpoint"]
            return ["begins again: nothing here tells of a step or a checkpoint before"] if self.past.was_begun else []
        gone = [] if self.missed is None else [f"the checkpoint of step {self.missed} is gone"]
        notes = [
            f"warning: {reason}; going back to {self.checkpoint.path}, the last good checkpoint"
            for reason in (*gone, *(reason for _, reason in self.damaged))
        ]
        if not self.past.is_told:
            notes.append(
                "warning: run_status.json is missing or cannot be read, so nobody would miss a newer checkpoint than "
                f"{self.checkpoint.path}"
            )
        return notes


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
    candidates, run, past = world.on_first(
        lambda: (find_checkpoints(directory.checkpoints), directory.read_id(), directory.read_past())
    )
    known = past.newest
    missed = known if known is not None and (not candidates or step_of(candidates[-1]) < known) else None
    damaged: list[tuple[Path, str]] = []
    for path in reversed(candidates):
        checkpoint, reason = verified(path, world)
        if checkpoint is None:
            damaged.append((path, reason))
            continue
        if checkpoint.manifest.header.run != run and not trusted:
            whose = (
                f"nothing tells whether this run wrote {path}: {directory.path / RUN_ID} is missing"
                if run is None
                else f"{path} was not written by this run"
            )
            raise InputError(
                f"{whose}; add --trust_checkpoint if you know where it comes from, or --fresh to start anew beside it"
            )
        return Found(checkpoint, tuple(damaged), missed, past)
    if damaged:
        several = f"none of the {len(damaged)} checkpoints is whole: " if len(damaged) > 1 else ""
        reasons = "; ".join(reason for _, reason in damaged)
        raise InputError(f"{several}{reasons}, and there is no other checkpoint; --fresh starts anew beside this run")
    if missed is not None:
        raise InputError(
            f"{directory.path} had a checkpoint of step {missed}, and there is none in {directory.checkpoints}; "
            "put it back, or --fresh starts anew beside this run"
        )
    if past.steps and not past.is_told:
        raise InputError(
            f"{directory.path} has taken {past.steps} steps, but there is no checkpoint in {directory.checkpoints}, and "
            f"{directory.status} does not say whether there was one: put them back, or --fresh starts anew beside this run"
        )
    return Found(None, past=past)


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
    check_tokens(found.checkpoint.path, run, allowed, others)
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


def goes_on_with(name: str, asked: str, *, fresh: bool) -> str:
    """What goes on with a run once it has ended, in words: one that ``--fresh`` began has another name by then.

    Args:
        name: the run's, which is its folder's.
        asked: the name that the command gives, or its preset.
        fresh: whether the command has ``--fresh``.
    """
    if not fresh:
        return "the same command"
    return f"the same command {'without' if name == asked else f'with --model_name {name} instead of'} --fresh"


def resumed_line(checkpoint: Path, progress: Progress, total: int, taken: int) -> str:
    """Where a run goes on, and which of its steps come again.

    Args:
        checkpoint: from where.
        progress: what it says.
        total: steps of the run.
        taken: the last step that was taken before.
    """
    first = progress.step + 1
    several = f"steps {first} to {taken} were taken before, and come"
    lost = f"step {first} was taken before, and comes" if taken == first else several
    again = f"; {lost} again" if taken >= first else ""
    left_out = f"; {progress.left_out:,} windows of the data were left out before" if progress.left_out else ""
    return f"resumed  from {checkpoint}, step {progress.step} of {total}{again}{left_out}"
