"""Makes the optimizer of a run."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from scalegpt.architecture.decoder import kind_of
from scalegpt.backends.base import LR_RATIO, OptimizerFactory
from scalegpt.config import TrainConfig
from scalegpt.config.optimizers import MATRIX
from scalegpt.optim.lion import Lion
from scalegpt.optim.muon import Muon

Named = list[tuple[str, nn.Parameter]]


def optimizer_factory(train: TrainConfig) -> OptimizerFactory:
    """The function that makes the run's optimizer from named parameters.

    Weight decay is decoupled, and applies to matrices only (embeddings are matrices; norms and biases are not). The
    parameter groups are in the order of :attr:`~scalegpt.config.optimizers.OptimizerSpec.groups`; empty groups are
    omitted.

    Args:
        train: the training settings; for ``muon`` the precision must be resolved, not ``auto``.
    """

    def make(parameters: Iterable[tuple[str, nn.Parameter]]) -> Optimizer:
        return MAKERS[train.optimizer](train, list(parameters))

    return make


def _adamw(train: TrainConfig, listed: Named) -> Optimizer:
    return torch.optim.AdamW(_groups(train, listed), **_adamw_options(train))


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


def _lion(train: TrainConfig, listed: Named) -> Optimizer:
    betas = (train.beta1, train.beta2)
    return Lion(_groups(train, listed), lr=train.learning_rate, betas=betas, foreach=not train.fused)


def _groups(train: TrainConfig, listed: Named) -> list[dict[str, Any]]:
    """Two parameter groups: matrices with weight decay, and norms and biases without. An empty group is left out."""
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


MAKERS: dict[str, Callable[[TrainConfig, Named], Optimizer]] = {"adamw": _adamw, "muon": _muon, "lion": _lion}
"""Name → the function that makes the optimizer, for each of :data:`scalegpt.config.optimizers.OPTIMIZERS`."""
