"""Attention, and the cache of keys and values with which tokens are generated.

Sizes: B micro batch, T sequence, H ``n_embd``, a heads of queries, k heads of keys and values, D width of a head.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from scalegpt.config import ModelConfig
from scalegpt.model.grouped import attend_expanded
from scalegpt.model.layers import Linear, RMSNorm
from scalegpt.model.rotary import rotate

SDPA_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "mem_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}

AttendWhole = Callable[[Tensor, Tensor, Tensor], Tensor | None]
"""(queries [B, T, a, D], keys and values [B, T, k, D]) → causal attention's result [B, T, a·D], or None where torch's kernels
are to be called."""


class KeyValueCache:
    """Keys and values of the tokens seen so far, for one block.

    The first :meth:`append` makes the buffers [B, k, capacity, D], with the dtype and device of its keys and values. Each
    call fills these buffers further, in place.

    Args:
        capacity: the most tokens that the buffers hold.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        """The number of tokens held."""
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add the new tokens' keys and values [B, k, t, D] and return those of all tokens, as views of the buffers."""
        if self._keys is None or self._values is None:
            shape = (*keys.shape[:2], self.capacity, keys.shape[3])
            self._keys, self._values = keys.new_empty(shape), values.new_empty(shape)
        start, self.length = self.length, self.length + keys.shape[2]
        assert self.length <= self.capacity, f"{self.length} tokens in a cache for {self.capacity}"
        self._keys[:, :, start : self.length] = keys
        self._values[:, :, start : self.length] = values
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]


class GenerationCache:
    """One :class:`KeyValueCache` per block: 2·B·k·D·capacity numbers for each block, in the compute dtype."""

    def __init__(self, n_layer: int, capacity: int) -> None:
        self.blocks = [KeyValueCache(capacity) for _ in range(n_layer)]

    @property
    def length(self) -> int:
        """The number of tokens held."""
        return self.blocks[0].length

    def clear(self) -> None:
        """Forget the tokens; the buffers stay for the next ones."""
        for block in self.blocks:
            block.length = 0


class Attention(nn.Module):
    """Causal self-attention; with fewer heads of keys and values than of queries, each serves a group of queries."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head, self.kv_heads, self.head_width = config.n_head, config.kv_heads, config.head_width
        self.dropout = config.dropout
        self.backend: SDPBackend | None = None  # None: torch chooses
        self.attend: AttendWhole | None = None
        self.expands = False  # whether to expand grouped keys and values for torch's memory-efficient kernel
        rows = (self.n_head + 2 * self.kv_heads) * self.head_width
        self.qkv = Linear(config.n_embd, rows, bias=config.has_qkv_bias)
        self.proj = Linear(self.n_head * self.head_width, config.n_embd, bias=config.has_bias)
        self.q_norm, self.k_norm = (
            RMSNorm(self.head_width, eps=config.norm_eps) if config.qk_norm else None for _ in range(2)
        )

    def forward(
        self, x: Tensor, cache: KeyValueCache | None = None, turns: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """[B, T, H] → [B, T, H].

        Args:
            x: the normed hidden states.
            cache: the keys and values of earlier tokens, which x continues.
            turns: rows of the rotary table, [T, R] or [B, T, R], by which queries and keys are turned.
            mask: [B, 1, T, T], added to the scores in place of the causal mask; not together with a cache.
        """
        q, k, v = self.heads(x, turns)
        whole = self.attend(q, k, v) if self.attend is not None and cache is None and mask is None else None
        if whole is not None:
            return self.proj(whole)  # type: ignore[no-any-return]
        y = self._attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), cache, mask)
        return self.proj(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def heads(self, x: Tensor, turns: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, H] → queries [B, T, a, D] and keys [B, T, k, D], normed, then turned by ``turns``, and values [B, T, k, D].

        The result of the matmul is not named: where queries, keys and values are copied out of it, it is freed.
        """
        parts = [self.n_head, self.kv_heads, self.kv_heads]
        q, k, v = torch.split(self.qkv(x).view(*x.shape[:2], -1, self.head_width), parts, dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q = self.q_norm(q)
            k = self.k_norm(k)
        elif turns is not None:
            v = v.clone()  # a view would keep the whole result of the matmul, which norms need, for the backward pass
        if turns is not None:
            q = rotate(q, turns)
            k = rotate(k, turns)
        return q, k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, cache: KeyValueCache | None, mask: Tensor | None) -> Tensor:
        """Queries [B, a, T, D], keys and values [B, k, T, D] → [B, a, T, D], by torch's kernels."""
        past, new = cache.length if cache is not None else 0, q.shape[2]
        if cache is not None:
            k, v = cache.append(k, v)
        # One new token sees everything; a longer continuation sees the past and, causally, itself.
        causal = past == 0 and mask is None
        if past and new > 1:
            mask = _continuation_mask(new, past, q.device)
        dropout = self.dropout if self.training else 0.0
        grouped = self.kv_heads < self.n_head
        if grouped and self.expands and past == 0:
            return attend_expanded(q, k, v, mask, dropout)
        chosen: AbstractContextManager[None] = sdpa_kernel(self.backend) if self.backend is not None else nullcontext()
        with chosen:
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout, enable_gqa=grouped
            )


def _continuation_mask(new: int, past: int, device: torch.device) -> Tensor:
    """A mask [new, past + new] for attention, True where a new token may attend to a token."""
    return torch.ones(new, past + new, dtype=torch.bool, device=device).tril(diagonal=past)
