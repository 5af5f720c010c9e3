"""The GPT: block and model.

- Pre-norm blocks. Positions are learned (GPT-2), or rotary in each block's attention, or there are none.
- One matmul makes queries, keys and values. Attention is torch's ``scaled_dot_product_attention`` (SDPA),
  unless :meth:`GPT.set_attention` is given another function, which is used when there is no key-value cache.
- The head may share the token embedding's matrix. It is applied inside the loss, so that the chunked loss never holds
  all logits.
- **Precision is explicit.** Each layer casts its weight to its input's dtype when it uses it, and the embedding decides
  that dtype. Weights may therefore be fp32 masters (``plain``), or already in the compute dtype (FSDP2 and DeepSpeed
  cast them beforehand). The arithmetic is the same without autocast, and the backends agree.

Sizes: B micro batch, T sequence, H ``n_embd``, V vocabulary. Parameter names are part of the
checkpoint format and are listed by :func:`scalegpt.architecture.decoder.parameter_shapes`.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scalegpt.config import ModelConfig
from scalegpt.errors import InputError
from scalegpt.model.attention import SDPA_BACKENDS, AttendWhole, Attention, GenerationCache, KeyValueCache
from scalegpt.model.feed_forward import FeedForward
from scalegpt.model.layers import Linear, norm_of
from scalegpt.model.loss import Loss, full_cross_entropy, soft_capped
from scalegpt.model.packing import counted_share, pack
from scalegpt.model.rotary import RotaryTable

INIT_STD = 0.02


class Block(nn.Module):
    """One transformer block: attention, then feed-forward, each on a normalised copy of the residual stream.

    In a parallel block both branches read the block's input. :mod:`scalegpt.model.recompute` sets ``recompute``, a function
    that runs :meth:`body` and recomputes in the backward pass.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln1 = norm_of(config)
        self.attn = Attention(config)
        self.ln2 = norm_of(config)
        self.mlp = FeedForward(config)
        self.is_parallel = config.parallel_block
        self.dropout = config.dropout
        self.compute_dtype = torch.float32
        self.recompute: Callable[..., Tensor] | None = None

    def forward(
        self, x: Tensor, cache: KeyValueCache | None = None, turns: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """[B, T, H] → [B, T, H], through ``recompute`` if it is set and gradients are on.

        Further arguments are passed to attention.
        """
        if self.recompute is None or not torch.is_grad_enabled():
            return self.body(x, cache, turns, mask)
        return self.recompute(self.body, x, None, turns, mask)

    def body(
        self, x: Tensor, cache: KeyValueCache | None = None, turns: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """The block's arithmetic, [B, T, H] → [B, T, H]; ``+`` promotes to fp32 if the residual stream is fp32."""
        middle = x + self._drop(self.attn(self.ln1(x, self.compute_dtype), cache, turns, mask))
        read = x if self.is_parallel else middle
        return middle + self._drop(self.mlp(self.ln2(read, self.compute_dtype)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class GPT(nn.Module):
    """The language model.

    Args:
        config: the shape; its vocabulary must be known.
        loss: a function from hidden states, the head's matrix and targets to the mean loss; called with ``softcap`` too
            if the model caps its logits.

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
        self.document_end: int | None = None
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.position == "learned" else None
        self.rotary = RotaryTable(config) if config.position == "rope" else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = norm_of(config)
        self.head = None if config.tie_head else Linear(config.n_embd, config.vocab_size, bias=False)
        # The shapes before sharding: ZeRO-3 leaves parameters empty.
        self.shapes = {name: tuple(parameter.shape) for name, parameter in self.named_parameters()}

    @property
    def layers(self) -> list[Block]:
        """The blocks, typed as :class:`Block`, since a ``ModuleList`` only knows that they are modules."""
        return cast(list[Block], list(self.blocks))

    @property
    def tables(self) -> list[Tensor]:
        """The tensors that the model holds besides its parameters: the rotary table, once for each device that used it."""
        return [] if self.rotary is None else self.rotary.made

    def initial_weights(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """GPT-2's initialisation, one fp32 CPU tensor at a time, by parameter name.

        Matrices are drawn from a normal distribution of standard deviation 0.02, or 0.02/√(2L) for projections into the
        residual stream. Weights of norms are ones, biases are zeros. Tensors are drawn on the CPU in the order of the
        model's parameters, so a seed gives the same model on every device, backend and number of ranks, and no rank
        holds more than one whole matrix.
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
        """Replace the loss. It is called with ``softcap`` if the model caps its logits."""
        cap = self.config.logit_softcap
        self.loss: Loss = loss if cap is None else partial(loss, softcap=cap)

    def set_precision(self, compute: torch.dtype, residual: torch.dtype | None = None) -> None:
        """Compute in ``compute``, with the residual stream in ``residual`` (default: the compute dtype)."""
        self.compute_dtype = compute
        self.residual_dtype = residual or compute
        for block in self.layers:
            block.compute_dtype = compute

    def set_packing(self, document_end: int | None) -> None:
        """Keep attention and positions inside documents, which end with the token ``document_end``; None: do not."""
        self.document_end = document_end

    def set_attention(self, name: str, *, attend: AttendWhole | None = None, expands: bool = False) -> None:
        """Choose the function or the SDPA backend that computes attention.

        Args:
            name: the name of SDPA's backend; ``auto`` leaves the choice to torch.
            attend: a function, without dropout, to call instead of SDPA when there is no cache; None: always SDPA.
            expands: whether grouped keys and values are expanded for SDPA's memory-efficient backend.
        """
        for block in self.layers:
            block.attn.backend = SDPA_BACKENDS.get(name)
            block.attn.attend = attend
            block.attn.expands = expands

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        cache: GenerationCache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Compute the mean loss if there are targets, else the logits of the last position.

        Args:
            tokens: [B, T] int64 ids. T and the number of cached tokens together are at most ``block_size``.
            targets: [B, T] int64 ids; positions with -1 do not count in the mean loss.
            cache: keys and values of earlier tokens; ``tokens`` continue them.
            positions: int64 [B, T] or [T], below ``block_size``; None: those that follow the cached tokens, or if
                documents are packed and there are targets, those inside the documents.

        Returns:
            The loss, an fp32 scalar, or without targets the logits [B, V] of the last position, in fp32. In training on
            packed documents, the loss is multiplied by the share of the targets that count, so that the sum over micro
            batches does not depend on their size.
        """
        past, mask = cache.length if cache is not None else 0, None
        if targets is not None and self.document_end is not None:
            positions, mask = pack(tokens, self.document_end, self.compute_dtype)
        x = self.embed(tokens, past, positions)
        turns = self._turns(tokens, past, positions)
        for i, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache.blocks[i], turns, mask)
        head = self.wte.weight if self.head is None else self.head.weight
        if targets is None:
            logits = F.linear(self.ln_f(x[:, -1], self.compute_dtype), head.to(self.compute_dtype))
            return soft_capped(logits.float(), self.config.logit_softcap)
        loss = self.loss(self.ln_f(x, self.compute_dtype), head, targets)
        return loss * counted_share(targets) if mask is not None and self.training else loss

    def embed(self, tokens: Tensor, past: int = 0, positions: Tensor | None = None) -> Tensor:
        """[B, T] ids at ``positions``, or at past … past + T - 1 → the residual stream [B, T, H]."""
        x: Tensor = self.wte(tokens).to(self.compute_dtype)
        if self.wpe is not None:
            if positions is None:
                positions = torch.arange(past, past + tokens.shape[1], device=tokens.device)
            x = x + self.wpe(positions).to(self.compute_dtype)
        x = x.to(self.residual_dtype)
        return F.dropout(x, self.config.dropout, self.training) if self.config.dropout else x

    def _turns(self, tokens: Tensor, past: int, positions: Tensor | None) -> Tensor | None:
        """The rows of the rotary table for these positions, [T, R] or [B, T, R]; None without rotary positions."""
        if self.rotary is None:
            return None
        table = self.rotary.on(tokens.device)
        return table[past : past + tokens.shape[1]] if positions is None else table[positions]
