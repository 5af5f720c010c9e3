"""Chooses the checkpoint from which a run resumes: the newest one that is whole and that the run itself has written."""

from dataclasses import dataclass, replace

from scalegpt.backends import World
from scalegpt.backends.base import LossScaler
from scalegpt.checkpoint.address import Place
from scalegpt.checkpoint.manifest import DamagedError, Header, Progress, UnreadableError
from scalegpt.checkpoint.reader import Checkpoint, read_manifest
from scalegpt.checkpoint.store import find_checkpoints, step_of
from scalegpt.config import RunConfig
from scalegpt.config.run import DATA
from scalegpt.data.tokenizers import Tokenizer
from scalegpt.data.windows.ledger import Stretch, change_of_sources, ledger_sources
from scalegpt.data.windows.mixture import Mixture
from scalegpt.errors import InputError
from scalegpt.planner.batches import BatchPlan
from scalegpt.training.runs.changes import allow_change
from scalegpt.training.runs.directory import RUN_ID, RunDirectory
from scalegpt.training.runs.records import Past

MOST_NAMED = 6
"""Largest number of a run's checkpoints that one message names."""


@dataclass(frozen=True)
class CheckpointChoice:
    """The checkpoint that a run resumes from, and what was found about its other checkpoints.

    Attributes:
        checkpoint: the verified checkpoint to resume from; None where the run has none yet.
        past: what the run's other files say about its past.
        damaged: newer checkpoints that are not whole, as (path, what is wrong).
        missing: step of a newer checkpoint that the run's files mention and that is gone; None: none is gone.
        earlier: the newest checkpoint older than ``checkpoint``, whole or not; None: there is none.
        replaced: newer checkpoints that are set aside because the user asked for an earlier step.
    """

    checkpoint: Checkpoint | None
    past: Past
    damaged: tuple[tuple[Place, str], ...] = ()
    missing: int | None = None
    earlier: Place | None = None
    replaced: tuple[Place, ...] = ()

    @property
    def notes(self) -> list[str]:
        """Lines to print: on checkpoints that are damaged, missing or replaced, or on a start from the beginning."""
        assert self.checkpoint is not None or not self.damaged
        if self.checkpoint is None:
            steps = self.past.last_step
            if steps:
                return [f"the run starts from the beginning: it ended after {steps} steps, before its first checkpoint"]
            return (
                ["the run starts from the beginning: its files have no step and no checkpoint"]
                if self.past.was_begun
                else []
            )
        missing = [] if self.missing is None else [f"the checkpoint of step {self.missing} is missing"]
        notes = [
            f"warning: {reason}; going back to {self.checkpoint.path}, the last good checkpoint"
            for reason in (*missing, *(reason for _, reason in self.damaged))
        ]
        if not self.past.has_status:
            notes.append(
                "warning: run_status.json is missing or cannot be read, so the run may have had a newer checkpoint than "
                f"{self.checkpoint.path}"
            )
        notes += [f"{path} is set aside: the run goes back to an earlier step" for path in self.replaced]
        return [*notes, *self._suspicion()]

    def _suspicion(self) -> list[str]:
        """A warning that the weights may be ruined, if every step since the checkpoint was skipped; else empty."""
        first, chosen = self.past.skipped_since, self.checkpoint
        if first is None or chosen is None or self.replaced or first != chosen.manifest.header.progress.step + 1:
            return []
        steps = f"steps {first} to {self.past.last_step}" if self.past.last_step > first else f"step {first}"
        advice = "there is no earlier checkpoint"
        if self.earlier is not None:
            advice = f"if they are skipped again, --resume_step {step_of(self.earlier)} goes back to {self.earlier}"
        return [f"warning: {steps}, all after {chosen.path}, were skipped, so its weights may be ruined; {advice}"]


def choose_checkpoint(
    directory: RunDirectory, world: World, *, trusted: bool, step: int | None = None
) -> CheckpointChoice:
    """Find and verify the checkpoint to resume from; all ranks must call it together, and each verifies a share of the files.

    Args:
        directory: the run's directory.
        world: the ranks.
        trusted: whether to accept a checkpoint that another run has written.
        step: take the checkpoint of this step; None: take the newest whole one.

    Raises:
        InputError: there are checkpoints, but all are damaged; or the chosen one is of another version or another run;
            or the run's files mention checkpoints that are gone; or the step that was asked for has no checkpoint.
        UnreadableError: a checkpoint that may be whole cannot be read now, and no newer one is whole.
    """
    candidates, run_id, past = world.on_first(
        lambda: (find_checkpoints(directory.checkpoints), directory.read_id(), directory.read_past())
    )
    missing = past.newest
    if missing is not None and candidates and step_of(candidates[-1]) >= missing:
        missing = None
    replaced: tuple[Place, ...] = ()
    if step is not None:
        candidates, replaced = _of_step(directory, candidates, step)
        missing = None
    damaged: list[tuple[Place, str]] = []
    for path in reversed(candidates):
        earlier = next((each for each in reversed(candidates) if step_of(each) < step_of(path)), None)
        try:
            checkpoint, reason = verified(path, world)
        except UnreadableError as error:
            advice = f"; or --resume_step {step_of(earlier)} goes back to {earlier}" if earlier else ""
            raise UnreadableError(f"{error}{advice}") from error
        if checkpoint is None:
            damaged.append((path, reason))
            continue
        if not trusted:
            _check_writer(checkpoint, directory, run_id)
        return CheckpointChoice(checkpoint, past, tuple(damaged), missing, earlier, replaced)
    _refuse_lost(directory, damaged, missing, past, step)
    return CheckpointChoice(None, past)


def _of_step(directory: RunDirectory, found: list[Place], step: int) -> tuple[list[Place], tuple[Place, ...]]:
    """Return the checkpoint of a step, as a list of one, and the checkpoints of later steps.

    Raises:
        InputError: the step has no checkpoint.
    """
    if step not in map(step_of, found):
        there = f"it has {', '.join(str(step_of(path)) for path in found[-MOST_NAMED:])}" if found else "it has none"
        raise InputError(f"resume_step: {directory.path} has no checkpoint of step {step}; {there}")
    return [path for path in found if step_of(path) == step], tuple(path for path in found if step_of(path) > step)


def _check_writer(checkpoint: Checkpoint, directory: RunDirectory, run_id: str | None) -> None:
    """Refuse a checkpoint that another run has written.

    Raises:
        InputError: the checkpoint's run id is not this run's.
    """
    if checkpoint.manifest.header.run == run_id:
        return
    whose = f"{checkpoint.path} was not written by this run"
    if run_id is None:
        whose = f"{checkpoint.path} may be another run's: {directory.path / RUN_ID} is missing"
    raise InputError(
        f"{whose}; add --trust_checkpoint if you know where it comes from, or --fresh to start a new run beside this one"
    )


def _refuse_lost(
    directory: RunDirectory, damaged: list[tuple[Place, str]], missing: int | None, past: Past, step: int | None
) -> None:
    """Refuse to start from the beginning where the run had checkpoints, or may have had some.

    Raises:
        InputError: the checkpoints are damaged or gone.
    """
    if damaged and step is not None:
        raise InputError(f"{damaged[0][1]}; give another --resume_step, or omit it")
    if damaged:
        several = f"none of the {len(damaged)} checkpoints is whole: " if len(damaged) > 1 else ""
        reasons = "; ".join(reason for _, reason in damaged)
        raise InputError(
            f"{several}{reasons}, and there is no other checkpoint; --fresh starts a new run beside this one"
        )
    if missing is not None:
        raise InputError(
            f"{directory.path} had a checkpoint of step {missing}, which is missing from {directory.checkpoints}; "
            f"{directory.kept_elsewhere()}restore it, or --fresh starts a new run beside this one"
        )
    if past.last_step and not past.has_status:
        raise InputError(
            f"{directory.path} has taken {past.last_step} steps, but there is no checkpoint in {directory.checkpoints}, and "
            f"{directory.status} does not say whether there was one: restore both, or --fresh starts a run beside this one"
        )


def rollback_advice(found: list[Place], first_skipped: int, hint: str) -> str:
    """Return a sentence on where a run whose last steps were all skipped can resume from.

    The last step before the skipped ones may have ruined the weights: its loss was computed before its update, so it
    could not show the damage. Only checkpoints from before that step count as good.

    Args:
        found: the run's checkpoints, oldest first.
        first_skipped: the first of the skipped steps.
        hint: the command that resumes the run, in words (:func:`resume_hint`).
    """
    good = [path for path in found if step_of(path) < first_skipped - 1 and _is_usable(path)]
    if not found:
        return f"no checkpoint was complete; {hint} starts from the beginning"
    if not good:
        return (
            f"the checkpoint of step {step_of(found[-1])} may hold ruined weights, and no earlier one is good: "
            "--fresh starts a new run beside this one"
        )
    step = step_of(good[-1])
    if good[-1] == found[-1]:
        return f"{hint} resumes from the checkpoint of step {step}, whose weights are good"
    return (
        f"the checkpoint of step {step_of(found[-1])} may hold ruined weights: to go back to the checkpoint of step {step}, "
        f"add --resume_step {step} to the command"
    )


def _is_usable(path: Place) -> bool:
    try:
        read_manifest(path)
    except InputError:
        return False
    return True


def verified(path: Place, world: World) -> tuple[Checkpoint | None, str]:
    """Open a checkpoint and verify its files. Each rank verifies a share; all ranks must call it together.

    Returns:
        The checkpoint and an empty string; or, if a rank finds damage, None and what is wrong.

    Raises:
        UnreadableError: a rank cannot read the checkpoint now.
        InputError: the checkpoint is of another version.
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


def starting_progress(
    choice: CheckpointChoice,
    directory: RunDirectory,
    run: RunConfig,
    data: Mixture,
    digest: str,
    *,
    allowed: frozenset[str],
) -> tuple[Progress, dict[str, str]]:
    """Return the progress from which a run starts, and the changes of its tokenizer and data, each as ``old → new``.

    Args:
        choice: the checkpoint to resume from, if there is one.
        directory: the run's directory.
        run: the configuration.
        data: the tokens that the run would train on.
        digest: SHA-256 of the tokenizer and these tokens.
        allowed: names of the settings that a resumed run may change, and ``data`` for the tokens.

    Raises:
        InputError: the checkpoint was trained on other tokens, and that change is not allowed.
    """
    if choice.checkpoint is None:
        return Progress(step=0, tokens=0), {}
    header = choice.checkpoint.manifest.header
    changes = token_changes(header, data, digest, directory.ledger.stretch_of(header.progress.step))
    forbidden = {key: change for key, change in changes.items() if key not in allowed}
    if forbidden:
        listed = ", ".join(f"{key}: {change}" for key, change in forbidden.items())
        raise InputError(
            f"{choice.checkpoint.path} was trained on other tokens than {run.data.input_file} gives ({listed}); use the data "
            f"it was trained on; or {allow_change(changes, allowed)} resumes with the new ones; or another --model_name, or "
            "--fresh to start a new run beside this one"
        )
    return _with_loss_scale(header, run), changes


def token_changes(header: Header, data: Mixture, digest: str, before: Stretch | None) -> dict[str, str]:
    """The changes of tokenizer and tokens since a checkpoint, each as ``old → new``.

    Args:
        header: the checkpoint's manifest entries on its run.
        data: the current tokens.
        digest: SHA-256 of the current tokenizer and tokens.
        before: the data ledger's entry for the checkpoint's step; None: not known.
    """
    changes = {}
    old, new = Tokenizer.from_dict(header.tokenizer), data.tokenizer
    if old.digest != new.digest:
        changes["tokenizer"] = f"{old.kind} {old.digest[:12]} → {new.kind} {new.digest[:12]}"
    if header.data not in {None, digest}:
        changes[DATA] = f"{str(header.data)[:12]} → {digest[:12]}"
        if before is not None:
            changes[DATA] += change_of_sources(before.sources, ledger_sources(data))
    return changes


def _with_loss_scale(header: Header, run: RunConfig) -> Progress:
    """The progress of a checkpoint, with the initial loss scale if the precision has changed since."""
    precision = run.train.precision
    if header.train.get("precision", precision) == precision:
        return header.progress
    return replace(header.progress, loss_scale=LossScaler.for_precision(precision).scale, good_steps=0)


def first_stretch(run: RunConfig, batch: BatchPlan, data: Mixture, digest: str, progress: Progress) -> Stretch:
    """Make the data ledger's entry for the steps after this progress: which training sequences each step consumes."""
    return Stretch(
        first_step=progress.step + 1,
        first_window=progress.sequences,
        windows_per_step=batch.sequences,
        block_size=batch.block_size,
        seed=run.train.seed,
        data=digest,
        reason="resumed with a change" if progress.step else "start",
        sources=ledger_sources(data),
    )


def resume_hint(name: str, asked: str, *, fresh: bool, goes_back: bool = False) -> str:
    """Say in words with which command the run can be resumed later.

    Args:
        name: the name of the run's folder, to which ``--fresh`` may have added a number.
        asked: the run's name as the user gave it, by flag, file or preset.
        fresh: whether the command has ``--fresh``.
        goes_back: whether the command has ``--resume_step``.
    """
    if goes_back:
        return "the same command without --resume_step"
    if not fresh:
        return "the same command"
    return f"the same command {'without' if name == asked else f'with --model_name {name} instead of'} --fresh"


def resumed_line(checkpoint: Place, progress: Progress, total: int, taken: int) -> str:
    """The line that names the checkpoint from which a run resumes, and the steps up to ``taken`` that it repeats."""
    first = progress.step + 1
    several = f"steps {first} to {taken} were taken before, and are repeated"
    lost = f"step {first} was taken before, and is repeated" if taken == first else several
    repeated = f"; {lost}" if taken >= first else ""
    skipped = f"; {progress.left_out:,} windows of the data were skipped before" if progress.left_out else ""
    return f"resumed  from {checkpoint}, step {progress.step} of {total}{repeated}{skipped}"
