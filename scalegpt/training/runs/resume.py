"""Which checkpoint a run goes on from: the newest that is whole, and that the run itself has written."""

from dataclasses import dataclass, replace
from pathlib import Path

from scalegpt.backends import World
from scalegpt.backends.base import LossScaler
from scalegpt.checkpoint.manifest import DamagedError, Header, Progress, UnreadableError
from scalegpt.checkpoint.reader import Checkpoint, read_manifest
from scalegpt.checkpoint.store import find_checkpoints, step_of
from scalegpt.config import RunConfig
from scalegpt.data.ledger import Stretch
from scalegpt.data.shards import TokenSet
from scalegpt.errors import InputError
from scalegpt.planner.batches import BatchPlan
from scalegpt.training.runs.directory import RUN_ID, RunDirectory
from scalegpt.training.runs.records import Past
from scalegpt.training.runs.same_data import check_tokens, other_tokens

MOST_NAMED = 6
"""Of a run's checkpoints so many are named in a message."""

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
        earlier: the one before it, whole or not.
        replaced: newer ones that the user asked to go back behind.
    """

    checkpoint: Checkpoint | None
    damaged: tuple[tuple[Path, str], ...] = ()
    missed: int | None = None
    past: Past = NO_PAST
    earlier: Path | None = None
    replaced: tuple[Path, ...] = ()

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
        notes += [f"{path} is set aside: the run goes back behind it" for path in self.replaced]
        return [*notes, *self._suspicion()]

    def _suspicion(self) -> list[str]:
        """A warning where every step since the checkpoint was skipped: its weights may be ruined."""
        first, assured = self.past.skipped_from, self.checkpoint
        if first is None or assured is None or self.replaced or first != assured.manifest.header.progress.step + 1:
            return []
        steps = f"steps {first} to {self.past.steps}" if self.past.steps > first else f"step {first}"
        way = "there is no earlier one"
        if self.earlier is not None:
            way = f"if they are skipped again, --resume_step {step_of(self.earlier)} goes back to {self.earlier}"
        return [f"warning: {steps}, all after {assured.path}, were skipped, so its weights may be ruined; {way}"]


def newest_whole_checkpoint(directory: RunDirectory, world: World, *, trusted: bool, step: int | None = None) -> Found:
    """Find and verify the checkpoint to go on from; all ranks must call it together, and share the reading.

    Args:
        directory: the run's.
        world: the ranks.
        trusted: take a checkpoint that another run has written.
        step: take the checkpoint of this step, and no other.

    Raises:
        InputError: there are checkpoints, but none that is whole; or one that is of another version, or of another run; or
            the run is known to have had some, and they are gone; or there is none of the step that was asked for.
        UnreadableError: the newest that may be whole cannot be read now.
    """
    candidates, run, past = world.on_first(
        lambda: (find_checkpoints(directory.checkpoints), directory.read_id(), directory.read_past())
    )
    known = past.newest
    missed = known if known is not None and (not candidates or step_of(candidates[-1]) < known) else None
    replaced: tuple[Path, ...] = ()
    if step is not None:
        candidates, replaced = _of_step(directory, candidates, step)
        missed = None
    damaged: list[tuple[Path, str]] = []
    for path in reversed(candidates):
        earlier = next((each for each in reversed(candidates) if step_of(each) < step_of(path)), None)
        try:
            checkpoint, reason = verified(path, world)
        except UnreadableError as error:
            instead = f"; or --resume_step {step_of(earlier)} goes back to {earlier}" if earlier else ""
            raise UnreadableError(f"{error}{instead}") from error
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
        return Found(checkpoint, tuple(damaged), missed, past, earlier, replaced)
    if damaged and step is not None:
        raise InputError(f"{damaged[0][1]}; give another --resume_step, or leave it out")
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


def _of_step(directory: RunDirectory, found: list[Path], step: int) -> tuple[list[Path], tuple[Path, ...]]:
    """The checkpoint of a step, and those after it.

    Raises:
        InputError: there is none.
    """
    if step not in map(step_of, found):
        there = f"it has {', '.join(str(step_of(path)) for path in found[-MOST_NAMED:])}" if found else "it has none"
        raise InputError(f"resume_step: {directory.path} has no checkpoint of step {step}; {there}")
    return [path for path in found if step_of(path) == step], tuple(path for path in found if step_of(path) > step)


def way_back(found: list[Path], first_skipped: int, again: str) -> str:
    """Where a run whose last steps were all skipped can resume from, in words.

    The step before them may have ruined the weights: it was judged by the loss before it. So a checkpoint is good if a step
    after its own was taken, and another followed.

    Args:
        found: the run's checkpoints, oldest first.
        first_skipped: the first of the steps.
        again: what resumes the run.
    """
    good = [path for path in found if step_of(path) < first_skipped - 1 and _is_usable(path)]
    if not found:
        return f"no checkpoint was complete; {again} begins at the start"
    if not good:
        newest = step_of(found[-1])
        return (
            f"the checkpoint of step {newest} may hold ruined weights, and there is no whole one before it: --fresh starts "
            "anew beside this run"
        )
    step = step_of(good[-1])
    if good[-1] == found[-1]:
        return f"{again} resumes from the checkpoint of step {step}, from before them"
    return (
        f"the checkpoint of step {step_of(found[-1])} may hold ruined weights: to go back to the one of step {step}, add "
        f"--resume_step {step} to the command"
    )


def _is_usable(path: Path) -> bool:
    try:
        read_manifest(path)
    except InputError:
        return False
    return True


def verified(path: Path, world: World) -> tuple[Checkpoint | None, str]:
    """The checkpoint, if every rank finds its share of the files whole; else what is wrong. All must call it together.

    Raises:
        UnreadableError: some rank cannot read it now.
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
    if header.train.get("precision", precision) == precision:
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


def goes_on_with(name: str, asked: str, *, fresh: bool, back: bool = False) -> str:
    """What goes on with a run once it has ended, in words: one that ``--fresh`` began has another name by then.

    Args:
        name: the run's, which is its folder's.
        asked: the name that the command gives, or its preset.
        fresh: whether the command has ``--fresh``.
        back: whether it has ``--resume_step``.
    """
    if back:
        return "the same command without --resume_step"
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
