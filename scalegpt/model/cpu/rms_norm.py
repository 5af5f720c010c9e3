"""RMSNorm on a CPU, for which torch has no fused kernel.

On a CPU ``F.rms_norm`` is a sequence of operators. Its forward pass writes several fp32 copies of the input, and
autograd keeps two of them. This module keeps the same tensors as CUDA's fused kernel (``aten::_fused_rms_norm``): the
input, the weight, and an fp32 number for each row. The backward pass uses LayerNorm's kernel, which subtracts a mean
that the caller gives.

The function is an operator of torch, ``scalegpt::rms_norm``, so that a trace of the step, which runs on tensors of the
CPU (:mod:`scalegpt.tracing`), sees the allocations of CUDA's fused kernel.

Sizes: n rows of width H. Symbols: x̂ = x·s is the normalised input, with s = 1/√(mean(x²) + eps); y = x̂·w is the result.
"""

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("scalegpt::rms_norm", mutates_args=(), device_types="cpu")
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Normalise over the last dimension; statistics and products are fp32, or fp64 for an fp64 input.

    Args:
        x: [..., H].
        weight: [H], in x's dtype.
        eps: added to the mean square.

    Returns:
        y [..., H] in x's dtype, and s [..., 1]. Only y can be differentiated, and only once.
    """
    exact = x.to(_exact(x))
    scale = torch.linalg.vector_norm(exact, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    y = exact * scale if exact is x else exact.mul_(scale)
    y = y.mul_(weight).to(x.dtype)
    return y.contiguous(), scale


@torch.library.custom_op("scalegpt::rms_norm_backward", mutates_args=(), device_types="cpu")
def _rms_norm_backward(grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the weight.

    Let g be the gradient of y. The gradient of x is s·(g·w - x̂·mean(g·w·x̂)). LayerNorm's kernel, given s and a mean
    of 0, computes s·(g·w - mean(g·w) - x̂·mean(g·w·x̂)), so s·mean(g·w) is added to its result. Its gradient of the
    weight is not used, since the kernel adds up the rows in the input's dtype.
    """
    width = x.shape[-1]
    rows, scales = grad.reshape(-1, width), scale.reshape(-1)
    d_x, _, _ = torch.ops.aten.native_layer_norm_backward(
        grad, x, [width], torch.zeros_like(scale), scale, weight.to(scale.dtype), None, [True, False, False]
    )
    means = torch.mv(rows, weight).to(scale.dtype).mul_(scales).div_(width)
    d_x.add_(means.to(x.dtype).view_as(scale))
    d_weight = torch.mv((rows * x.reshape(-1, width)).t(), scales.to(x.dtype))
    return d_x, d_weight


def _exact(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:  # noqa: ARG001 - the operator's signature
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=_exact(x))


@_rms_norm_backward.register_fake
def _(grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG001 - as above
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, output[1], weight)


def _backward(ctx: Any, grad: Tensor, _scale: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_rms_norm_backward(grad.contiguous(), *ctx.saved_tensors), None


rms_norm.register_autograd(_backward, setup_context=_save)
