"""Loads a trained model for inference: in one process, on one device, without an optimizer."""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from scalegpt.backends.base import DTYPES
from scalegpt.backends.precision import card_precision
from scalegpt.backends.world import choose_device
from scalegpt.checkpoint.address import Place
from scalegpt.checkpoint.manifest import Header, Progress
from scalegpt.config import ModelConfig, TrainConfig
from scalegpt.config.inference import LAST
from scalegpt.data.tokenizers import Tokenizer
from scalegpt.errors import InputError
from scalegpt.inference.loaded import LoadedModel
from scalegpt.interop.families import read_config
from scalegpt.interop.families.reading import is_hugging_face
from scalegpt.model.gpt import GPT
from scalegpt.model.loss import make_loss
from scalegpt.training.runs.find import chosen_checkpoint, open_weights, with_newest
from scalegpt.weights.origin import open_folder, tokenizer_of


def load_model(path: Place, device: str = "auto", *, precision: str = "auto", checkpoint: str = LAST) -> LoadedModel:
    """Load a trained model for inference.

    Matrices are stored in the compute dtype, so that layers need not cast them at every use. Norms and biases stay
    fp32. The loss never holds the logits of more than ``loss_chunk`` tokens.

    Args:
        path: a run's folder, a checkpoint's folder, or a Hugging Face folder.
        device: ``auto`` (CUDA if there is a CUDA device), ``cpu`` or ``cuda``.
        precision: ``fp32``, ``bf16``, ``fp16``, or ``auto``: bf16 on a CUDA device that has bf16 units, else fp32.
        checkpoint: which checkpoint of a run: ``last``, ``best`` (the lowest held-out loss), or a step.

    Raises:
        InputError: there is no such run, no such checkpoint in it, or no such device; or the checkpoint is damaged.
    """
    if isinstance(path, Path) and is_hugging_face(path):
        if checkpoint != LAST:
            raise InputError(f"{path} is a Hugging Face folder, which has no checkpoints; omit --checkpoint")
        return _load_folder(path, device, precision)
    return with_newest(chosen_checkpoint(path, checkpoint), lambda found: _load(found, device, precision))


def _load(checkpoint: Place, device: str, precision: str) -> LoadedModel:
    stored = open_weights(checkpoint)
    model, train = stored.section("model", ModelConfig), stored.section("train", TrainConfig)
    built = _build(model, train, device, precision)
    _put_weights(built, stored.weights(), checkpoint)
    header = stored.manifest.header
    tokenizer = Tokenizer.from_dict(header.tokenizer)
    if train.packs_documents:
        built.set_packing(tokenizer.end_of_text)
    return LoadedModel(built, tokenizer, header)


def _load_folder(path: Path, device: str, precision: str) -> LoadedModel:
    """Load the model of a Hugging Face folder. The header has the shape, but no progress."""
    read = read_config(path)
    origin, tokenizer = open_folder(read), tokenizer_of(read)
    built = _build(read.model, TrainConfig(), device, precision)
    _put_weights(built, origin.weights(read.model), path)
    config = {"name": read.name, "model": asdict(read.model)}
    return LoadedModel(built, tokenizer, Header(Progress(step=0, tokens=0), config, tokenizer.as_dict()))


def _build(config: ModelConfig, train: TrainConfig, device: str, precision: str) -> GPT:
    """A model for inference, on its device and in its dtypes, with uninitialized weights."""
    target = choose_device(device, 0, 1)
    auto = precision == "auto"
    compute = compute_dtype(target) if auto else DTYPES[card_precision(precision, target)]
    with torch.device("meta"):
        model = GPT(config, make_loss("chunked", train.loss_chunk))
    model.set_precision(compute, torch.float32 if train.residual_dtype == "fp32" else compute)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = parameter.data.to(compute)
    return model.to_empty(device=target).eval().requires_grad_(False)


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype to compute in: bf16 on a CUDA device with bf16 units, else fp32."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float32


@torch.no_grad()
def _put_weights(model: nn.Module, weights: Iterable[tuple[str, Tensor]], checkpoint: Place) -> None:
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
