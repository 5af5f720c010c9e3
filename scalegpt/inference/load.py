"""Loads a trained model for inference: in one process, on one device, without an optimizer."""

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
"""The name of the folder of checkpoints in a run's folder."""

RUN_FILES = ("run_status.json", "config.yaml", "metrics.jsonl")
"""Files by which a run's folder is recognised before its first checkpoint."""

STEP = "step_"
"""The beginning of the name of a checkpoint's folder."""

SET_ASIDE = (f"step_*.{DAMAGED}*", f"step_*.{REPLACED}*")
"""Glob patterns of the checkpoints that training renamed (:func:`scalegpt.checkpoint.store.set_aside`)."""

MOST_NAMED = 6
"""The most checkpoints that a message names."""


def load_model(path: Path, device: str = "auto") -> LoadedModel:
    """Load a trained model for inference.

    The model computes in bf16 on a CUDA device that has bf16 units, else in fp32. Matrices are stored in that dtype,
    since the layers would otherwise cast them to it at every use. Norms and biases stay fp32.

    Args:
        path: a run's folder, whose newest checkpoint is loaded, or a checkpoint's folder.
        device: ``auto`` (CUDA if there is any), ``cpu`` or ``cuda``.

    Raises:
        InputError: there is no such run, no checkpoint in it, or no such device; or the checkpoint is damaged.
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
        InputError: there is no checkpoint, or it is damaged. Other checkpoints are not tried: the user did not ask for one.
    """
    with naming_earlier(checkpoint):
        stored = Checkpoint.open(checkpoint)
        stored.verify((WEIGHTS,))
    return stored


@contextmanager
def naming_earlier(checkpoint: Path) -> Iterator[None]:
    """Append a hint to an error that the block raises about a damaged checkpoint: which checkpoint to use instead.

    Raises:
        DamagedError: the checkpoint is damaged; the message ends with the hint.
    """
    try:
        yield
    except DamagedError as error:
        beside = find_checkpoints(checkpoint.parent)
        is_one_of_them = checkpoint in beside  # false for a copy whose name has no step
        kind = "an earlier" if is_one_of_them else "another"
        instead = beside[: beside.index(checkpoint)] if is_one_of_them else beside
        hint = f"give {kind} checkpoint by its path: {instead[-1]}" if instead else "there is no earlier checkpoint"
        raise DamagedError(f"{error}; {hint}") from None


def with_newest(path: Path, work: Callable[[Path], Result]) -> Result:
    """Call ``work`` with the checkpoint that a path means, and return its result.

    A run in training deletes old checkpoints. If it deletes the checkpoint in use, ``work`` is called again with the
    newest checkpoint.

    Args:
        path: a run's folder, which means its newest checkpoint, or a checkpoint's folder.
        work: a function of the path of the checkpoint.

    Raises:
        InputError: there is no checkpoint, the checkpoint that the user named was deleted, or ``work`` raises it.
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
    """Examine all checkpoints of a run, or a single one; checkpoints that training deletes meanwhile are skipped.

    Args:
        path: a run's folder, or a checkpoint's folder.

    Raises:
        InputError: there is no checkpoint, or the checkpoint that the user named was deleted.
    """
    verdicts: list[Verdict] = []
    while not verdicts:  # repeated if all were deleted meanwhile: then there are newer checkpoints
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
        InputError: the user named this checkpoint, so no other checkpoint can take its place.
    """
    if checkpoint == path:
        raise InputError(
            f"{path} was deleted while it was being read; name another checkpoint, or its run for the newest"
        )


def newest_checkpoint(path: Path) -> Path:
    """Return the path, if it is a checkpoint, or the newest checkpoint of the run at the path.

    Raises:
        InputError: the path does not exist, is neither a run nor a checkpoint, or is a run without checkpoints.
    """
    return checkpoints_of(path)[-1]


def checkpoints_of(path: Path) -> list[Path]:
    """Return one or more checkpoints, oldest first: the path, if it is a checkpoint, or all of the run at the path.

    Raises:
        InputError: the path does not exist, cannot be read, is neither a run nor a checkpoint, or is a run without
            checkpoints.
    """
    try:
        is_there = path.exists()
    except OSError as error:
        raise unreadable(path, error) from error
    if not is_there:
        raise InputError(_missing(path))
    if is_checkpoint(path):
        return [path]
    # Search twice: during the first search the trainer may replace the only checkpoint with a new one.
    if found := _found_in(path) or _found_in(path):
        return found
    run = path.parent if path.name == CHECKPOINTS else path
    if _is_run(run):
        raise InputError(_no_checkpoint(run))
    raise InputError(f"{path} is neither a run nor a checkpoint{_runs_hint(path)}")


def set_aside_in(path: Path) -> list[Path]:
    """Return the checkpoints of a run that training has renamed (:data:`SET_ASIDE`), in the order of their names."""
    folder = path / CHECKPOINTS
    place = folder if folder.is_dir() else path
    return sorted(each for pattern in SET_ASIDE for each in place.glob(pattern))


def check_run(path: Path) -> None:
    """Refuse a path that is not a run.

    Raises:
        InputError: the path does not exist, or is not a run.
    """
    if not path.exists():
        raise InputError(_missing(path))
    if not _is_run(path):
        raise InputError(f"{path} is not a run{_runs_hint(path)}")


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype to compute in: bf16 on a CUDA device with bf16 units, else fp32."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float32


def _found_in(path: Path) -> list[Path]:
    """Return the checkpoints in a run's folder, or in a folder of checkpoints, oldest first."""
    return find_checkpoints(path / CHECKPOINTS) or find_checkpoints(path)


def _is_run(path: Path) -> bool:
    return (path / CHECKPOINTS).is_dir() or any((path / name).is_file() for name in RUN_FILES)


def _no_checkpoint(run: Path, name: str = "") -> str:
    """Return an error message: the run has no checkpoint of this name, or no checkpoint yet, or none any more."""
    found = [each.name for each in _found_in(run)]
    if found:
        named = found if len(found) <= MOST_NAMED else [found[0], "…", *found[2 - MOST_NAMED :]]
        return f"run {run} has no checkpoint {name}; it has {', '.join(named)}"
    step = RunDirectory(run).read_past().newest
    if step is None:
        return f"run {run} has no checkpoint yet: train it longer, or lower --checkpoint_every"
    return f"run {run} had a checkpoint of step {step}, which is missing from {run / CHECKPOINTS}; restore it"


def _missing(path: Path) -> str:
    """Return an error message: the run or its checkpoint does not exist. The message names what was probably meant."""
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
    """Return a hint that names the runs in a folder; if there are none, the hint says which folder to give."""
    inside = _runs_in(path)
    return f"; it contains these runs: {', '.join(inside)}" if inside else "; give a folder such as runs/NAME"


def _runs_in(folder: Path) -> list[str]:
    """Return the names of the runs and checkpoints in a folder."""
    if not folder.is_dir():
        return []
    marks = (CHECKPOINTS, MANIFEST, *RUN_FILES)
    return sorted(path.name for path in folder.iterdir() if any((path / mark).exists() for mark in marks))


def _section(header: Header, part: str, kind: type[SectionT], checkpoint: Path) -> SectionT:
    """Return a part of the checkpoint's configuration as a section of settings.

    Raises:
        InputError: the part is missing, or a setting in it is not valid.
    """
    values = header.config.get(part) if isinstance(header.config, dict) else None
    if not isinstance(values, dict):
        raise InputError(f"{checkpoint / MANIFEST} is damaged: its configuration has no {part}; use another checkpoint")
    return kind.from_mapping(values, f"{checkpoint / MANIFEST}, {part}")


@torch.no_grad()
def _put_weights(model: nn.Module, weights: Iterable[tuple[str, Tensor]], checkpoint: Path) -> None:
    """Copy weights into the model one at a time, so that host memory never holds all of the weights.

    Raises:
        InputError: the names or shapes of the weights are not those of the model.
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
