"""Causal attention by batched matmuls, for processors that multiply bf16 in hardware.

torch's SDPA kernels for CPUs multiply small tiles, converting bf16 to fp32 and back, which leaves AVX-512's bf16
instructions mostly unused. With AMX this holds for the backward kernel only (:class:`ByMatmuls`). This module calls
oneDNN's batched matmul instead, on scores that stay in the caches: at a time, the scores of some heads
(:data:`SCORES_BYTES`) and of :data:`ROWS` queries, with the keys that these queries may see.
``benchmarks/attention_bench.py`` times SDPA and this module side by side.

The function is an operator of torch, ``scalegpt::matmul_attention``, so that selective recompute can keep the result and
``torch.compile`` does not look inside. Autograd keeps QKV, as with SDPA; the backward pass recomputes the probabilities, one
group of heads after another.

Precision: scores and probabilities are rounded to bf16; SDPA's kernel rounds only the probabilities. Softmax and all sums are
fp32. Against fp64 the error is that of bf16's rounding, some 0.5% (``tests/model/test_matmul_attention.py``).

Sizes: B micro batch, T sequence, H features, a heads, D = H/a.
"""

from collections.abc import Iterator
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ROWS = 256
"""Queries of a block: 64 to 1024 were tried, at T of 64 to 2048; 256 was the fastest or nearly so everywhere."""

SCORES_BYTES = 4 * 2**20
"""Bytes of scores that exist at once; with fewer, the larger number of calls costs more than the caches save."""

LONGEST_BACKWARD = 1024
"""The longest sequence whose backward was measured to be faster than SDPA's with AMX; at 2,048 it takes 1.1 times as long."""


class ByMatmuls(Enum):
    """Which passes of attention this module computes instead of torch's kernels."""

    NOTHING = "nothing"
    BACKWARD = "backward"
    ALL = "forward and backward"

    def takes(self, tokens: int) -> bool:
        """Whether :func:`matmul_attention` is called for sequences of this length; else torch's SDPA is."""
        return self is self.ALL or (self is self.BACKWARD and tokens <= LONGEST_BACKWARD)

    def attend(self, qkv: Tensor, n_head: int) -> Tensor | None:
        """:func:`matmul_attention` of QKV [B, T, 3·H], or None where torch's kernels are to be called."""
        if not self.takes(qkv.shape[1]):
            return None
        y: Tensor = matmul_attention(qkv, n_head, torchs_forward=self is self.BACKWARD)
        return y


@torch.library.custom_op("scalegpt::matmul_attention", mutates_args=(), device_types="cpu")
def matmul_attention(qkv: Tensor, n_head: int, torchs_forward: bool = False) -> Tensor:
    """Causal self-attention between the QKV and the output projection.

    Args:
        qkv: [B, T, 3·H], queries, keys and values side by side, each of all heads.
        n_head: a, which divides H.
        torchs_forward: compute the forward pass with SDPA's kernel; the backward pass is the same either way.

    Returns:
        [B, T, H] in qkv's dtype. It can be differentiated once.
    """
    if torchs_forward:
        B, T, width = qkv.shape
        q, k, v = (part.view(B, T, n_head, -1).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, width // 3)
    queries, keys, values = _heads(qkv, n_head)
    y = torch.empty_like(queries)
    for group, rows, seen, shares in _probabilities(queries, keys):
        y[group, rows] = torch.bmm(shares, values[group, seen])
    return _join(y, qkv.shape[0])


@torch.library.custom_op("scalegpt::matmul_attention_backward", mutates_args=(), device_types="cpu")
def _matmul_attention_backward(grad: Tensor, qkv: Tensor, n_head: int) -> Tensor:
    """[B, T, H] gradient of the result → [B, T, 3·H] gradient of QKV."""
    B, T, _ = grad.shape
    queries, keys, values = _heads(qkv, n_head)
    (grad,) = _heads(grad, n_head, parts=1)
    scale = queries.shape[-1] ** -0.5
    sums = qkv.dtype if T <= ROWS else torch.float32  # a single block of queries sums nothing
    d_queries = torch.empty_like(queries)
    d_keys, d_values = (torch.zeros_like(keys, dtype=sums) for _ in range(2))
    for group, rows, seen, shares in _probabilities(queries, keys):
        above = grad[group, rows]
        d_values[group, seen] += torch.bmm(shares.mT, above)
        d_shares = torch.bmm(above, values[group, seen].mT)
        d_scores = torch._softmax_backward_data(d_shares, shares, -1, shares.dtype)
        d_queries[group, rows] = _scaled_bmm(d_scores, keys[group, seen], scale)
        d_keys[group, seen] += _scaled_bmm(d_scores.mT, queries[group, rows], scale)
    result = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    for part, d in zip(result.chunk(3, dim=-1), (d_queries, d_keys, d_values), strict=True):
        part.view(B, T, n_head, -1).copy_(d.view(B, n_head, T, -1).transpose(1, 2))
    return result


def _heads(packed: Tensor, n_head: int, parts: int = 3) -> tuple[Tensor, ...]:
    """[B, T, parts·H] → for each part a contiguous [B·a, T, D]."""
    B, T, _ = packed.shape
    each = packed.view(B, T, parts, n_head, -1).permute(2, 0, 3, 1, 4)
    return tuple(part.reshape(B * n_head, T, -1) for part in each)


def _join(y: Tensor, B: int) -> Tensor:
    """[B·a, T, D] → a contiguous [B, T, H]."""
    _, T, _ = y.shape
    return y.view(B, -1, T, y.shape[-1]).transpose(1, 2).reshape(B, T, -1)


def _probabilities(queries: Tensor, keys: Tensor) -> Iterator[tuple[slice, slice, slice, Tensor]]:
    """Compute the attention probabilities in pieces, each of some heads and one block of queries.

    Args:
        queries: [N, T, D], N = B·a.
        keys: [N, T, D].

    Yields:
        For each piece, the slices of its heads, its queries, and the keys that its last query sees; then the piece's
        probabilities [heads, queries, keys].
    """
    N, T, D = queries.shape
    block = min(ROWS, T)
    hidden = torch.full((block, block), float("-inf"), dtype=queries.dtype).triu(1)
    for start in range(0, T, block):
        end = min(start + block, T)
        size = end - start
        at_once = max(torch.get_num_threads(), SCORES_BYTES // (size * end * queries.element_size()))
        for first in range(0, N, at_once):
            group, rows, seen = slice(first, first + at_once), slice(start, end), slice(0, end)
            scores = _scaled_bmm(queries[group, rows], keys[group, seen].mT, D**-0.5)
            scores[:, :, start:] += hidden[:size, :size]
            yield group, rows, seen, torch.softmax(scores, dim=-1)


def _scaled_bmm(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """``scale`` · ``left`` @ ``right``, in one batched matmul that also scales."""
    nothing = left.new_empty(()).expand(1, 1, 1)
    return torch.baddbmm(nothing, left, right, beta=0, alpha=scale)


@matmul_attention.register_fake
def _(qkv: Tensor, n_head: int, torchs_forward: bool = False) -> Tensor:  # noqa: ARG001 - the operator's signature
    return qkv.new_empty((*qkv.shape[:2], qkv.shape[2] // 3))


@_matmul_attention_backward.register_fake
def _(grad: Tensor, qkv: Tensor, n_head: int) -> Tensor:  # noqa: ARG001 - the operator's signature
    return qkv.new_empty(qkv.shape)


def _save(ctx: Any, inputs: tuple[Tensor, int, bool], output: Tensor) -> None:  # noqa: ARG001 - torch's signature
    qkv, ctx.n_head, _ = inputs
    ctx.save_for_backward(qkv)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return _matmul_attention_backward(grad.contiguous(), *ctx.saved_tensors, ctx.n_head), None, None


matmul_attention.register_autograd(_backward, setup_context=_save)
