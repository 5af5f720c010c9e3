"""CUDA's behaviour where that of the CPU, or of tensors without data, is another.

A trace runs on tensors of the CPU, so torch takes its CPU paths. This module puts CUDA's in their place.
:mod:`scalegpt.planner.attention` has the attention kernel, :mod:`scalegpt.architecture.kernels` what kernels allocate for
themselves. The rest is here, each with its source in torch, to be compared with a real card:

==================================  ===================================================================================
what                                source
==================================  ===================================================================================
LayerNorm's statistics in fp32      aten/src/ATen/native/cuda/layer_norm_kernel.cu (the CPU keeps them in bf16)
dropout's mask of one byte          aten/src/ATen/native/Dropout.cpp, ``native_dropout`` (the CPU's has the input's dtype)
heads padded to a multiple of 8     aten/src/ATen/native/transformers/attention.cpp, ``pad_last_dim``
==================================  ===================================================================================

Not here, because they are the same in every step: cuBLAS's workspaces, which the allocator counts as well.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from scalegpt.architecture import kernels
from scalegpt.architecture.kernels import Heads

aten = torch.ops.aten

_ATTENTION = {
    aten._scaled_dot_product_flash_attention.default: (kernels.attention_forward, "flash", 0),
    aten._scaled_dot_product_efficient_attention.default: (kernels.attention_forward, "mem_efficient", 0),
    aten._scaled_dot_product_cudnn_attention.default: (kernels.attention_forward, "cudnn", 0),
    aten._scaled_dot_product_flash_attention_backward.default: (kernels.attention_backward, "flash", 1),
    aten._scaled_dot_product_efficient_attention_backward.default: (kernels.attention_backward, "mem_efficient", 1),
    aten._scaled_dot_product_cudnn_attention_backward.default: (kernels.attention_backward, "cudnn", 1),
}
"""Operator → what its kernel allocates for itself, the kernel, and which argument the queries are."""


@contextmanager
def cuda_functions(kernel: str) -> Iterator[None]:
    """Make attention and dropout call the kernels that CUDA would.

    Attention is replaced where the model looks it up, since torch suspends a ``TorchFunctionMode`` in the backward pass,
    where recompute needs it too. Dropout is replaced below that, since the math kernel calls it from C++.

    Args:
        kernel: what :func:`~scalegpt.planner.attention.attention_kernel` says.
    """
    attention = F.scaled_dot_product_attention
    if kernel != "math":
        F.scaled_dot_product_attention = partial(_attend, kernel)
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    library.impl("dropout", _dropout, "AutogradCPU")
    try:
        yield
    finally:
        library._destroy()
        F.scaled_dot_product_attention = attention


def _dropout(x: Tensor, p: float, train: bool) -> Tensor:
    return torch.native_dropout(x, p, train=True)[0] if train and p > 0 else x


def _attend(
    kernel: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
) -> Tensor:
    """Attention as torch's CUDA dispatch runs it, without a mask of its own."""
    assert attn_mask is None, "training has no attention mask"
    if kernel == "flash":
        return _attend_with_flash(q, k, v, dropout_p, is_causal)
    efficient, cudnn = aten._scaled_dot_product_efficient_attention, aten._scaled_dot_product_cudnn_attention
    y: Tensor = (efficient if kernel == "mem_efficient" else cudnn)(q, k, v, None, True, dropout_p, is_causal)[0]
    return y


def _attend_with_flash(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, is_causal: bool) -> Tensor:
    width = q.shape[-1]
    missing = -width % kernels.FLASH_ALIGNED
    if missing:
        q, k, v = (F.pad(tensor, (0, missing)) for tensor in (q, k, v))
    y: Tensor = aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]
    return y[..., :width] if missing else y


def run_as_cuda(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operator, with the results that CUDA's kernel would give."""
    result = func(*args, **kwargs)
    if func is aten.native_layer_norm.default:
        y, mean, rstd = result
        return y, mean.float(), rstd.float()
    return result


def extras(func: Any, args: Any) -> Iterator[tuple[str, int]]:
    """What CUDA's kernel for an operator allocates besides its results, and frees before it returns.

    Yields:
        Labels, and bytes of single allocations that live together.
    """
    if func in _ATTENTION:
        allocates, kernel, place = _ATTENTION[func]
        queries = args[place]
        batch, count, rows, width = queries.shape
        yield from allocates(kernel, Heads(batch, count, rows, width, queries.element_size()))
    elif func is aten.embedding_dense_backward.default:
        gradient, tokens, rows = args[:3]
        yield from kernels.embedding_backward(tokens.numel(), rows, gradient.shape[-1])
    elif func is aten._foreach_norm.Scalar:
        tensors = args[0]
        yield from kernels.grouped_norm(len(tensors), max(tensor.numel() for tensor in tensors))
    else:
        yield from shared_extras(func, args)


def shared_extras(func: Any, args: Any) -> Iterator[tuple[str, int]]:
    """The same for operators that are made of others, on every device alike."""
    if func is aten._safe_softmax.default:
        scores = args[0]
        yield "safe softmax: masked scores", scores.numel()
        yield "safe softmax: masked rows", scores.numel() // scores.shape[-1]
