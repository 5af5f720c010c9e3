"""Loading a trained model to use it: one process, one device, no optimizer."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from scalegpt.backends.world import choose_device
from scalegpt.checkpoint.inspection import Verdict, examine
from scalegpt.checkpoint.manifest import MANIFEST, WEIGHTS, DamagedError, Header
from scalegpt.checkpoint.reader import Checkpoint, unreadable
from scalegpt.checkpoint.store import DAMAGED, REPLACED, find_checkpoints, is_checkpoint
from scalegpt.config import ModelConfig, TrainConfig
from scalegpt.config.settings import Section
from scalegpt.data.tokenizers import Tokenizer
from scalegpt.errors import InputError, nearest
from scalegpt.inference.loaded import LoadedModel
from scalegpt.model.gpt import GPT
from scalegpt.training.runs.directory import RunDirectory

Result = TypeVar("Result")
SectionT = TypeVar("SectionT", bound=Section)

CHECKPOINTS = "checkpoints"
"""A run's folder of checkpoints."""

RUN_FILES = ("run_status.json", "config.yaml", "metrics.jsonl")
"""What a run's folder may hold before its first checkpoint."""

STEP = "step_"
"""The beginning of a checkpoint's name."""

SET_ASIDE = (f"step_*.{DAMAGED}*", f"step_*.{REPLACED}*")
"""The names of checkpoints that training renamed (:func:`scalegpt.checkpoint.store.set_aside`)."""

MOST_NAMED = 6
"""The most checkpoints that a message names."""


def load_model(path: Path, device: str = "auto") -> LoadedModel:
    """Load a model to use, not to train on.

    It computes in bf16 on a CUDA device that has it, else in fp32. Matrices are stored in that dtype, to which the layers
    would cast them at every use; norms and biases stay fp32.

    Args:
        path: a run's folder, whose newest checkpoint is taken, or a checkpoint's own.
        device: ``auto`` (CUDA where there is any), ``cpu`` or ``cuda``.

    Raises:
        InputError: no such run, no checkpoint in it, a damaged one, or no such device.
    """
    return with_newest(path, lambda checkpoint: _load(checkpoint, device))


def _load(checkpoint: Path, device: str) -> LoadedModel:
    stored = open_weights(checkpoint)
    header = stored.manifest.header
    config = _section(header, "model", ModelConfig, checkpoint)
    train = _section(header, "train", TrainConfig, checkpoint)
    target = choose_device(device, 0, 1)
    compute = compute_dtype(target)
    with torch.device("meta"):
        model = GPT(config)
    model.set_precision(compute, torch.float32 if train.residual_dtype == "fp32" else compute)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = parameter.data.to(compute)
    model.to_empty(device=target)
    _put_weights(model, stored.weights(), checkpoint)
    tokenizer = Tokenizer.from_dict(header.tokenizer)
    return LoadedModel(model.eval().requires_grad_(False), tokenizer, header)


def open_weights(checkpoint: Path) -> Checkpoint:
    """Open a checkpoint and verify its weights.

    Raises:
        InputError: no checkpoint, or a damaged one; an earlier one is not used instead, since it was not asked for.
    """
    with naming_earlier(checkpoint):
        stored = Checkpoint.open(checkpoint)
        stored.verify((WEIGHTS,))
    return stored


@contextmanager
def naming_earlier(checkpoint: Path) -> Iterator[None]:
    """Add to the error of a damaged checkpoint which one to use instead.

    Raises:
        DamagedError: with the hint.
    """
    try:
        yield
    except DamagedError as error:
        beside = find_checkpoints(checkpoint.parent)
        is_one_of_them = checkpoint in beside  # a copy may have a name without a step
        kind = "an earlier" if is_one_of_them else "another"
        instead = beside[: beside.index(checkpoint)] if is_one_of_them else beside
        hint = f"give {kind} checkpoint by its path: {instead[-1]}" if instead else "there is no earlier checkpoint"
        raise DamagedError(f"{error}; {hint}") from None


def with_newest(path: Path, work: Callable[[Path], Result]) -> Result:
    """Do something with the checkpoint that a path means.

    A run in training deletes old checkpoints. If it deletes the one in use, the work begins again with the newest.

    Args:
        path: a run's folder, or a checkpoint's own.
        work: what to do with the checkpoint; called again where it was deleted.

    Raises:
        InputError: no checkpoint, one that was named and then deleted, or what the work raises.
    """
    while True:
        checkpoint = newest_checkpoint(path)
        try:
            return work(checkpoint)
        except (InputError, OSError):
            if checkpoint.is_dir():
                raise
            refuse_deleted(path, checkpoint)


def examine_all(path: Path) -> list[Verdict]:
    """Examine a run's checkpoints, or one; those that training deletes meanwhile are skipped.

    Args:
        path: a run's folder, or a checkpoint's own.

    Raises:
        InputError: no checkpoint, or one that was named and then deleted.
    """
    verdicts: list[Verdict] = []
    while not verdicts:  # all of them were deleted: then there are newer ones
        for checkpoint in checkpoints_of(path):
            try:
                verdicts.append(examine(checkpoint))
            except OSError:
                if checkpoint.is_dir():
                    raise
            if not checkpoint.is_dir():
                refuse_deleted(path, checkpoint)
        verdicts = [verdict for verdict in verdicts if verdict.path.is_dir()]
    return verdicts


def refuse_deleted(path: Path, checkpoint: Path) -> None:
    """Refuse to continue if the checkpoint that was deleted is the one that the user named.

    Raises:
        InputError: it is: another would not be what was asked for.
    """
    if checkpoint == path:
        raise InputError(
            f"{path} was deleted while it was being read; name another checkpoint, or its run for the newest"
        )


def newest_checkpoint(path: Path) -> Path:
    """Return the checkpoint that a path means: itself, or the newest of a run.

    Raises:
        InputError: the path does not exist or is something else, or the run has none.
    """
    return checkpoints_of(path)[-1]


def checkpoints_of(path: Path) -> list[Path]:
    """Return the checkpoints that a path means, oldest first and at least one: itself, or those of a run.

    Raises:
        InputError: the path does not exist, is something else or cannot be read now, or the run has none.
    """
    try:
        is_there = path.exists()
    except OSError as error:
        raise unreadable(path, error) from error
    if not is_there:
        raise InputError(_missing(path))
    if is_checkpoint(path):
        return [path]
    # Twice: during the first search the trainer may replace the only checkpoint by a new one.
    if found := _found_in(path) or _found_in(path):
        return found
    run = path.parent if path.name == CHECKPOINTS else path
    if _is_run(run):
        raise InputError(_no_checkpoint(run))
    raise InputError(f"{path} is neither a run nor a checkpoint{_runs_hint(path)}")


def set_aside_in(path: Path) -> list[Path]:
    """Return the checkpoints of a run that training has set aside, in the order of their names."""
    folder = path / CHECKPOINTS
    place = folder if folder.is_dir() else path
    return sorted(each for pattern in SET_ASIDE for each in place.glob(pattern))


def check_run(path: Path) -> None:
    """Refuse a path that is not a run.

    Raises:
        InputError: it does not exist, or is something else.
    """
    if not path.exists():
        raise InputError(_missing(path))
    if not _is_run(path):
        raise InputError(f"{path} is not a run{_runs_hint(path)}")


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return bf16 for a CUDA device with units for it, else fp32."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float32


def _found_in(path: Path) -> list[Path]:
    """Return the checkpoints of a run, or in a folder of them, oldest first."""
    return find_checkpoints(path / CHECKPOINTS) or find_checkpoints(path)


def _is_run(path: Path) -> bool:
    return (path / CHECKPOINTS).is_dir() or any((path / name).is_file() for name in RUN_FILES)


def _no_checkpoint(run: Path, name: str = "") -> str:
    """The message that a run has no checkpoint of this name, or none yet, or none any more."""
    found = [each.name for each in _found_in(run)]
    if found:
        named = found if len(found) <= MOST_NAMED else [found[0], "…", *found[2 - MOST_NAMED :]]
        return f"run {run} has no checkpoint {name}; it has {', '.join(named)}"
    step = RunDirectory(run).read_past().newest
    if step is None:
        return f"run {run} has no checkpoint yet: train it longer, or lower --checkpoint_every"
    return f"run {run} had a checkpoint of step {step}, which is missing from {run / CHECKPOINTS}; restore it"


def _missing(path: Path) -> str:
    """The message that a run or one of its checkpoints does not exist, and what was probably meant."""
    folder = path.parent
    run = folder.parent if folder.name == CHECKPOINTS else folder
    if CHECKPOINTS in {path.name, folder.name} or path.name.startswith(STEP):
        if not run.exists():
            return _missing(run)
        if _is_run(run):
            return _no_checkpoint(run, path.name)
    return f"run {path} does not exist{_nearest_run(path)}"


def _nearest_run(path: Path) -> str:
    """Return a hint: the run that was probably meant, or what to do if there is none."""
    usual = Path("runs") / path
    if not path.is_absolute() and usual.is_dir():
        return f"; did you mean {usual}?"
    names = _runs_in(path.parent)
    return nearest(path.name, names) if names else "; train one first: scalegpt train --help"


def _runs_hint(path: Path) -> str:
    """Return a hint that names the runs in a folder."""
    inside = _runs_in(path)
    return f"; it contains these runs: {', '.join(inside)}" if inside else "; give a folder such as runs/NAME"


def _runs_in(folder: Path) -> list[str]:
    """Return the names of the runs and checkpoints in a folder."""
    if not folder.is_dir():
        return []
    marks = (CHECKPOINTS, MANIFEST, *RUN_FILES)
    return sorted(path.name for path in folder.iterdir() if any((path / mark).exists() for mark in marks))


def _section(header: Header, part: str, kind: type[SectionT], checkpoint: Path) -> SectionT:
    """Return a part of the checkpoint's configuration.

    Raises:
        InputError: it is missing or does not describe a run.
    """
    values = header.config.get(part) if isinstance(header.config, dict) else None
    if not isinstance(values, dict):
        raise InputError(f"{checkpoint / MANIFEST} is damaged: its configuration has no {part}; use another checkpoint")
    return kind.from_mapping(values, f"{checkpoint / MANIFEST}, {part}")


@torch.no_grad()
def _put_weights(model: nn.Module, weights: Iterable[tuple[str, Tensor]], checkpoint: Path) -> None:
    """Copy weights into the model one at a time, so that host memory never holds them all.

    Raises:
        InputError: they are not those of this shape of model.
    """
    missing = dict(model.named_parameters())
    for name, value in weights:
        parameter = missing.pop(name, None)
        if parameter is None or parameter.shape != value.shape:
            expected = "no such weight" if parameter is None else f"shape {tuple(parameter.shape)}"
            raise InputError(f"{checkpoint}: weight {name} has shape {tuple(value.shape)}, but its configuration "
                             f"describes {expected}; use another checkpoint")  # fmt: skip
        parameter.copy_(value)
    if missing:
        raise InputError(f"{checkpoint}: weight {next(iter(missing))} is missing; use another checkpoint")
