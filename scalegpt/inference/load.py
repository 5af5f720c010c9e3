"""Loads a trained model for inference: in one process, on one device, without an optimizer."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from scalegpt.backends.base import DTYPES
from scalegpt.backends.precision import resolve_precision
from scalegpt.backends.world import choose_device
from scalegpt.checkpoint.manifest import MANIFEST, WEIGHTS, DamagedError, Header
from scalegpt.checkpoint.reader import Checkpoint
from scalegpt.checkpoint.store import find_checkpoints
from scalegpt.config import ModelConfig, TrainConfig
from scalegpt.config.inference import LAST
from scalegpt.config.settings import Section
from scalegpt.data.tokenizers import Tokenizer
from scalegpt.errors import InputError
from scalegpt.inference.loaded import LoadedModel
from scalegpt.model.gpt import GPT
from scalegpt.model.loss import make_loss
from scalegpt.training.runs.find import chosen_checkpoint, with_newest

SectionT = TypeVar("SectionT", bound=Section)


def load_model(path: Path, device: str = "auto", *, precision: str = "auto", checkpoint: str = LAST) -> LoadedModel:
    """Load a trained model for inference.

    Matrices are stored in the compute dtype, since the layers would otherwise cast them to it at every use. Norms and
    biases stay fp32. The loss never holds the logits of more than ``loss_chunk`` tokens.

    Args:
        path: a run's folder, or a checkpoint's folder.
        device: ``auto`` (CUDA if there is any), ``cpu`` or ``cuda``.
        precision: ``fp32``, ``bf16``, ``fp16``, or ``auto``: bf16 on a CUDA device that has bf16 units, else fp32.
        checkpoint: which checkpoint of a run: ``last``, ``best`` (the lowest held-out loss), or a step.

    Raises:
        InputError: there is no such run, no such checkpoint in it, or no such device; or the checkpoint is damaged.
    """
    return with_newest(chosen_checkpoint(path, checkpoint), lambda found: _load(found, device, precision))


def _load(checkpoint: Path, device: str, precision: str) -> LoadedModel:
    stored = open_weights(checkpoint)
    header = stored.manifest.header
    config = _section(header, "model", ModelConfig, checkpoint)
    train = _section(header, "train", TrainConfig, checkpoint)
    target = choose_device(device, 0, 1)
    auto = precision == "auto"
    compute = compute_dtype(target) if auto else DTYPES[resolve_precision(precision, target, config, config.block_size)]
    with torch.device("meta"):
        model = GPT(config, make_loss("chunked", train.loss_chunk))
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


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype to compute in: bf16 on a CUDA device with bf16 units, else fp32."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float32


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
