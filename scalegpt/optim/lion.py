"""Lion (Chen et al. 2023, arXiv 2302.06675, program 1): the sign of an interpolated momentum.

The update of a weight w with gradient g and momentum m, for learning rate γ, weight decay λ and decays β₁ and β₂, is::

    u ← sign(β₁·m + (1 - β₁)·g),   w ← (1 - γ·λ)·w - γ·u,   m ← β₂·m + (1 - β₂)·g
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from scalegpt.backends.base import local
from scalegpt.config.optimizers import EXP_AVG


class Lion(Optimizer):
    """Lion over groups of parameters, whole or sharded.

    Args:
        groups: the parameter groups, each with ``params`` and ``weight_decay``.
        lr: learning rate.
        betas: β₁ and β₂.
        foreach: update all tensors of a group together; if false, one after another, with less memory.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], foreach: bool) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0, "foreach": foreach})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            parameters: list[Tensor] = [each for each in group["params"] if each.grad is not None]
            weights = [local(each) for each in parameters]
            gradients = [local(each.grad) for each in parameters if each.grad is not None]
            momenta = [local(momentum_of(self, each, EXP_AVG)) for each in parameters]
            size = max(1, len(weights)) if group["foreach"] else 1
            for first in range(0, len(weights), size):
                some = slice(first, first + size)
                _update(weights[some], gradients[some], momenta[some], group)
        return loss


def momentum_of(optimizer: Optimizer, parameter: Tensor, name: str) -> Tensor:
    """A parameter's momentum, the state tensor ``name``. If it is missing, it is created with zeros."""
    state = optimizer.state[parameter]
    if name not in state:
        state[name] = torch.zeros_like(parameter, requires_grad=False)
    momentum: Tensor = state[name]
    return momentum


def _update(weights: list[Tensor], gradients: list[Tensor], momenta: list[Tensor], group: dict[str, Any]) -> None:
    rate, (beta1, beta2) = group["lr"], group["betas"]
    updates = torch._foreach_lerp(gradients, momenta, beta1)
    torch._foreach_sign_(updates)
    torch._foreach_mul_(weights, 1 - rate * group["weight_decay"])
    torch._foreach_add_(weights, updates, alpha=-rate)
    torch._foreach_lerp_(momenta, gradients, 1 - beta2)
