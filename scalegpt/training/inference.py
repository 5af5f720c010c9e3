"""Loading a trained model to use it: one process, one device, no optimizer."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from scalegpt.backends.world import choose_device
from scalegpt.checkpoint.manifest import MANIFEST, WEIGHTS, DamagedError, Header
from scalegpt.checkpoint.reader import Checkpoint
from scalegpt.checkpoint.store import find_checkpoints, is_checkpoint
from scalegpt.config import ModelConfig, TrainConfig
from scalegpt.config.settings import Section
from scalegpt.data.tokenizers import Tokenizer
from scalegpt.errors import InputError, nearest
from scalegpt.model.gpt import GPT

SectionT = TypeVar("SectionT", bound=Section)

CHECKPOINTS = "checkpoints"
"""A run's folder of checkpoints."""

RUN_FILES = ("run_status.json", "config.yaml", "metrics.jsonl")
"""What a run's folder may hold before its first checkpoint."""


class LoadedModel(NamedTuple):
    """A trained model in evaluation mode, its tokenizer, and the header of the checkpoint that it came from."""

    model: GPT
    tokenizer: Tokenizer
    header: Header


def load_model(path: Path, device: str = "auto") -> LoadedModel:
    """Load a model to use, not to train on.

    It computes in bf16 on a CUDA device that has it, else in fp32. Matrices are kept in that dtype, which is what the
    layers would cast them to at every use; norms and biases stay fp32.

    Args:
        path: a run's folder, whose newest checkpoint is taken, or a checkpoint's own.
        device: ``auto`` (CUDA where there is any), ``cpu`` or ``cuda``.

    Raises:
        InputError: no such run, no checkpoint in it, a damaged one, or a device that is not there.
    """
    checkpoint = newest_checkpoint(path)
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
    """Open a checkpoint whose weights are to be read, and verify those.

    Raises:
        InputError: no checkpoint, or a damaged one; an earlier one is not taken in its place, since nobody asked for it.
    """
    try:
        stored = Checkpoint.open(checkpoint)
        stored.verify((WEIGHTS,))
    except DamagedError as error:
        raise DamagedError(f"{error}; name an earlier checkpoint, if there is one") from None
    return stored


def newest_checkpoint(path: Path) -> Path:
    """Return the checkpoint that a path means: itself, or the newest of a run.

    Raises:
        InputError: nothing there, something else there, or a run that has none yet.
    """
    return checkpoints_of(path)[-1]


def checkpoints_of(path: Path) -> list[Path]:
    """Return the checkpoints that a path means, oldest first and at least one: itself, or those of a run.

    Raises:
        InputError: nothing there, something else there, or a run that has none yet.
    """
    if not path.exists():
        raise InputError(f"run {path} does not exist{_nearest_run(path)}")
    if is_checkpoint(path):
        return [path]
    found = find_checkpoints(path / CHECKPOINTS) or find_checkpoints(path)
    if found:
        return found
    if (path / CHECKPOINTS).is_dir() or any((path / name).is_file() for name in RUN_FILES):
        raise InputError(f"run {path} has no checkpoint yet: train it longer, or lower --checkpoint_every")
    inside = _runs_in(path)
    hint = f", but holds some: {', '.join(inside)}" if inside else "; give a folder such as runs/NAME"
    raise InputError(f"{path} is neither a run nor a checkpoint{hint}")


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return bf16 for a CUDA device with units for it, else fp32."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float32


def _nearest_run(path: Path) -> str:
    """Return a hint that names the run that was probably meant, or what to do where there is none."""
    usual = Path("runs") / path
    if not path.is_absolute() and usual.is_dir():
        return f"; did you mean {usual}?"
    names = _runs_in(path.parent)
    return nearest(path.name, names) if names else "; train one first: scalegpt train --help"


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
    """Copy weights into the model one at a time, so that the host never holds them all.

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
