"""Makes chosen windows of a run's data bad, as damaged data or hardware would, in whatever layout they are trained on."""

import math
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch

from scalegpt.backends import Backend
from scalegpt.training import trainer
from scalegpt.training.batches import TrainingBatches
from scalegpt.training.setup import prepare

Setter = Callable[[Any, str, Any], None]


def garble(windows: Collection[int], put: Setter = setattr) -> None:
    """Let the targets of the steps that begin at these windows be wrong, so that their loss spikes."""

    class Garbled(TrainingBatches):
        def step(self, first: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for tokens, targets in super().step(first):
                yield tokens, (targets * 7 + 131) % 250 if first in windows else targets

    put(trainer, "TrainingBatches", Garbled)


def spoil(kind: str, windows: Collection[int], rank: int = 0, put: Setter = setattr) -> None:
    """Let the last rank's, or another's, first micro batch of these windows' steps give what is not finite.

    Args:
        kind: ``loss``: the loss, and so the gradient; ``gradient``: the gradient alone.
        windows: the first windows of the steps.
        rank: who is ill.
        put: how to replace an attribute; ``monkeypatch.setattr`` takes it back afterwards.
    """
    armed = False

    class Spoiled(TrainingBatches):
        def step(self, first: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            nonlocal armed
            for micro, pair in enumerate(super().step(first)):
                armed = first in windows and micro == 0 and self.world.rank == rank
                yield pair
            armed = False

    def hook(_module: Any, _arguments: Any, output: torch.Tensor) -> torch.Tensor:
        if not (armed and output.requires_grad):
            return output
        if kind == "loss":
            return output * math.nan
        output.register_hook(lambda gradient: gradient * math.inf)
        return output

    make = prepare.make_backend

    def make_spoiled(*arguments: Any) -> Backend:
        backend = make(*arguments)
        backend.model.register_forward_hook(hook)
        return backend

    put(trainer, "TrainingBatches", Spoiled)
    put(prepare, "make_backend", make_spoiled)
