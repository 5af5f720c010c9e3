"""The GPT: layers, attention, feed-forward, block, model.

- GPT-2's shape: pre-norm blocks, learned positions, a feed-forward layer of width 4H, LayerNorm with eps 1e-5.
- One matmul makes queries, keys and values. Attention is torch's ``scaled_dot_product_attention`` (SDPA),
  unless :meth:`GPT.set_attention` is given another function, which is used when there is no key-value cache.
- The head may share the token embedding's matrix. It is applied inside the loss, so that the chunked loss never holds
  all logits.
- **Precision is explicit.** Each layer casts its weight to its input's dtype where it is used, and the embedding decides
  that dtype. So weights may be fp32 masters (``plain``) or in the compute dtype already (FSDP2 and DeepSpeed cast them
  beforehand): the arithmetic is the same without autocast, and the backends agree.

Sizes: B micro batch, T sequence, H ``n_embd``, a heads, D = H/a, V vocabulary. Parameter names are part of the
checkpoint format and are listed by :func:`scalegpt.architecture.decoder.parameter_shapes`.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from scalegpt.config import ModelConfig
from scalegpt.errors import InputError
from scalegpt.model.loss import Loss, full_cross_entropy, soft_capped

LAYER_NORM_EPS = 1e-5
INIT_STD = 0.02

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


def _cast(parameter: Tensor | None, like: Tensor) -> Tensor | None:
    return None if parameter is None else parameter.to(like.dtype)


class Linear(nn.Linear):
    """A linear layer whose weights are cast to the input's dtype where they are used."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out], in x's dtype."""
        return F.linear(x, self.weight.to(x.dtype), _cast(self.bias, x))


class LayerNorm(nn.LayerNorm):
    """LayerNorm of an input of any dtype; the statistics are fp32 inside torch's kernel."""

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """[..., H] → [..., H], in ``dtype`` or x's own."""
        y = F.layer_norm(x, self.normalized_shape, _cast(self.weight, x), _cast(self.bias, x), self.eps)
        return y if dtype is None else y.to(dtype)


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


def relu2(x: Tensor) -> Tensor:
    """The square of ReLU (So et al. 2021, arXiv 2109.08668)."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu2": relu2,
}
"""Value of the setting ``activation`` → the feed-forward layer's activation function."""


class FeedForward(nn.Module):
    """The feed-forward layer: a linear layer from H to 4·H, the activation, and a linear layer back to H."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.has_bias)
        self.proj = Linear(4 * config.n_embd, config.n_embd, bias=config.has_bias)
        self.activate = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, H] → [B, T, H]."""
        return self.proj(self.activate(self.fc(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """One transformer block: attention, then feed-forward, each on a normalised copy of the residual stream.

    In a parallel block both branches read the block's input. :mod:`scalegpt.model.recompute` sets ``recompute``, a function
    that runs :meth:`body` and recomputes in the backward pass.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln1 = LayerNorm(config.n_embd, eps=LAYER_NORM_EPS, bias=config.has_bias)
        self.attn = Attention(config)
        self.ln2 = LayerNorm(config.n_embd, eps=LAYER_NORM_EPS, bias=config.has_bias)
        self.mlp = FeedForward(config)
        self.is_parallel = config.parallel_block
        self.dropout = config.dropout
        self.compute_dtype = torch.float32
        self.recompute: Callable[..., Tensor] | None = None

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """[B, T, H] → [B, T, H], through ``recompute`` if it is set and gradients are on."""
        if self.recompute is None or not torch.is_grad_enabled():
            return self.body(x, cache)
        return self.recompute(self.body, x)

    def body(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """The block's arithmetic, [B, T, H] → [B, T, H]; ``+`` promotes to fp32 if the residual stream is fp32."""
        middle = x + self._drop(self.attn(self.ln1(x, self.compute_dtype), cache))
        read = x if self.is_parallel else middle
        return middle + self._drop(self.mlp(self.ln2(read, self.compute_dtype)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class GPT(nn.Module):
    """The language model.

    Args:
        config: the shape; its vocabulary must be known.
        loss: (hidden states, head's matrix, targets) → mean loss; also called with ``softcap`` if the model caps its logits.

    Raises:
        InputError: the vocabulary is still ``auto``.
    """

    def __init__(self, config: ModelConfig, loss: Callable[..., Tensor] = full_cross_entropy) -> None:
        super().__init__()
        if config.vocab_size < 1:
            raise InputError(
                "vocab_size auto takes the size from the data's tokenizer, but there is no data; give --vocab_size N"
            )
        self.config = config
        self.set_loss(loss)
        self.compute_dtype = torch.float32
        self.residual_dtype = torch.float32
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, eps=LAYER_NORM_EPS, bias=config.has_bias)
        self.head = None if config.tie_head else Linear(config.n_embd, config.vocab_size, bias=False)
        # The shapes before sharding: ZeRO-3 leaves parameters empty.
        self.shapes = {name: tuple(parameter.shape) for name, parameter in self.named_parameters()}

    @property
    def layers(self) -> list[Block]:
        """The blocks, typed as :class:`Block`: a ``ModuleList`` only knows that they are modules."""
        return cast(list[Block], list(self.blocks))

    def initial_weights(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """GPT-2's initialisation, one fp32 CPU tensor at a time, by parameter name.

        Matrices are drawn from a normal distribution of standard deviation 0.02, or 0.02/√(2L) for projections into the
        residual stream. Norms' weights are ones, biases zeros. Tensors are drawn on the CPU in the order of the model's
        parameters. So a seed gives the same model on every device, backend and number of ranks, and no rank holds more than
        one whole matrix.
        """
        generator = torch.Generator().manual_seed(seed)
        scaled = INIT_STD / math.sqrt(2 * self.config.n_layer)
        for name, shape in self.shapes.items():
            if len(shape) == 1:
                yield name, torch.full(shape, 1.0 if name.endswith("weight") else 0.0, device="cpu")
            else:
                std = scaled if name.endswith("proj.weight") else INIT_STD
                yield name, torch.empty(shape, device="cpu").normal_(0.0, std, generator=generator)

    def set_loss(self, loss: Callable[..., Tensor]) -> None:
        """Replace the loss; it is called with ``softcap`` if the model caps its logits."""
        cap = self.config.logit_softcap
        self.loss: Loss = loss if cap is None else partial(loss, softcap=cap)

    def set_precision(self, compute: torch.dtype, residual: torch.dtype | None = None) -> None:
        """Compute in ``compute``, with the residual stream in ``residual`` (default: the compute dtype)."""
        self.compute_dtype = compute
        self.residual_dtype = residual or compute
        for block in self.layers:
            block.compute_dtype = compute

    def set_attention(self, name: str, *, attend: AttendWhole | None = None) -> None:
        """Choose the function or the SDPA backend that computes attention.

        Args:
            name: the name of SDPA's backend; ``auto`` leaves the choice to torch.
            attend: a function, without dropout, to call instead of SDPA when there is no cache; None: always SDPA.
        """
        for block in self.layers:
            block.attn.backend = SDPA_BACKENDS.get(name)
            block.attn.attend = attend

    def forward(self, tokens: Tensor, targets: Tensor | None = None, cache: GenerationCache | None = None) -> Tensor:
        """Compute the mean loss if there are targets, else the logits of the last position.

        Args:
            tokens: [B, T] int64 ids, T at most ``block_size``, less the number of cached tokens.
            targets: [B, T] int64 ids, -1 where a position does not count in the mean loss.
            cache: keys and values of earlier tokens; ``tokens`` continue them.

        Returns:
            The loss, an fp32 scalar, or without targets the logits [B, V] of the last position, in fp32.
        """
        past = cache.length if cache is not None else 0
        x = self.embed(tokens, past)
        for i, block in enumerate(self.blocks):
            x = block(x, cache.blocks[i]) if cache is not None else block(x)
        head = self.wte.weight if self.head is None else self.head.weight
        if targets is None:
            logits = F.linear(self.ln_f(x[:, -1], self.compute_dtype), head.to(self.compute_dtype))
            return soft_capped(logits.float(), self.config.logit_softcap)
        return self.loss(self.ln_f(x, self.compute_dtype), head, targets)

    def embed(self, tokens: Tensor, past: int = 0) -> Tensor:
        """[B, T] ids at positions past … past + T - 1 → the residual stream [B, T, H]."""
        positions = torch.arange(past, past + tokens.shape[1], device=tokens.device)
        token, position = self.wte(tokens).to(self.compute_dtype), self.wpe(positions).to(self.compute_dtype)
        x: Tensor = (token + position).to(self.residual_dtype)
        return F.dropout(x, self.config.dropout, self.training) if self.config.dropout else x
