"""A plain training loop in the style of nanoGPT, written for comparison with our trainer.

As in nanoGPT, the model has full logits and ``F.cross_entropy``, optional biases and a tied head. The loop has autocast
around fp32 weights, ``clip_grad_norm_``, fused AdamW over two groups, ``loss.item()`` once per step, and random windows from
a memory map. It reads the next windows while the device works on the current ones.
"""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    """The shape of a model, the sequences of a micro batch (``batch``), and the micro batches of a step (``grad_accum``)."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    batch: int
    bias: bool = True
    grad_accum: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.grad_accum * self.block_size


class _Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.n_head = shape.n_head
        self.c_attn = nn.Linear(shape.n_embd, 3 * shape.n_embd, bias=shape.bias)
        self.c_proj = nn.Linear(shape.n_embd, shape.n_embd, bias=shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        B, T, H = x.shape
        q, k, v = (
            part.view(B, T, self.n_head, H // self.n_head).transpose(1, 2) for part in self.c_attn(x).split(H, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.c_proj(y.transpose(1, 2).contiguous().view(B, T, H))
        return out


class _Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(shape.n_embd, bias=shape.bias)
        self.attn = _Attention(shape)
        self.ln_2 = nn.LayerNorm(shape.n_embd, bias=shape.bias)
        self.fc = nn.Linear(shape.n_embd, 4 * shape.n_embd, bias=shape.bias)
        self.proj = nn.Linear(4 * shape.n_embd, shape.n_embd, bias=shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        out: Tensor = x + self.proj(F.gelu(self.fc(self.ln_2(x))))
        return out


class PlainGPT(nn.Module):
    """A GPT-2 model with nanoGPT's interface: called with token ids and targets, it returns logits and loss."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.wte = nn.Embedding(shape.vocab_size, shape.n_embd)
        self.wpe = nn.Embedding(shape.block_size, shape.n_embd)
        self.blocks = nn.ModuleList(_Block(shape) for _ in range(shape.n_layer))
        self.ln_f = nn.LayerNorm(shape.n_embd, bias=shape.bias)
        self.head = nn.Linear(shape.n_embd, shape.vocab_size, bias=False)
        self.head.weight = self.wte.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * shape.n_layer) if "proj" in name else 1))

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T] ids and targets → logits [B, T, V] and their mean cross entropy."""
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.ln_f(x))
        return logits, F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1), ignore_index=-1)


FP32, AUTOCAST, BF16 = "fp32", "bf16 autocast", "bf16"
"""The precisions of a plain loop: fp32; bf16 under autocast, with fp32 weights; and weights and optimizer in bf16 too."""


class BaselineSteps:
    """Steps of a plain loop.

    Args:
        shape: model and batch.
        data: a folder with ``train.bin``, uint16.
        device: the device.
        precision: :data:`FP32`, :data:`AUTOCAST` or :data:`BF16`.
        compiled: whether the whole model is compiled by ``torch.compile``.
        make: makes the model, with :class:`PlainGPT`'s interface.
    """

    def __init__(
        self,
        shape: Shape,
        data: Path,
        device: torch.device,
        *,
        precision: str,
        compiled: bool,
        make: Callable[[Shape], nn.Module] = PlainGPT,
    ) -> None:
        torch.manual_seed(1)
        self.shape, self.device = shape, device
        self.data = np.memmap(data / "train.bin", dtype=np.uint16, mode="r")
        model = make(shape).to(device, dtype=torch.bfloat16 if precision == BF16 else torch.float32)
        self.parameters = list(model.parameters())
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self.parameters if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in self.parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            [each for each in groups if each["params"]], lr=6e-4, betas=(0.9, 0.95), fused=True
        )
        self.model: Any = torch.compile(model) if compiled else model
        self.autocast: AbstractContextManager[Any] = (
            torch.autocast(device.type, dtype=torch.bfloat16) if precision == AUTOCAST else nullcontext()
        )
        self._next = self._batch()

    def step(self) -> float:
        """Take a step, and return the seconds until the device has finished it."""
        begin = time.perf_counter()
        self.take()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - begin

    def take(self) -> None:
        """Take a step. When it returns, the device may still be working on the step's end."""
        for _ in range(self.shape.grad_accum):
            tokens, targets = self._next
            with self.autocast:
                _, loss = self.model(tokens, targets)
                loss = loss / self.shape.grad_accum
            self._next = self._batch()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss.item()

    def _batch(self) -> tuple[Tensor, Tensor]:
        T = self.shape.block_size
        starts = torch.randint(len(self.data) - T, (self.shape.batch,)).tolist()
        x = torch.stack([torch.from_numpy(self.data[i : i + T].astype(np.int64)) for i in starts])
        y = torch.stack([torch.from_numpy(self.data[i + 1 : i + 1 + T].astype(np.int64)) for i in starts])
        if self.device.type == "cuda":
            return x.pin_memory().to(self.device, non_blocking=True), y.pin_memory().to(self.device, non_blocking=True)
        return x, y
