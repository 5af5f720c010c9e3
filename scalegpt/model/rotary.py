"""Rotary positions: pairs of numbers of each query and key are turned by angles that grow with the token's position.

Number i of a head is paired with number i + R/2, as in the weights of Llama, Qwen and GPT-NeoX (Su et al. 2021, arXiv
2104.09864, with pairs of neighbours). The pair turns by position · θ^(-2i/R), where θ is ``rope_theta``. Only the first
R = ``rotary_width`` numbers of a head turn. ``rope_scaling`` changes the frequencies.

Sizes: B micro batch, T sequence, h heads, D width of a head, R ``rotary_width``.
"""

import math
from typing import Any

import torch
from torch import Tensor

from scalegpt.config import ModelConfig
from scalegpt.config.rope import LINEAR, LLAMA3, RopeScaling


def frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """The angle by which each pair turns from one position to the next, and the factor of cosines and sines.

    Returns:
        fp32 [R/2] on the CPU, and 1, or the factor by which YaRN multiplies queries and keys.
    """
    width, scaling = config.rotary_width, config.rope_scaling
    wavelengths = config.rope_theta ** (torch.arange(0, width, 2, device="cpu").float() / width)
    if scaling is None:
        return 1.0 / wavelengths, 1.0
    if scaling.type == LINEAR:
        return 1.0 / wavelengths / scaling.factor, 1.0
    if scaling.type == LLAMA3:
        return _scaled_as_llama3(1.0 / wavelengths, scaling), 1.0
    factor = scaling.attention_factor
    return _scaled_as_yarn(wavelengths, scaling, config.rope_theta), factor or 0.1 * math.log(scaling.factor) + 1.0


def _scaled_as_llama3(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """Scale frequencies as Llama 3.1 does: divide low ones by ``factor``, keep high ones, and interpolate between."""
    length, low, high = scaling.original_block_size, scaling.low_freq_factor, scaling.high_freq_factor
    assert length is not None
    assert low is not None
    assert high is not None
    rotations = length / (2 * math.pi / plain)
    share = ((rotations - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - share) * plain / scaling.factor + share * plain


def _scaled_as_yarn(wavelengths: Tensor, scaling: RopeScaling, theta: float) -> Tensor:
    """Scale frequencies as YaRN does: divide those of late pairs by ``factor``, keep early ones, interpolate between."""
    length, fast, slow = scaling.original_block_size, scaling.beta_fast, scaling.beta_slow
    assert length is not None
    assert fast is not None
    assert slow is not None
    width = 2 * wavelengths.numel()

    def pair(rotations: float) -> float:
        """The pair, as a fraction, that makes the given number of turns in the original context."""
        return width * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first, last = max(math.floor(pair(fast)), 0), min(math.ceil(pair(slow)), width - 1)
    span = last - first or 0.001
    share = 1 - ((torch.arange(width // 2, device="cpu").float() - first) / span).clamp(0.0, 1.0)
    return 1.0 / (scaling.factor * wavelengths) * (1 - share) + 1.0 / wavelengths * share


class RotaryTable:
    """The cosines and sines of all positions up to ``block_size``, in fp32, which all blocks share.

    The table follows from the configuration, so it is not part of the model's state. It is made on a device when it is
    first needed there, after the model's parameters have been sharded, cast or moved.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._on: dict[torch.device, Tensor] = {}

    @property
    def made(self) -> list[Tensor]:
        """The tables that have been made, one for each device."""
        return list(self._on.values())

    def on(self, device: torch.device) -> Tensor:
        """The table on a device: fp32 [``block_size``, R], the cosines of R/2 pairs and then their sines."""
        if device not in self._on:
            turns, factor = frequencies(self.config)
            angles = torch.arange(self.config.block_size, device="cpu").float()[:, None] * turns
            self._on[device] = (torch.cat((angles.cos(), angles.sin()), dim=1) * factor).to(device)
        return self._on[device]


class _Rotation(torch.autograd.Function):
    """Turn heads forward, and their gradients backward. Autograd keeps only the shared table."""

    @staticmethod
    def forward(heads: Tensor, turns: Tensor) -> Tensor:
        return _turned(heads, turns, 1.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG004 - torch's signature
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (turns,) = ctx.saved_tensors
        return _turned(grad, turns, -1.0), None


def rotate(heads: Tensor, turns: Tensor) -> Tensor:
    """Turn queries or keys [B, T, h, D] by ``turns`` [T, R] or [B, T, R], rows of a :class:`RotaryTable`.

    The arithmetic is fp32, the dtype of ``turns``. The result is contiguous and has the dtype of ``heads``.
    """
    result: Tensor = _Rotation.apply(heads, turns)  # type: ignore[no-untyped-call]
    return result


def _turned(heads: Tensor, turns: Tensor, sign: float) -> Tensor:
    """``heads``, turned by ``sign`` times the angles: out of place, with two temporary tensors."""
    cos, sin = turns.unsqueeze(-2).chunk(2, dim=-1)
    pairs = cos.shape[-1]
    result = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    exact = heads[..., : 2 * pairs].to(torch.promote_types(heads.dtype, turns.dtype))
    first, second = exact[..., :pairs], exact[..., pairs:]
    part = first * cos
    result[..., :pairs] = part.addcmul_(second, sin, value=-sign)
    result[..., pairs : 2 * pairs] = torch.mul(second, cos, out=part).addcmul_(first, sin, value=sign)
    if 2 * pairs < heads.shape[-1]:
        result[..., 2 * pairs :] = heads[..., 2 * pairs :]
    return result
