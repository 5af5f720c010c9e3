"""The interface of a backend, and what backends share: gradient clipping, loss scaling, the canonical state.

A backend holds the model, its shards and its optimizer. The trainer uses :class:`Backend` alone and does not know which one
it has.

The canonical state is the same whatever the layout: for each parameter, by its clean name, its fp32 master weight and the
fp32 tensors that its optimizer keeps, such as AdamW's two moments. Each tensor counts as flattened, last dimension fastest,
and a rank holds contiguous ranges of it (:class:`Piece`):

- FSDP2 cuts tensors into rows: a rank's shard is one range;
- ZeRO-1 and -2 lay a group's parameters end to end and cut the whole into equal parts: a rank holds many tensors whole, and
  parts of at most two per group;
- ZeRO-3 cuts every flattened tensor into equal parts;
- replicas hold the same pieces, and each writes an even part of them.

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
"""Makes the optimizer from named parameters, with its groups in a fixed order."""

WEIGHT = "weight"

ALL_KEYS = (WEIGHT, *STATE_NAMES)
"""The keys of all canonical tensors; a parameter has some of them."""

LR_RATIO = "lr_ratio"
"""In an optimizer's group: its learning rate over the schedule's; 1 where it is missing."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

ReadTensor = Callable[[str, str, int, int], Tensor]
"""``read(name, key, start, count)``: elements ``start`` to ``start + count`` of a flattened canonical tensor, fp32."""

MayStep = Callable[[], bool]
"""Asked once in each step when gradients are complete, before weights change; every rank must get the same answer."""


@dataclass(frozen=True)
class Piece:
    """A contiguous range of one flattened canonical tensor.

    Attributes:
        name: the parameter's.
        key: one of :data:`ALL_KEYS`.
        start: the range's first element.
        values: fp32 [count], a view of where training keeps them, unless it was copied.
    """

    name: str
    key: str
    start: int
    values: Tensor

    def share(self, number: int, count: int) -> "Piece":
        """Part ``number`` of ``count`` parts of this range, whose sizes differ by one at most."""
        size = self.values.numel()
        first, end = size * number // count, size * (number + 1) // count
        return Piece(self.name, self.key, self.start + first, self.values[first:end])


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did.

    Attributes:
        grad_norm: the global norm before clipping. Infinite where DeepSpeed found it not to be finite, NaN where DeepSpeed
            did not compute it because the caller refused the step.
        skipped: weights, moments and step counts stayed as they were, on all ranks: a gradient was not finite, or the caller
            refused the step.
    """

    grad_norm: float
    skipped: bool


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
    floor: float = 1.0

    @classmethod
    def for_precision(cls, precision: str) -> "LossScaler":
        """Dynamic from 2^16 for fp16, a constant 1 otherwise."""
        return cls(scale=2.0**16, dynamic=True) if precision == "fp16" else cls()

    def update(self, overflow: bool) -> None:
        """Adapt the scale after a step."""
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
        optimizer: its groups get the learning rate.
        mesh: how the ranks are laid out.
        replica: the replica that this rank belongs to.
        shard: the shard of it that this rank holds.

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
        """Clip the accumulated gradients, update the weights, and clear the gradients.

        All ranks see through the norm where a gradient of any rank is not finite; then no rank changes anything.

        Args:
            learning_rate: of this step.
            may_step: whether the caller allows the step. It is called where the backend has waited for the device, or is
                about to, so that it may read the loss without another wait. If it refuses, nothing changes, the loss scale
                included.
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

    def set_learning_rate(self, learning_rate: float) -> None:
        """Give every parameter group the step's learning rate times its own ratio."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get(LR_RATIO, 1.0)

    # --- canonical state ---------------------------------------------------------------------------------------------

    def group_of(self, name: str) -> UpdateGroup:
        """What the optimizer keeps of a parameter."""
        return self.run.train.optimizer_spec.group_of(kind_of(name, self.model.shapes[name]))

    def keys_of(self, name: str) -> tuple[str, ...]:
        """The canonical tensors of a parameter: its weight, and the states that its optimizer keeps."""
        return WEIGHT, *self.group_of(name).states

    def canonical_shapes(self) -> dict[str, tuple[int, ...]]:
        """All canonical tensors, ``KEY/NAME`` → the shape of the whole tensor."""
        return {f"{key}/{name}": shape for name, shape in self.model.shapes.items() for key in self.keys_of(name)}

    @abstractmethod
    def held(self, keys: Sequence[str] = ALL_KEYS) -> Iterator[Piece]:
        """The parts of the canonical state on this rank, none of them empty, as views of masters and states.

        In the order of the model's parameters. Nothing is communicated; ranks may call it at different times.

        Args:
            keys: those wanted, of the ones that a parameter has (:meth:`keys_of`). States that the optimizer has not made
                yet are made first, of zeros.
        """

    @abstractmethod
    def set_steps(self, steps: int) -> None:
        """Set the optimizer's number of steps taken, wherever it counts them."""

    @abstractmethod
    def refresh(self) -> None:
        """Copy the masters into the weights that the model computes with; all ranks must call it together."""

    def pieces(self) -> Iterator[Piece]:
        """What this rank writes into a checkpoint: the pieces of all ranks are every tensor exactly once.

        Reads local memory alone; the values are views, which the next step changes.
        """
        for piece in self.held():
            mine = piece.share(self.replica, self.mesh.replicas)
            if mine.values.numel():
                yield mine

    def load_pieces(self, read: ReadTensor, steps: int) -> None:
        """Set masters, states and step counts; all ranks must call it together.

        Args:
            read: called once for every range that this rank holds; returns CPU tensors.
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


# --- what backends share ---------------------------------------------------------------------------------------------


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The trainable parameters by name."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def local(tensor: Tensor) -> Tensor:
    """The part of a (possibly sharded) tensor on this rank, sharing its memory."""
    to_local = getattr(tensor, "to_local", None)
    part: Tensor = to_local() if to_local is not None else tensor
    return part


def empty_state(optimizer: Optimizer, parameter: Tensor, group: UpdateGroup) -> dict[str, Tensor]:
    """What an optimizer makes of a parameter in its first step: states of zeros, and torch's step counter.

    Args:
        optimizer: its defaults decide where the counter is.
        parameter: the master.
        group: what the optimizer keeps of it.
    """
    states = {name: torch.zeros_like(parameter, requires_grad=False) for name in group.states}
    if not group.counts_steps:
        return states
    on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")  # as in torch's AdamW
    count = torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu")
    return {"step": count, **states}


def fill_step_counts(optimizer: Optimizer, steps: int) -> None:
    """Set the counters of an optimizer that keeps them."""
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
    """Whether a step may be taken with gradients of this norm."""
    return math.isfinite(norm)


def clip_factor(norm: float, limit: float, scale: float) -> float:
    """The factor for scaled gradients that removes the loss scale and clips to ``limit`` (0: no clipping)."""
    factor = min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0
    return factor / scale
