"""What CUDA's kernels allocate where the CPU's, or tensors without data, would tell another story.

A trace runs on tensors that say they live on the CPU, so torch takes its CPU paths. This module puts CUDA's in their
place. All that is CUDA's alone stands here, each with its source in torch, to be held against a real card:

==================================  ===================================================================================
what                                source
==================================  ===================================================================================
the attention kernel                aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, ``priority_order``
flash: fp32 sum of dQ, rows of dP   aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp, ``mha_bwd``
mem_efficient: dO · O in fp32       aten/src/ATen/native/transformers/cuda/attention_backward.cu
cudnn: its workspace                opaque; taken to be what flash needs. An estimate
LayerNorm's statistics in fp32      aten/src/ATen/native/cuda/layer_norm_kernel.cu (the CPU keeps them in bf16)
dropout's mask of one byte          aten/src/ATen/native/Dropout.cpp, ``native_dropout`` (the CPU's has the input's dtype)
embedding: partial sums, sorting    aten/src/ATen/native/cuda/Embedding.cu, EmbeddingBackwardKernel.cu
norms: a number for each chunk      aten/src/ATen/native/cuda/ForeachReduceOp.cu
==================================  ===================================================================================

Not here, because it is the same in every step: the workspaces of cuBLAS, which the allocator counts as well.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from scalegpt.backends.base import DTYPES
from scalegpt.config import RunConfig

FLASH_ROWS = 128
"""Flash attention's backward rounds the number of queries up to a multiple of this."""
FLASH_WIDTH = 32
"""And the head's width to a multiple of this."""
FLASH_WIDEST = 256
"""The widest head that flash attention takes."""
FLASH_ALIGNED = 8
"""A head whose width this does not divide is padded before flash attention."""
EMBEDDING_UNSORTED = 3072
"""Up to so many tokens, the embedding's backward sums without sorting them, and needs no space."""
EMBEDDING_ROWS = 10
"""Rows that a thread of the sorted sum adds (``NROWS_PER_THREAD``)."""
NORM_CHUNK = 65_536
"""Elements that a block of the grouped norm takes (``kChunkSize``)."""

aten = torch.ops.aten

_FLASH_BACKWARD = aten._scaled_dot_product_flash_attention_backward.default
_EFFICIENT_BACKWARD = aten._scaled_dot_product_efficient_attention_backward.default
_CUDNN_BACKWARD = aten._scaled_dot_product_cudnn_attention_backward.default


def attention_kernel(run: RunConfig) -> str:
    """The kernel that CUDA computes the run's attention with: ``flash``, ``mem_efficient``, ``cudnn`` or ``math``.

    Where torch chooses: flash for bf16 and fp16, and mem_efficient for fp32 or heads wider than 256. On compute
    capability 9.0 and 10.0, newer builds of torch take cuDNN's instead, which keeps the same tensors.
    """
    if run.train.attention != "auto":
        return run.train.attention
    half = DTYPES[run.train.precision].itemsize == 2
    return "flash" if half and run.model.head_size <= FLASH_WIDEST else "mem_efficient"


@contextmanager
def cuda_functions(kernel: str) -> Iterator[None]:
    """While it lasts, attention and dropout call the kernels that CUDA would.

    The two functions are replaced where the model looks them up: torch suspends a ``TorchFunctionMode`` in the backward,
    where what is computed again needs it too.

    Args:
        kernel: what :func:`attention_kernel` says.
    """
    dropout, attention = F.dropout, F.scaled_dot_product_attention
    F.dropout = _dropout  # type: ignore[assignment]
    if kernel != "math":
        F.scaled_dot_product_attention = partial(_attend, kernel)
    try:
        yield
    finally:
        F.dropout, F.scaled_dot_product_attention = dropout, attention


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    assert not inplace
    return torch.native_dropout(x, p, train=True)[0] if training and p > 0 else x


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
    if kernel == "mem_efficient":
        y: Tensor = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, dropout_p, is_causal)[0]
        return y
    width = q.shape[-1]
    missing = -width % FLASH_ALIGNED
    if missing:
        q, k, v = (F.pad(tensor, (0, missing)) for tensor in (q, k, v))
    if kernel == "cudnn":
        y = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, dropout_p, is_causal)[0]
    else:
        y = aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]
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
    if func in {_FLASH_BACKWARD, _CUDNN_BACKWARD}:
        yield from _flash_backward(*args[1].shape)
    elif func is _EFFICIENT_BACKWARD:
        yield from _efficient_backward(args[1])
    elif func is aten.embedding_dense_backward.default:
        yield from _embedding_backward(*args[:3])
    elif func is aten._foreach_norm.Scalar:
        yield from _norms(args[0])
    else:
        yield from shared_extras(func, args)


def shared_extras(func: Any, args: Any) -> Iterator[tuple[str, int]]:
    """The same for operators that are made of others, on every device alike."""
    if func is aten._safe_softmax.default:
        scores = args[0]
        yield "safe softmax: what is masked", scores.numel()
        yield "safe softmax: rows that are", scores.numel() // scores.shape[-1]


def _flash_backward(B: int, heads: int, T: int, D: int) -> Iterator[tuple[str, int]]:
    rows, width = _up(T, FLASH_ROWS), _up(D, FLASH_WIDTH)
    yield "flash backward: softmax_d", 4 * B * heads * rows
    yield "flash backward: dq_accum", 4 * B * rows * heads * width


def _efficient_backward(q: Tensor) -> Iterator[tuple[str, int]]:
    B, heads, T, _ = q.shape
    yield "mem_efficient backward: delta", 4 * B * heads * T
    if q.dtype == torch.float32:
        yield "mem_efficient backward: dO · O", 4 * q.numel()
    else:
        yield "mem_efficient backward: fp32 dQ", 4 * q.numel()


def _embedding_backward(grad: Tensor, tokens: Tensor, rows: int) -> Iterator[tuple[str, int]]:
    n = tokens.numel()
    if n <= EMBEDDING_UNSORTED:
        return
    segments = min(n, rows)
    parts = n // EMBEDDING_ROWS + segments
    for label, count in (
        ("sorted tokens", n),
        ("their places", n),
        ("segments", n),
        ("parts per segment", segments),
        ("offsets", segments),
        ("parts", parts),
    ):
        yield f"embedding backward: {label}", 8 * count
    yield "embedding backward: partial sums", 4 * parts * grad.shape[-1]


def _norms(tensors: list[Tensor]) -> Iterator[tuple[str, int]]:
    chunks = max(math.ceil(tensor.numel() / NORM_CHUNK) for tensor in tensors)
    yield "grouped norm: partial sums", 4 * len(tensors) * chunks


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
