"""Compares an exported folder with our own model: its logits in transformers, if that is installed, with our logits."""

import gc
from importlib.util import find_spec
from pathlib import Path

import torch

from scalegpt.architecture.counting import count_parameters
from scalegpt.checkpoint.inspection import DTYPES
from scalegpt.errors import RunError
from scalegpt.export.source import Source
from scalegpt.model.gpt import GPT
from scalegpt.system.cores import available_bytes
from scalegpt.units import gib

LENGTHS = (1, 2, 17, 64)
"""The numbers of tokens after which the logits are compared."""

MOST_APART = 1e-3
"""The largest difference of two logits that fp32 rounding explains, as a share of the largest logit."""


def compare(source: Source, folder: Path) -> str:
    """Compare the logits of both models on random tokens, in fp32, with the weights that were written.

    Returns:
        A sentence with the largest difference of two logits, or with the reason why they were not compared.

    Raises:
        RunError: the logits differ by more than rounding.
    """
    if find_spec("transformers") is None:
        return "logits not compared: transformers is not installed (pip install transformers)"
    needed = 2 * 4 * count_parameters(source.model).total
    if needed > available_bytes():
        return f"logits not compared: two models in fp32 take {gib(needed)}, and {gib(available_bytes())} are free"
    model = source.model
    lengths = sorted({min(length, model.block_size) for length in LENGTHS})
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.vocab_size, (2, lengths[-1]), generator=generator)
    theirs = _their_logits(folder, tokens, lengths)
    ours = _our_logits(source, tokens, lengths)
    apart, largest = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    if not apart <= MOST_APART * max(largest, 1.0):
        raise RunError(
            f"transformers computes other logits than ScaleGPT: they differ by up to {apart:.2g}, and the largest logit is "
            f"{largest:.3g}; nothing was written. This is a bug in ScaleGPT or in this version of transformers"
        )
    return f"logits compared with transformers: they differ by at most {apart:.1e}; the largest logit is {largest:.3g}"


@torch.no_grad()
def _their_logits(folder: Path, tokens: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """The logits of transformers after each number of tokens, [lengths, B, V]."""
    import transformers
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    logits: torch.Tensor = model(tokens).logits
    result = torch.stack([logits[:, length - 1] for length in lengths])
    del model, logits
    gc.collect()
    return result


@torch.no_grad()
def _our_logits(source: Source, tokens: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Our logits after each number of tokens, [lengths, B, V]."""
    with torch.device("meta"):
        model = GPT(source.model)
    model.to_empty(device="cpu").eval()
    for name, parameter in model.named_parameters():
        parameter.copy_(source.read(name).to(DTYPES[source.dtype]))
    return torch.stack([model(tokens[:, :length]) for length in lengths])
