"""Optimizers, made from a backend's own (possibly sharded) parameters."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from scalegpt.architecture.decoder import MATRIX, kind_of
from scalegpt.backends.base import LR_RATIO, OptimizerFactory
from scalegpt.backends.muon import Muon
from scalegpt.config import TrainConfig

Named = list[tuple[str, nn.Parameter]]


def optimizer_factory(train: TrainConfig) -> OptimizerFactory:
    """What makes the run's optimizer.

    AdamW with decoupled weight decay on matrices only (embeddings are matrices; norms and biases are not). With ``muon`` the
    blocks' matrices are Muon's. The groups' order is fixed: Muon's, then AdamW's matrices, then its vectors, as far as there
    are any.

    Args:
        train: the settings; for ``muon`` with their precision resolved.
    """

    def make(parameters: Iterable[tuple[str, nn.Parameter]]) -> Optimizer:
        listed = list(parameters)
        if train.optimizer == "muon":
            return _muon(train, listed)
        return torch.optim.AdamW(_groups(train, listed), **_adamw_options(train))

    return make


def _muon(train: TrainConfig, listed: Named) -> Optimizer:
    matrices = [parameter for name, parameter in listed if kind_of(name, tuple(parameter.shape)) == MATRIX]
    mine = set(map(id, matrices))
    return Muon(
        {
            "params": matrices,
            "lr": train.muon_lr,
            LR_RATIO: train.muon_lr / train.learning_rate,
            "momentum": train.muon_momentum,
            "weight_decay": train.weight_decay,
        },
        _groups(train, [(name, parameter) for name, parameter in listed if id(parameter) not in mine]),
        precision=train.precision,
        adamw=_adamw_options(train),
    )


def _groups(train: TrainConfig, listed: Named) -> list[dict[str, Any]]:
    """AdamW's groups: with weight decay, and without."""
    parameters = [parameter for _, parameter in listed]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _adamw_options(train: TrainConfig) -> dict[str, Any]:
    return {
        "lr": train.learning_rate,
        "betas": (train.beta1, train.beta2),
        "eps": train.adam_eps,
        "fused": train.fused,
        "foreach": not train.fused,
    }
