"""Optimizers, made from a backend's own (possibly sharded) parameters."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer

from scalegpt.backends.base import OptimizerFactory
from scalegpt.config import TrainConfig


def optimizer_factory(train: TrainConfig) -> OptimizerFactory:
    """What makes the run's optimizer.

    AdamW with decoupled weight decay on matrices only (embeddings are matrices; norms and biases are not). The groups'
    order is fixed: matrices, then vectors, if there are any.
    """

    def make(parameters: Iterable[tuple[str, nn.Parameter]]) -> Optimizer:
        listed = [parameter for _, parameter in parameters]
        groups = [
            {"params": [p for p in listed if p.dim() >= 2], "weight_decay": train.weight_decay},
            {"params": [p for p in listed if p.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=train.learning_rate,
            betas=(train.beta1, train.beta2),
            eps=train.adam_eps,
            fused=train.fused,
            foreach=not train.fused,
        )

    return make
