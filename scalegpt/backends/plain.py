"""One process, one device, no sharding: fp32 weights, which the model casts where it uses them."""

from collections.abc import Iterator, Sequence

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
    is_finite,
    local,
    local_square_norm,
)
from scalegpt.backends.world import World
from scalegpt.config import RunConfig
from scalegpt.errors import InputError
from scalegpt.model.gpt import GPT


class TorchBackend(Backend):
    """The step that ``plain`` and ``fsdp`` share: torch's optimizer over tensors that live on this rank."""

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
        """What a sharded model must be told before each micro batch."""

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
        """The square norm of the whole gradient from that of this rank's part."""
        return square

    def held(self, keys: Sequence[str] = ALL_KEYS) -> Iterator[Piece]:
        """See :meth:`Backend.held`."""
        if any(key != WEIGHT for key in keys):
            self._make_moments()
        for name, parameter in self.model.named_parameters():
            for key in self.keys_of(name):
                if key not in keys:
                    continue
                values = local(parameter if key == WEIGHT else self.optimizer.state[parameter][key]).detach().view(-1)
                if values.numel():
                    yield Piece(name, key, self.first_element(parameter), values)

    def first_element(self, parameter: nn.Parameter) -> int:  # noqa: ARG002 - of use where tensors are cut
        """Where in the flattened tensor this rank's part of it begins."""
        return 0

    @property
    def replicated(self) -> bool:
        """See :attr:`Backend.replicated`."""
        return True

    def _make_moments(self) -> None:
        """Make, as zeros, the state that torch's optimizers make in their first step, where it is not there yet."""
        for name, parameter in self.model.named_parameters():
            state = self.optimizer.state[parameter]
            if not state:
                state.update(empty_state(self.optimizer, parameter, self.group_of(name), steps=0))

    def set_steps(self, steps: int) -> None:
        """See :meth:`Backend.set_steps`."""
        for state in self.optimizer.state.values():
            if "step" in state:  # Muon counts none
                state["step"].fill_(steps)

    def refresh(self) -> None:
        """Nothing to do: the model casts its masters where it uses them."""

    @property
    def scaler(self) -> LossScaler:
        """See :attr:`Backend.scaler`."""
        return self._scaler

    def load_scaler(self, scale: float, good_steps: int) -> None:
        """See :meth:`Backend.load_scaler`."""
        self._scaler.scale, self._scaler.good_steps = scale, good_steps


class PlainBackend(TorchBackend):
    """One process without collectives.

    Raises:
        InputError: started with several ranks.
    """

    def __init__(
        self, run: RunConfig, world: World, grad_accum: int, model: GPT, make_optimizer: OptimizerFactory
    ) -> None:
        if world.size > 1:
            raise InputError(
                f"backend plain runs in one process, not {world.size}; use --backend fsdp or --backend deepspeed"
            )
        super().__init__(run, world, grad_accum)
        self.model = model.to_empty(device=world.device)
        self.optimizer = make_optimizer(named(self.model))


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The trainable parameters by name."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
