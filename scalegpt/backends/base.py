"""What every backend does, and what they share: the interface, gradient clipping, loss scaling.

A backend holds the model, its shards and its optimizer. The trainer drives it through :class:`Backend` alone and never
learns who holds what. State goes in and out in one canonical form, whatever the sharding: for each parameter by its clean
name the fp32 master weight and AdamW's two moments, as whole CPU tensors, one parameter at a time.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from scalegpt.backends.world import World
from scalegpt.config import RunConfig
from scalegpt.model.gpt import GPT

OptimizerFactory = Callable[[Iterable[tuple[str, nn.Parameter]]], Optimizer]
"""Makes the optimizer from named parameters, with its groups in a fixed order."""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state, by torch's own names."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ParameterState:
    """One parameter's canonical state: whole fp32 tensors on the CPU."""

    name: str
    weight: Tensor
    moments: dict[str, Tensor]


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did.

    Attributes:
        grad_norm: the global norm before clipping; infinite where DeepSpeed found it not to be finite, NaN where it was not
            asked since the caller refused the step.
        skipped: weights, moments and step counts stayed as they were, on all ranks alike: a gradient was not finite, or the
            caller refused.
    """

    grad_norm: float
    skipped: bool


MayStep = Callable[[], bool]
"""Asked once in each step when gradients are complete, before weights change; must give the same answer on every rank."""


def always() -> bool:
    """Refuse no step."""
    return True


@dataclass
class LossScaler:
    """Dynamic loss scaling for fp16: halve after an overflow, double after ``interval`` good steps.

    The gradients are judged by their global norm, which all ranks know, so all ranks agree.
    Defaults are those of torch's GradScaler and DeepSpeed: start at 2^16, interval 2000 and 1000 respectively.
    """

    scale: float = 1.0
    interval: int = 1000
    good_steps: int = 0
    dynamic: bool = False
    floor: float = field(default=1.0, repr=False)

    @classmethod
    def for_precision(cls, precision: str) -> "LossScaler":
        """Dynamic from 2^16 for fp16, a constant 1 otherwise."""
        return cls(scale=2.0**16, dynamic=True) if precision == "fp16" else cls()

    def update(self, overflow: bool) -> None:
        """Learn from a step."""
        if not self.dynamic:
            return
        self.good_steps = 0 if overflow else self.good_steps + 1
        if overflow:
            self.scale = max(self.floor, self.scale / 2)
        elif self.good_steps == self.interval:
            self.scale, self.good_steps = self.scale * 2, 0


class Backend(ABC):
    """Holds model, shards and optimizer; one per process.

    Attributes:
        model: the GPT, wrapped in place, callable on every rank together.
        optimizer: what the learning rate is set on.
    """

    model: GPT
    optimizer: Optimizer

    def __init__(self, run: RunConfig, world: World, grad_accum: int) -> None:
        self.run = run
        self.world = world
        self.grad_accum = grad_accum

    @abstractmethod
    def micro_step(self, tokens: Tensor, targets: Tensor, *, last: bool) -> Tensor:
        """Forward and backward over one micro batch [B, T].

        Args:
            tokens: int64 ids on the backend's device.
            targets: int64 ids, the tokens shifted by one.
            last: whether this is the step's last micro batch, after which gradients must be reduced.

        Returns:
            This rank's mean loss over the micro batch, detached, an fp32 scalar.
        """

    @abstractmethod
    def step(self, learning_rate: float, may_step: MayStep = always) -> StepResult:
        """Clip the accumulated gradients, update the weights, and forget the gradients.

        A gradient that is not finite on any rank is seen by all, through the norm: then no rank changes anything.

        Args:
            learning_rate: of this step.
            may_step: the caller's word. It is asked where the backend has waited for the device anyway, or is about to, so
                that it may read the loss without another wait. Where it refuses, all is as if the step had not been: the
                loss scale stays too.
        """

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        """Call the model; where it is sharded, all ranks must call it together."""
        result: Tensor = self.model(*arguments, **options)
        return result

    @torch.no_grad()
    def evaluate(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean loss over one batch [B, T] without gradients; all ranks must call it together."""
        self.model.eval()
        try:
            return self.forward(tokens, targets)
        finally:
            self.model.train()

    @abstractmethod
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Set the fp32 master weights, by name, from whole CPU tensors; every rank must be given the same."""

    @abstractmethod
    def states(self) -> Iterator[ParameterState]:
        """Every parameter's canonical state, in the order of names; all ranks must iterate together."""

    @abstractmethod
    def load_states(self, states: Iterable[ParameterState], steps: int) -> None:
        """Set weights and moments, and the optimizer's count of steps; every rank must be given the same."""

    @property
    @abstractmethod
    def scaler(self) -> LossScaler:
        """The loss scale, for the checkpoint."""

    @abstractmethod
    def load_scaler(self, scale: float, good_steps: int) -> None:
        """Set the loss scale of an earlier process."""

    def set_learning_rate(self, learning_rate: float) -> None:
        """Give every parameter group the step's learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate


def local_square_norm(gradients: list[Tensor], device: torch.device) -> Tensor:
    """The sum of squares of the gradients at hand, an fp32 scalar on ``device``."""
    if not gradients:
        return torch.zeros((), device=device)
    norms = torch._foreach_norm(gradients)
    return torch.stack([norm.float() for norm in norms]).square().sum().to(device)


def clip_factor(norm: float, limit: float, scale: float) -> float:
    """What to multiply scaled gradients with: removes the loss scale and clips to ``limit`` (0: never) at once."""
    factor = min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0
    return factor / scale


def is_finite(norm: float) -> bool:
    """Whether a step may be taken with gradients of this norm."""
    return math.isfinite(norm)
