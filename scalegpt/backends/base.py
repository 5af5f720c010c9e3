"""What every backend does, and what they share: the interface, gradient clipping, loss scaling.

A backend holds the model, its shards and its optimizer. The trainer drives it through :class:`Backend` alone and never
learns who holds what.

State goes in and out in one canonical form, whatever the sharding. It consists of fp32 tensors, some for each parameter by
its clean name: the master weight and the states that its optimizer keeps, such as AdamW's two moments
(:meth:`Backend.keys_of`). No rank need hold a whole one. Each tensor is
thought of as flattened, last dimension fastest, and a rank holds contiguous ranges of it, :class:`Piece`:

- FSDP2 cuts tensors into rows, so that a rank's shard is one range;
- ZeRO-1 and -2 lay a group's parameters end to end and cut the whole into equal parts: a rank holds many tensors whole, and
  parts of at most two per group;
- ZeRO-3 cuts every flattened tensor into equal parts;
- where everything is replicated, each rank holds all of it, and writes an even part of each tensor.

Padding that a layout adds is no part of any piece.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from scalegpt.architecture.decoder import kind_of
from scalegpt.backends.world import World
from scalegpt.config import RunConfig
from scalegpt.config.optimizers import EXP_AVG, EXP_AVG_SQ, STATE_NAMES, UpdateGroup
from scalegpt.model.gpt import GPT

OptimizerFactory = Callable[[Iterable[tuple[str, nn.Parameter]]], Optimizer]
"""Makes the optimizer from named parameters, with its groups in a fixed order."""

WEIGHT = "weight"

KEYS = (WEIGHT, EXP_AVG, EXP_AVG_SQ)
"""The canonical tensors of a parameter that AdamW updates."""

ALL_KEYS = (WEIGHT, *STATE_NAMES)
"""All canonical tensors that there are; a parameter has some of them."""


LR_RATIO = "lr_ratio"
"""In an optimizer's group: its learning rate over the one that the schedule gives; 1 where it is not there."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


Read = Callable[[str, str, int, int], Tensor]
"""Gives elements ``start`` to ``start + count`` of a flattened canonical tensor: ``read(name, key, start, count)``, fp32."""


@dataclass(frozen=True)
class Piece:
    """A contiguous range of one flattened canonical tensor.

    Attributes:
        name: the parameter's.
        key: one of :data:`ALL_KEYS`.
        start: the range's first element.
        values: fp32 [count], where training keeps them: a view, unless somebody copied it.
    """

    name: str
    key: str
    start: int
    values: Tensor

    def share(self, rank: int, size: int) -> "Piece":
        """The part of this range that falls to one of several ranks which all hold it; the parts differ by one at most."""
        count = self.values.numel()
        first, end = count * rank // size, count * (rank + 1) // size
        return Piece(self.name, self.key, self.start + first, self.values[first:end])


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
    def held(self, keys: Sequence[str] = ALL_KEYS) -> Iterator[Piece]:
        """The parts of the canonical state that live on this rank, none of them empty, as views of the masters and moments.

        In the order of the model's parameters. Nothing is communicated; ranks may call it at different times.

        Args:
            keys: of those that a parameter has (:meth:`keys_of`), the ones wanted. Moments that the optimizer has not made
                yet are made first, of zeros.
        """

    def keys_of(self, name: str) -> tuple[str, ...]:
        """The canonical tensors of a parameter: its weight, and the states that its optimizer keeps."""
        return WEIGHT, *self.group_of(name).states

    def group_of(self, name: str) -> UpdateGroup:
        """What the optimizer keeps of a parameter."""
        return self.run.train.optimizer_spec.group_of(kind_of(name, self.model.shapes[name]))

    @property
    @abstractmethod
    def replicated(self) -> bool:
        """Whether every rank holds the whole of the canonical state."""

    @abstractmethod
    def set_steps(self, steps: int) -> None:
        """Set the optimizer's count of the steps that it has taken, for every moment it keeps."""

    @abstractmethod
    def refresh(self) -> None:
        """Make what is computed with agree with the masters; all ranks must call it together."""

    def pieces(self) -> Iterator[Piece]:
        """What this rank writes into a checkpoint: those of all ranks together are every tensor exactly once.

        Reads local memory alone; the values are views, which the next step changes.
        """
        for piece in self.held():
            mine = piece.share(self.world.rank, self.world.size) if self.replicated else piece
            if mine.values.numel():
                yield mine

    def load_pieces(self, read: Read, steps: int) -> None:
        """Set masters, moments and step counts; all ranks must call it together.

        Args:
            read: asked once for every range that this rank holds; gives CPU tensors.
            steps: those that the optimizer has taken.
        """
        for piece in self.held():
            piece.values.copy_(read(piece.name, piece.key, piece.start, piece.values.numel()))
        self.set_steps(steps)
        self.refresh()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Set the fp32 master weights, by name, from whole CPU tensors; every rank must be given the same."""
        held = {piece.name: piece for piece in self.held((WEIGHT,))}
        for name, value in weights:
            piece = held.get(name)
            if piece is not None:
                end = piece.start + piece.values.numel()
                piece.values.copy_(value.reshape(-1)[piece.start : end])
        self.refresh()

    @property
    @abstractmethod
    def scaler(self) -> LossScaler:
        """The loss scale, for the checkpoint."""

    @abstractmethod
    def load_scaler(self, scale: float, good_steps: int) -> None:
        """Set the loss scale of an earlier process."""

    def set_learning_rate(self, learning_rate: float) -> None:
        """Give every parameter group the step's learning rate, or its own share of it."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get(LR_RATIO, 1.0)


def local(tensor: Tensor) -> Tensor:
    """The part of a (possibly sharded) tensor that lives on this rank, sharing its memory."""
    to_local = getattr(tensor, "to_local", None)
    part: Tensor = to_local() if to_local is not None else tensor
    return part


def empty_state(optimizer: Optimizer, parameter: Tensor, group: UpdateGroup, steps: int) -> dict[str, Tensor]:
    """What an optimizer makes of a parameter in its first step: states of zeros, and torch's step counter.

    Args:
        optimizer: which keeps it.
        parameter: the master.
        group: what the optimizer keeps of it.
        steps: those taken.
    """
    states = {name: torch.zeros_like(parameter, requires_grad=False) for name in group.states}
    if not group.counts_steps:
        return states
    on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")  # as torch's AdamW keeps it
    count = torch.tensor(float(steps), dtype=torch.float32, device=parameter.device if on_device else "cpu")
    return {"step": count, **states}


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
