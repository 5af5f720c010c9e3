"""Attention, and the cache of keys and values with which tokens are generated."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from scalegpt.config import ModelConfig
from scalegpt.model.layers import Linear

SDPA_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "mem_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}

AttendWhole = Callable[[Tensor, int], Tensor | None]
"""(QKV [B, T, 3·H], heads) → causal attention's result [B, T, H], or None where torch's kernels are to be called."""


class KeyValueCache:
    """Keys and values of the tokens seen so far, for one block.

    The first :meth:`append` makes the buffers [B, a, capacity, D], with the dtype and device of its keys and values. Each
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
        """Add the new tokens' keys and values [B, a, t, D] and return those of all tokens, as views of the buffers."""
        if self._keys is None or self._values is None:
            shape = (*keys.shape[:2], self.capacity, keys.shape[3])
            self._keys, self._values = keys.new_empty(shape), values.new_empty(shape)
        start, self.length = self.length, self.length + keys.shape[2]
        assert self.length <= self.capacity, f"{self.length} tokens in a cache for {self.capacity}"
        self._keys[:, :, start : self.length] = keys
        self._values[:, :, start : self.length] = values
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]


class GenerationCache:
    """One :class:`KeyValueCache` per block: 2·B·H·capacity numbers for each block, in the compute dtype."""

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
    """Causal multi-head self-attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.backend: SDPBackend | None = None  # None: torch chooses
        self.attend: AttendWhole | None = None
        self.qkv = Linear(config.n_embd, 3 * config.n_embd, bias=config.has_qkv_bias)
        self.proj = Linear(config.n_embd, config.n_embd, bias=config.has_bias)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """[B, T, H] → [B, T, H]. With a cache, x continues the cached tokens."""
        B, T, H = x.shape
        qkv = self.qkv(x)
        whole = self.attend(qkv, self.n_head) if self.attend is not None and cache is None else None
        if whole is not None:
            return self.proj(whole)  # type: ignore[no-any-return]
        # Split before shaping into heads [B, a, T, D]: the backward pass then joins the three gradients in one copy.
        q, k, v = (part.view(B, T, self.n_head, H // self.n_head).transpose(1, 2) for part in qkv.split(H, dim=2))
        past = cache.length if cache is not None else 0
        if cache is not None:
            k, v = cache.append(k, v)
        # One new token sees everything; a longer continuation sees the past and, causally, itself.
        mask = _continuation_mask(T, past, x.device) if past and T > 1 else None
        chosen: AbstractContextManager[None] = sdpa_kernel(self.backend) if self.backend is not None else nullcontext()
        with chosen:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=past == 0, dropout_p=self.dropout if self.training else 0.0
            )
        return self.proj(y.transpose(1, 2).reshape(B, T, H))  # type: ignore[no-any-return]


def _continuation_mask(new: int, past: int, device: torch.device) -> Tensor:
    """A mask [new, past + new] for attention, True where a new token may attend to a token."""
    return torch.ones(new, past + new, dtype=torch.bool, device=device).tril(diagonal=past)
