"""Causal attention by batched matmuls, for processors that multiply bf16 in hardware.

Torch's SDPA kernels for CPUs multiply small tiles and convert bf16 to fp32 and back, so they hardly use AVX-512's bf16
instructions. With AMX only the backward kernel has this problem (:class:`ByMatmuls`). This module calls oneDNN's
batched matmul instead, on scores that stay in the caches: each call computes the scores of some heads
(:data:`SCORES_BYTES`) and of :data:`ROWS` queries, with the keys that these queries may see.
``benchmarks/attention_bench.py`` times SDPA and this module side by side.

The function is an operator of torch, ``scalegpt::matmul_attention``, so that selective recompute can keep the result and
``torch.compile`` does not look inside. Autograd keeps queries, keys and values, as with SDPA; the backward pass recomputes
the probabilities, one group of heads after another.

With fewer heads of keys than of queries (grouped-query attention), the queries that share a head of keys are rows of one
matmul, so that nothing is expanded.

Precision: scores and probabilities are rounded to bf16; SDPA's kernel rounds only the probabilities. Softmax and all
sums are fp32. The error against fp64 is that of bf16's rounding, about 0.5% (``tests/model/test_matmul_attention.py``).

Sizes: B micro batch, T sequence, a heads of queries, k heads of keys and values, g = a/k heads in a group, D width of a
head.
"""

from collections.abc import Iterator
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ROWS = 256
"""Rows of a block, which has g queries for each position. Of 64 to 1024, tried with g = 1 and T from 64 to 2048, 256
was always the fastest or nearly so."""

SCORES_BYTES = 4 * 2**20
"""Bytes of scores that exist at once. With fewer bytes, the additional calls cost more than the caches save."""

LONGEST_BACKWARD = 1024
"""The longest sequence whose backward pass was measured to be faster than SDPA's with AMX. At 2,048 it takes 1.1 times
as long."""


class ByMatmuls(Enum):
    """Which passes of attention this module computes instead of torch's kernels."""

    NOTHING = "nothing"
    BACKWARD = "backward"
    ALL = "forward and backward"

    def takes(self, tokens: int) -> bool:
        """Whether :func:`matmul_attention`, rather than torch's SDPA, is called for sequences of this length."""
        return self is self.ALL or (self is self.BACKWARD and tokens <= LONGEST_BACKWARD)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        """:func:`matmul_attention`, or None if torch's kernels are to be called."""
        if not self.takes(q.shape[1]):
            return None
        y: Tensor = matmul_attention(q, k, v, torchs_forward=self is self.BACKWARD)
        return y


@torch.library.custom_op("scalegpt::matmul_attention", mutates_args=(), device_types="cpu")
def matmul_attention(q: Tensor, k: Tensor, v: Tensor, torchs_forward: bool = False) -> Tensor:
    """Causal self-attention between the QKV and the output projection.

    Args:
        q: queries [B, T, a, D].
        k: keys [B, T, k, D]; k divides a, and each head of keys serves a/k heads of queries in a row.
        v: values, of the same shape as the keys.
        torchs_forward: compute the forward pass with SDPA's kernel; the backward pass is the same either way.

    Returns:
        [B, T, a·D] in q's dtype. It can be differentiated once.
    """
    B, T, heads, _ = k.shape
    if torchs_forward:
        grouped, (q, k, v) = heads < q.shape[2], (part.transpose(1, 2) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return y.transpose(1, 2).reshape(B, T, -1)
    queries, keys, values = (_rows(part, heads) for part in (q, k, v))
    y = torch.empty_like(queries)
    for group, rows, seen, shares in _probabilities(queries, keys):
        y[group, rows] = torch.bmm(shares, values[group, seen])
    return _heads(y, B, T).reshape(B, T, -1)


@torch.library.custom_op("scalegpt::matmul_attention_backward", mutates_args=(), device_types="cpu")
def _matmul_attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, T, a·D] gradient of the result → the gradients of q, k and v."""
    B, T, heads, _ = k.shape
    queries, keys, values, grad = (_rows(part, heads) for part in (q, k, v, grad.view(q.shape)))
    scale = queries.shape[-1] ** -0.5
    sums = q.dtype if queries.shape[1] <= ROWS else torch.float32  # a single block of queries sums nothing
    d_queries = torch.empty_like(queries)
    d_keys, d_values = (torch.zeros_like(keys, dtype=sums) for _ in range(2))
    for group, rows, seen, shares in _probabilities(queries, keys):
        above = grad[group, rows]
        d_values[group, seen] += torch.bmm(shares.mT, above)
        d_shares = torch.bmm(above, values[group, seen].mT)
        d_scores = torch._softmax_backward_data(d_shares, shares, -1, shares.dtype)
        d_queries[group, rows] = _scaled_bmm(d_scores, keys[group, seen], scale)
        d_keys[group, seen] += _scaled_bmm(d_scores.mT, queries[group, rows], scale)
    return _heads(d_queries, B, T), _heads(d_keys.to(k.dtype), B, T), _heads(d_values.to(v.dtype), B, T)


def _rows(part: Tensor, heads: int) -> Tensor:
    """[B, T, g·heads, D] → a contiguous [B·heads, T·g, D], the g heads of a group in neighbouring rows."""
    B, T, all_heads, D = part.shape
    grouped = part.view(B, T, heads, all_heads // heads, D)
    return grouped.transpose(1, 2).reshape(B * heads, -1, D).contiguous()


def _heads(rows: Tensor, B: int, T: int) -> Tensor:
    """[B·heads, T·g, D] → [B, T, g·heads, D], a view if g is 1."""
    N, _, D = rows.shape
    return rows.view(B, N // B, T, -1, D).transpose(1, 2).flatten(2, 3)


def _probabilities(queries: Tensor, keys: Tensor) -> Iterator[tuple[slice, slice, slice, Tensor]]:
    """Compute the attention probabilities in pieces, each of some heads and one block of queries.

    Args:
        queries: [N, T·g, D], N = B·k.
        keys: [N, T, D].

    Yields:
        For each piece, the slices of its heads, its queries, and the keys that its last query sees; then the piece's
        probabilities [heads, queries, keys].
    """
    (N, T, D), g = keys.shape, queries.shape[1] // keys.shape[1]
    block = min(max(1, ROWS // g), T)
    hidden = torch.full((block, block), float("-inf"), dtype=queries.dtype).triu(1).repeat_interleave(g, dim=0)
    for start in range(0, T, block):
        end = min(start + block, T)
        size = end - start
        at_once = max(torch.get_num_threads(), SCORES_BYTES // (g * size * end * queries.element_size()))
        for first in range(0, N, at_once):
            group, rows, seen = slice(first, first + at_once), slice(start * g, end * g), slice(0, end)
            scores = _scaled_bmm(queries[group, rows], keys[group, seen].mT, D**-0.5)
            scores[:, :, start:] += hidden[: size * g, :size]
            yield group, rows, seen, torch.softmax(scores, dim=-1)


def _scaled_bmm(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """``scale`` · ``left`` @ ``right``, in one batched matmul that also scales."""
    nothing = left.new_empty(()).expand(1, 1, 1)
    return torch.baddbmm(nothing, left, right, beta=0, alpha=scale)


@matmul_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, torchs_forward: bool = False) -> Tensor:  # noqa: ARG001 - the operator's signature
    return q.new_empty((*q.shape[:2], q.shape[2] * q.shape[3]))


@_matmul_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG001 - as above
    B, T, heads, D = k.shape
    d_q, d_k, d_v = (part.new_empty(B * heads, part.shape[2] // heads * T, D) for part in (q, k, v))
    return _heads(d_q, B, T), _heads(d_k, B, T), _heads(d_v, B, T)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool], output: Tensor) -> None:  # noqa: ARG001 - torch's signature
    ctx.save_for_backward(*inputs[:3])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *_matmul_attention_backward(grad.contiguous(), *ctx.saved_tensors), None


matmul_attention.register_autograd(_backward, setup_context=_save)
