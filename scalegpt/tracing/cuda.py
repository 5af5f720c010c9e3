"""CUDA's behaviour for a trace, where it differs from that of the CPU or of tensors without data.

A trace runs on tensors of the CPU, so torch takes its CPU paths. This module replaces these by CUDA's.
:mod:`scalegpt.planner.attention` chooses the attention kernel. :mod:`scalegpt.architecture.kernels` has the temporary
memory of kernels. The other differences are here, each with its source in torch. They have not been compared with a
real card yet:

==================================  ===================================================================================
what                                source
==================================  ===================================================================================
LayerNorm's statistics in fp32      aten/src/ATen/native/cuda/layer_norm_kernel.cu (the CPU keeps them in bf16)
dropout's mask of one byte          aten/src/ATen/native/Dropout.cpp, ``native_dropout`` (the CPU's has the input's dtype)
heads padded to a multiple of 8     aten/src/ATen/native/transformers/attention.cpp, ``pad_last_dim``
==================================  ===================================================================================

CUDA's allocator also counts cuBLAS's workspaces. They are left out here, because they are the same in every step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import scalegpt.model.cpu.rms_norm  # noqa: F401 - registers the operator
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
"""Operator → (function that gives its kernel's temporary allocations, kernel, index of the queries in the arguments)."""


_NORMS = {torch.ops.scalegpt.rms_norm.default: 0, torch.ops.scalegpt.rms_norm_backward.default: 1}
"""Operator that stands for CUDA's fused RMSNorm → index of its input in the arguments (torch, ``layer_norm_kernel.cu``)."""


@contextmanager
def cuda_functions(kernel: str) -> Iterator[None]:
    """Make attention and dropout call the kernels that torch would call on CUDA, inside the ``with`` block.

    Attention is replaced where the model looks it up. A ``TorchFunctionMode`` would not do, since torch suspends it in
    the backward pass, where recompute calls attention again. Dropout is replaced in torch's dispatcher, since the math
    kernel calls it from C++.

    Args:
        kernel: the attention kernel, from :func:`~scalegpt.planner.attention.attention_kernel`.
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
    enable_gqa: bool = False,
) -> Tensor:
    """Attention with the kernel that torch uses on CUDA: [B, a, T, D] → [B, a, T, D]."""
    assert enable_gqa == (k.shape[1] < q.shape[1])
    assert attn_mask is None or kernel == "mem_efficient", "only packed documents have a mask in training"
    mask = None if attn_mask is None else attn_mask.expand(-1, q.shape[1], -1, -1)
    if kernel == "flash":
        return _attend_with_flash(q, k, v, dropout_p, is_causal)
    efficient, cudnn = aten._scaled_dot_product_efficient_attention, aten._scaled_dot_product_cudnn_attention
    y: Tensor = (efficient if kernel == "mem_efficient" else cudnn)(q, k, v, mask, True, dropout_p, is_causal)[0]
    return y


def _attend_with_flash(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, is_causal: bool) -> Tensor:
    width = q.shape[-1]
    missing = -width % kernels.FLASH_ALIGNED
    if missing:
        q, k, v = (F.pad(tensor, (0, missing)) for tensor in (q, k, v))
    y: Tensor = aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]
    return y[..., :width] if missing else y


def run_as_cuda(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operator, and return its results in the dtypes that CUDA's kernel would give them."""
    result = func(*args, **kwargs)
    if func is aten.native_layer_norm.default:
        y, mean, rstd = result
        return y, mean.float(), rstd.float()
    return result


def extras(func: Any, args: Any) -> Iterator[tuple[str, int]]:
    """The temporary allocations of CUDA's kernel for an operator, which are freed before it returns.

    Yields:
        (label, bytes) of each allocation; all of them live at once.
    """
    if func in _ATTENTION:
        allocates, kernel, place = _ATTENTION[func]
        queries, keys = args[place : place + 2]
        batch, count, rows, width = queries.shape
        yield from allocates(kernel, Heads(batch, count, rows, width, queries.element_size(), keys.shape[1]))
    elif func is aten.embedding_dense_backward.default:
        gradient, tokens, rows = args[:3]
        yield from kernels.embedding_backward(tokens.numel(), rows, gradient.shape[-1])
    elif func in _NORMS:
        x = args[_NORMS[func]]
        if not x.is_contiguous():
            yield "rms norm: a contiguous input", x.numel() * x.element_size()
    elif func is aten._foreach_norm.Scalar:
        tensors = args[0]
        yield from kernels.grouped_norm(len(tensors), max(tensor.numel() for tensor in tensors))
    else:
        yield from shared_extras(func, args)


def shared_extras(func: Any, args: Any) -> Iterator[tuple[str, int]]:
    """The temporary allocations, on any device, of operators that call other operators.

    Yields the same as :func:`extras`.
    """
    if func is aten._safe_softmax.default:
        scores = args[0]
        yield "safe softmax: masked scores", scores.numel()
        yield "safe softmax: masked rows", scores.numel() // scores.shape[-1]
