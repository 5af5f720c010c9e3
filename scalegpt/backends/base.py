"""The interface of a backend, and what backends share: gradient clipping, loss scaling, the canonical state.

A backend holds the model, its shards and its optimizer. The trainer uses only the interface, :class:`Backend`, and does not
know which backend it is.

The canonical state does not depend on the layout. For each parameter, by its name in the unwrapped model, it has the
fp32 master weight and the fp32 tensors that the optimizer keeps, for example AdamW's two moments. Each tensor is
treated as flattened in row-major order, and a rank holds contiguous ranges of it (:class:`Piece`):

- FSDP2 cuts tensors into rows: a rank's shard is one range;
- ZeRO-1 and -2 concatenate a group's parameters and cut the result into equal parts: a rank holds many whole tensors,
  and parts of at most two tensors per group;
- ZeRO-3 cuts every flattened tensor into equal parts;
- replicas hold the same pieces, and each replica writes an equal part of every piece.

Padding that a layout adds belongs to no piece.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from scalegpt.architecture.decoder import kind_of
from scalegpt.backends.world import World
from scalegpt.config import RunConfig
from scalegpt.config.optimizers import STATE_NAMES, UpdateGroup
from scalegpt.model.gpt import GPT

OptimizerFactory = Callable[[Iterable[tuple[str, nn.Parameter]]], Optimizer]
"""A function that makes the optimizer from named parameters, with its groups in a fixed order."""

WEIGHT = "weight"

ALL_KEYS = (WEIGHT, *STATE_NAMES)
"""All keys of canonical tensors; :meth:`Backend.keys_of` gives a parameter's keys."""

LR_RATIO = "lr_ratio"
"""The key, in an optimizer's group, of the ratio of the group's learning rate to the schedule's.

The default ratio is 1.
"""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

ReadTensor = Callable[[str, str, int, int], Tensor]
"""``read(name, key, start, count)`` returns elements ``start`` to ``start + count`` of a flattened canonical tensor, fp32."""

MayStep = Callable[[], bool]
"""A function that returns whether the optimizer may step; its result must be the same on every rank.

It is called once per step, when the gradients are complete and before weights change.
"""


@dataclass(frozen=True)
class Piece:
    """A contiguous range of one flattened canonical tensor.

    Attributes:
        name: name of the parameter.
        key: one of :data:`ALL_KEYS`.
        start: the range's first element.
        values: fp32 [count], a view of the tensor that training uses, or a copy.
    """

    name: str
    key: str
    start: int
    values: Tensor

    def share(self, number: int, count: int) -> "Piece":
        """Part ``number``, from 0, of ``count`` parts of this range; their sizes differ by at most one element."""
        size = self.values.numel()
        first, end = size * number // count, size * (number + 1) // count
        return Piece(self.name, self.key, self.start + first, self.values[first:end])


@dataclass(frozen=True)
class StepResult:
    """The result of an optimizer step.

    Attributes:
        grad_norm: global norm of the gradients before clipping. With DeepSpeed it is infinity if the norm is not
            finite, and NaN if the caller refused the step, so that no norm was computed.
        skipped: whether the step was skipped on all ranks, because a gradient was not finite or the caller refused the step.
            Weights, moments and step counts are then unchanged.
    """

    grad_norm: float
    skipped: bool


def always() -> bool:
    """Allow every step."""
    return True


@dataclass
class LossScaler:
    """Dynamic loss scaling for fp16: halve the scale after an overflow, double it after ``interval`` good steps.

    An overflow is a global gradient norm that is not finite; all ranks know the norm, so they agree. The scale starts at
    2^16, as in torch's GradScaler and DeepSpeed. The default interval is DeepSpeed's; GradScaler's is 2000.

    Attributes:
        scale: the factor by which the loss is multiplied.
        interval: number of good steps after which the scale is doubled.
        good_steps: number of steps without overflow since the scale last changed.
        dynamic: whether the scale changes.
        floor: the smallest scale.
    """

    scale: float = 1.0
    interval: int = 1000
    good_steps: int = 0
    dynamic: bool = False
    floor: float = 1.0

    @classmethod
    def for_precision(cls, precision: str) -> "LossScaler":
        """The scaler of a new run: dynamic from 2^16 for fp16, a constant 1 for other precisions."""
        return cls(scale=2.0**16, dynamic=True) if precision == "fp16" else cls()

    def update(self, overflow: bool) -> None:
        """Adapt the scale after a step. ``overflow`` says that the step's gradient norm was not finite."""
        if not self.dynamic:
            return
        self.good_steps = 0 if overflow else self.good_steps + 1
        if overflow:
            self.scale = max(self.floor, self.scale / 2)
        elif self.good_steps == self.interval:
            self.scale, self.good_steps = self.scale * 2, 0


class Backend(ABC):
    """A backend, which holds the model, the shards and the optimizer of a process.

    Attributes:
        model: the GPT, wrapped in place; if it is sharded, all ranks must call it together.
        optimizer: the optimizer, in whose groups the learning rate is set.
        mesh: the layout of the ranks in replicas and shards.
        replica: index of the replica that this rank belongs to.
        shard: index of this rank's shard within the replica.

    Raises:
        InputError: the backend cannot run on these ranks.
    """

    model: GPT
    optimizer: Optimizer

    def __init__(self, run: RunConfig, world: World, grad_accum: int) -> None:
        self.run, self.world, self.grad_accum = run, world, grad_accum
        self.stage, self.mesh = run.parallel.stage, run.parallel.mesh(world.size)
        run.parallel.spec.check_mesh(self.mesh)
        self.replica, self.shard = self.mesh.place(world.rank)

    # --- training ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def micro_step(self, tokens: Tensor, targets: Tensor, *, last: bool) -> Tensor:
        """Run the forward and backward pass of one micro batch [B, T].

        Args:
            tokens: int64 ids [B, T], on the backend's device.
            targets: int64 ids [B, T], the tokens shifted by one.
            last: whether this is the step's last micro batch, after which gradients must be reduced.

        Returns:
            This rank's mean loss over the micro batch, detached, an fp32 scalar.
        """

    @abstractmethod
    def step(self, learning_rate: float, may_step: MayStep = always) -> StepResult:
        """Clip the accumulated gradients, update the weights, and clear the gradients.

        If a gradient of any rank is not finite, the global norm is not finite on any rank, and no rank changes anything.

        Args:
            learning_rate: the schedule's learning rate at this step.
            may_step: returns whether the caller allows the step. The backend calls it when it waits for the device
                anyway, so that the caller can read the loss without another wait. If the result is False, nothing
                changes, not even the loss scale.
        """

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        """Call the model and return its result; if the model is sharded, all ranks must call it together."""
        result: Tensor = self.model(*arguments, **options)
        return result

    @torch.no_grad()
    def evaluate(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Compute the mean loss over one batch [B, T] without gradients; all ranks must call it together."""
        self.model.eval()
        try:
            return self.forward(tokens, targets)
        finally:
            self.model.train()

    def set_learning_rate(self, learning_rate: float) -> None:
        """Give every parameter group the step's learning rate times its own ratio."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get(LR_RATIO, 1.0)

    # --- canonical state ---------------------------------------------------------------------------------------------

    def group_of(self, name: str) -> UpdateGroup:
        """The update group of a parameter: how the optimizer updates it, and which states it keeps for it."""
        return self.run.train.optimizer_spec.group_of(kind_of(name, self.model.shapes[name]))

    def keys_of(self, name: str) -> tuple[str, ...]:
        """The keys of a parameter's canonical tensors: its weight, and the states that its optimizer keeps."""
        return WEIGHT, *self.group_of(name).states

    def canonical_shapes(self) -> dict[str, tuple[int, ...]]:
        """All canonical tensors, ``KEY/NAME`` → the shape of the whole tensor."""
        return {f"{key}/{name}": shape for name, shape in self.model.shapes.items() for key in self.keys_of(name)}

    @abstractmethod
    def held(self, keys: Sequence[str] = ALL_KEYS) -> Iterator[Piece]:
        """Yield the pieces of the canonical state on this rank, none of them empty, as views of masters and states.

        The pieces come in the order of the model's parameters. Nothing is communicated, so ranks may call this at
        different times. States that the optimizer has not made yet are first made, filled with zeros.

        Args:
            keys: keys of the wanted tensors; keys that a parameter does not have (:meth:`keys_of`) are ignored.
        """

    @abstractmethod
    def set_steps(self, steps: int) -> None:
        """Set the optimizer's count of taken steps. Does nothing for an optimizer without a count."""

    @abstractmethod
    def refresh(self) -> None:
        """Copy the fp32 masters into the weights that the model computes with; all ranks must call it together."""

    def pieces(self) -> Iterator[Piece]:
        """Yield the pieces that this rank writes into a checkpoint; all ranks' pieces cover every tensor exactly once.

        Nothing is communicated. The values are views of tensors that the next step changes.
        """
        for piece in self.held():
            mine = piece.share(self.replica, self.mesh.replicas)
            if mine.values.numel():
                yield mine

    def load_pieces(self, read: ReadTensor, steps: int) -> None:
        """Set masters, optimizer states and step counts from a checkpoint; all ranks must call it together.

        Args:
            read: reads a range of a tensor to the CPU; called once for every piece that this rank holds.
            steps: number of steps that the optimizer has taken.
        """
        for piece in self.held():
            piece.values.copy_(read(piece.name, piece.key, piece.start, piece.values.numel()))
        self.set_steps(steps)
        self.refresh()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Set the fp32 master weights from names and whole CPU tensors, which must be the same on every rank."""
        held = {piece.name: piece for piece in self.held((WEIGHT,))}
        for name, value in weights:
            piece = held.get(name)
            if piece is not None:
                end = piece.start + piece.values.numel()
                piece.values.copy_(value.reshape(-1)[piece.start : end])
            del value  # before the next one is made
        self.refresh()

    @property
    @abstractmethod
    def scaler(self) -> LossScaler:
        """The current loss scale and its number of good steps, for the checkpoint."""

    @abstractmethod
    def load_scaler(self, scale: float, good_steps: int) -> None:
        """Set the loss scale and its number of good steps, from a checkpoint."""


# --- what backends share ---------------------------------------------------------------------------------------------


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The names and tensors of the trainable parameters."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def local(tensor: Tensor) -> Tensor:
    """The part of a (possibly sharded) tensor on this rank, sharing its memory."""
    to_local = getattr(tensor, "to_local", None)
    part: Tensor = to_local() if to_local is not None else tensor
    return part


def empty_state(optimizer: Optimizer, parameter: Tensor, group: UpdateGroup) -> dict[str, Tensor]:
    """The state that an optimizer makes for a parameter in its first step: tensors of zeros, and torch's step counter.

    Args:
        optimizer: the optimizer; its defaults decide whether the counter is on the parameter's device or the CPU.
        parameter: the fp32 master.
        group: how the optimizer updates the parameter, and which states it keeps for it.
    """
    states = {name: torch.zeros_like(parameter, requires_grad=False) for name in group.states}
    if not group.counts_steps:
        return states
    on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")  # as in torch's AdamW
    count = torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu")
    return {"step": count, **states}


def fill_step_counts(optimizer: Optimizer, steps: int) -> None:
    """Set an optimizer's step counters. Does nothing for an optimizer without counters."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(steps)


def local_square_norm(gradients: list[Tensor], device: torch.device) -> Tensor:
    """The sum of squares of these gradients, an fp32 scalar on ``device``."""
    if not gradients:
        return torch.zeros((), device=device)
    norms = torch._foreach_norm(gradients)
    return torch.stack([norm.float() for norm in norms]).square().sum().to(device)


def is_finite(norm: float) -> bool:
    """Whether a gradient norm is finite; the step is skipped if it is not."""
    return math.isfinite(norm)


def clip_factor(norm: float, limit: float, scale: float) -> float:
    """The factor for scaled gradients that removes the loss scale and clips their global norm to ``limit``.

    Args:
        norm: the global norm without the loss scale.
        limit: the largest norm; 0: no clipping.
        scale: the loss scale.
    """
    factor = min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0
    return factor / scale
