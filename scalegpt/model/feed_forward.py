"""The feed-forward layer and its activations.

A gated layer (Shazeer 2020, arXiv 2002.05202) multiplies two linear layers of the same input: ``activation(gate)·up``. One
matmul makes both: the rows of its matrix [2·F, H] are those of the gate, then those of ``up``.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from scalegpt.config import ModelConfig
from scalegpt.model.layers import Linear

aten = torch.ops.aten


def relu2(x: Tensor) -> Tensor:
    """The square of ReLU (So et al. 2021, arXiv 2109.08668)."""
    return F.relu(x).square()


GATES: dict[str, tuple[Callable[..., Tensor], Any, Any]] = {
    "swiglu": (F.silu, aten.silu.out, aten.silu_backward.grad_input),
    "geglu": (F.gelu, aten.gelu.out, aten.gelu_backward.grad_input),
}
"""Value of the setting ``activation`` → the gate's activation function, its form that writes into a given tensor, and
its gradient."""


def gated(kind: str, x: Tensor) -> Tensor:
    """Compute ``activation(gate)·up`` [..., F] of x [..., 2·F], which holds gate and ``up``.

    It can be differentiated once.

    In eager mode autograd keeps only x, and the backward pass computes the activation again. ``torch.compile`` fuses
    all of it.
    """
    if torch.compiler.is_compiling():
        gate, up = x.chunk(2, dim=-1)
        return GATES[kind][0](gate) * up
    result: Tensor = _Gated.apply(kind, x)  # type: ignore[no-untyped-call]
    return result


class _Gated(torch.autograd.Function):
    """:func:`gated` without temporaries. Each pass allocates only its result and works in place."""

    @staticmethod
    def forward(ctx: Any, kind: str, x: Tensor) -> Tensor:
        ctx.kind = kind
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return GATES[kind][0](gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        _, activate, differentiate = GATES[ctx.kind]
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        d_x = torch.empty_like(x)
        d_gate, d_up = d_x.chunk(2, dim=-1)
        activate(gate, out=d_up)
        d_up.mul_(grad)
        torch.mul(grad, up, out=d_gate)
        differentiate(d_gate, gate, grad_input=d_gate)
        return None, d_x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu2": relu2,
    **{kind: partial(gated, kind) for kind in GATES},
}
"""Value of the setting ``activation`` → the function between the feed-forward layer's matmuls. A gate halves the width."""


class FeedForward(nn.Module):
    """The feed-forward layer: a linear layer from H to F, or to 2·F with a gate, the activation, and one from F to H."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        inner = config.inner_width
        self.fc = Linear(config.n_embd, 2 * inner if config.is_gated else inner, bias=config.has_bias)
        self.proj = Linear(inner, config.n_embd, bias=config.has_bias)
        self.activate = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, H] → [B, T, H]."""
        return self.proj(self.activate(self.fc(x)))  # type: ignore[no-any-return]
