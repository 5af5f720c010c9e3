"""Grouped-query attention with torch's memory-efficient kernel, which needs as many heads of keys as of queries.

Torch's flash and cuDNN kernels for CUDA and its CPU kernel read grouped keys and values directly. The memory-efficient
kernel does not (torch 2.13, ``sdp_utils.cpp: can_use_mem_efficient_attention``). Here keys and values are expanded for
the kernel in each pass, and autograd keeps them unexpanded.

Sizes: B micro batch, T sequence, a heads of queries, k heads of keys and values, D width of a head.
"""

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


class _Expanded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        repeats = q.shape[1] // k.shape[1]
        y, lse, seed, offset = aten._scaled_dot_product_efficient_attention(
            q, _expand(k, repeats), _expand(v, repeats), _over_heads(mask, q), True, dropout, mask is None
        )
        ctx.save_for_backward(q, k, v, mask, y, lse, seed, offset)
        ctx.dropout = dropout
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, mask, *results = ctx.saved_tensors
        repeats, wanted = q.shape[1] // k.shape[1], (True, True, True, False)
        d_q, d_k, d_v, _ = aten._scaled_dot_product_efficient_attention_backward(
            grad,
            q,
            _expand(k, repeats),
            _expand(v, repeats),
            _over_heads(mask, q),
            *results,
            ctx.dropout,
            wanted,
            mask is None,
        )
        return d_q, _add_up(d_k, repeats), _add_up(d_v, repeats), None, None


def attend_expanded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Attention with the memory-efficient kernel: queries [B, a, T, D], keys and values [B, k, T, D] → [B, a, T, D].

    It is causal, unless ``mask`` [B, 1, T, T] is given.
    """
    y: Tensor = _Expanded.apply(q, k, v, mask, dropout)  # type: ignore[no-untyped-call]
    return y


def _over_heads(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """The mask as a view [B, a, T, T], which the kernel needs."""
    return None if mask is None else mask.expand(-1, q.shape[1], -1, -1)


def _expand(heads: Tensor, repeats: int) -> Tensor:
    """[B, k, T, D] → [B, k·repeats, T, D], each head ``repeats`` times in a row; a copy, unless k is 1."""
    return heads.unsqueeze(2).expand(-1, -1, repeats, -1, -1).flatten(1, 2)


def _add_up(grad: Tensor, repeats: int) -> Tensor:
    """[B, k·repeats, T, D] → [B, k, T, D], the sum over the queries of each group."""
    return grad.view(grad.shape[0], -1, repeats, *grad.shape[2:]).sum(dim=2)
