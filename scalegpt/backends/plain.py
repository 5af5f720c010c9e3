"""The backend ``plain``, and the step that it shares with ``fsdp``.

``plain`` trains in one process, with fp32 weights that the model casts when it uses them.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scalegpt.backends.base import (
    ALL_KEYS,
    WEIGHT,
    Backend,
    LossScaler,
    MayStep,
    OptimizerFactory,
    Piece,
    StepResult,
    always,
    clip_factor,
    empty_state,
    fill_step_counts,
    is_finite,
    local,
    local_square_norm,
    named,
)
from scalegpt.backends.world import World
from scalegpt.config import RunConfig
from scalegpt.model.gpt import GPT


class TorchBackend(Backend):
    """A backend with a torch optimizer that updates this rank's tensors or shards of tensors."""

    def __init__(self, run: RunConfig, world: World, grad_accum: int) -> None:
        super().__init__(run, world, grad_accum)
        self._scaler = LossScaler.for_precision(run.train.precision)

    def micro_step(self, tokens: Tensor, targets: Tensor, *, last: bool) -> Tensor:
        """See :meth:`Backend.micro_step`."""
        self.before_micro_step(last)
        loss: Tensor = self.model(tokens, targets)
        (loss * (self._scaler.scale / self.grad_accum)).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def before_micro_step(self, last: bool) -> None:
        """Prepare a sharded model for a micro step. Does nothing for a model that is not sharded."""

    def step(self, learning_rate: float, may_step: MayStep = always) -> StepResult:
        """See :meth:`Backend.step`."""
        gradients = [local(parameter.grad) for parameter in self.model.parameters() if parameter.grad is not None]
        square = self.sum_over_shards(local_square_norm(gradients, self.world.device))
        norm = square.sqrt().item() / self._scaler.scale
        allowed, overflow = may_step(), not is_finite(norm)
        if allowed and not overflow:
            factor = clip_factor(norm, self.run.train.grad_clip, self._scaler.scale)
            if factor != 1.0:
                torch._foreach_mul_(gradients, factor)
            self.set_learning_rate(learning_rate)
            self.optimizer.step()
        if allowed:
            self._scaler.update(overflow)
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(norm, overflow or not allowed)

    def sum_over_shards(self, square: Tensor) -> Tensor:
        """The squared norm of the whole gradient, given ``square``, the squared norm of this rank's part."""
        return square

    def held(self, keys: Sequence[str] = ALL_KEYS) -> Iterator[Piece]:
        """See :meth:`Backend.held`."""
        for name, parameter in self.model.named_parameters():
            if keys != (WEIGHT,) and not self.optimizer.state[parameter]:
                self.optimizer.state[parameter].update(empty_state(self.optimizer, parameter, self.group_of(name)))
            for key in self.keys_of(name):
                if key not in keys:
                    continue
                values = local(parameter if key == WEIGHT else self.optimizer.state[parameter][key]).detach().view(-1)
                if values.numel():
                    yield Piece(name, key, self.first_element(parameter), values)

    def first_element(self, parameter: nn.Parameter) -> int:  # noqa: ARG002 - used by FSDPBackend
        """The index, in a flattened parameter, of the first element that this rank holds."""
        return 0

    def set_steps(self, steps: int) -> None:
        """See :meth:`Backend.set_steps`."""
        fill_step_counts(self.optimizer, steps)

    def refresh(self) -> None:
        """Do nothing, since the model computes with the fp32 masters themselves and casts them at each use."""

    @property
    def scaler(self) -> LossScaler:
        """See :attr:`Backend.scaler`."""
        return self._scaler

    def load_scaler(self, scale: float, good_steps: int) -> None:
        """See :meth:`Backend.load_scaler`."""
        self._scaler.scale, self._scaler.good_steps = scale, good_steps


class PlainBackend(TorchBackend):
    """Training in one process, without collectives."""

    def __init__(
        self,
        run: RunConfig,
        world: World,
        grad_accum: int,
        model: GPT,
        make_optimizer: OptimizerFactory,
        _settings: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(run, world, grad_accum)
        self.model = model.to_empty(device=world.device)
        self.optimizer = make_optimizer(named(self.model))
