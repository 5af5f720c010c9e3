"""What DeepSpeed's sharding optimizers share in the ledger: states cut over the ranks, a bucket, host memory."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache
from typing import Any

from scalegpt.architecture.decoder import parameter_shapes
from scalegpt.architecture.parameters import Shape
from scalegpt.config import ModelConfig, RunConfig
from scalegpt.config.backends import Mesh
from scalegpt.config.optimizers import FP32
from scalegpt.planner.memory.predict import Prediction
from scalegpt.planner.memory.sizes import GRADIENTS, OPTIMIZER, TEMPORARIES, WEIGHTS, host_size
from scalegpt.planner.memory.states import uniform_group
from scalegpt.planner.memory.step import Step
from scalegpt.planner.memory.tensors import numel
from scalegpt.units import BYTES

BUCKETS = "buckets"

NORM_BYTES = 8
"""Gradients' norms are taken in fp64 (``zero/utils.py: get_norm_dtype``), one tensor's at a time."""

Settings = dict[str, Any]
Group = tuple[Shape, ...]


def offloaded(zero: Settings, what: str) -> bool:
    """Whether the states of the ``optimizer``, or each ``param``, live in host memory."""
    return ((zero.get(f"offload_{what}") or {}).get("device") or "none") != "none"


def pinned(zero: Settings, what: str) -> bool:
    """Whether what is offloaded lies in pinned memory."""
    return bool((zero.get(f"offload_{what}") or {}).get("pin_memory"))


class ShardedStep(Step, ABC):
    """What stages 1 to 3 share: weights in the compute dtype, fp32 masters and moments cut over the ranks."""

    backwards_alike = False  # each depends on what is in the bucket
    pins_masters = True

    def __init__(self, run: RunConfig, mesh: Mesh, grad_accum: int, settings: Settings) -> None:
        super().__init__(run, mesh, grad_accum)
        self.zero = settings["zero_optimization"]
        self.width = self.s.compute
        self.accumulated = BYTES[settings["data_types"]["grad_accum_dtype"]]
        self.sent = BYTES[settings["communication_data_type"]]
        self.offloads, self.pins = offloaded(self.zero, "optimizer"), pinned(self.zero, "optimizer")
        self.bucket = int(self.zero["reduce_bucket_size"])
        self.overlaps = bool(self.zero["overlap_comm"])
        self.copies_between = True  # to host memory and back; false where the device is the host
        self.groups = _groups(run.model)
        self.parts = [self.part(group) for group in self.groups]
        self.part_state = uniform_group(self.optimizer)
        self.filled = self.largest = self.tensors = 0  # what is in the bucket: elements, of the largest tensor, tensors
        self.host = 0
        self.in_tail = self.norm_waits = False

    def part(self, group: Group) -> int:
        """Elements of a group that are this rank's: padded for aligned sends (``nccl_start_alignment_factor``)."""
        total, align = _elements(group), 2 * self.shards
        return -(-total // align) * 2

    def play(self) -> Prediction:
        """See :meth:`Step.play`; adds the host's memory."""
        return replace(super().play(), host_bytes=self.host)

    def hold_states(self) -> None:
        """Hold flat weights, and masters and moments in parts."""
        self.hold_weights()
        for part in self.parts:
            if self.offloads:
                self.host += host_size(FP32 * part, pin=self.pins and self.pins_masters)
                self.host += self.part_state.state_bytes * part + FP32
            else:
                self.t.take(OPTIMIZER, FP32 * part, *(FP32 * part for _ in self.part_state.states))
                if self.optimizer.counters_on_device:
                    self.t.take(OPTIMIZER, FP32)

    def hold_weights(self) -> None:
        """Hold flat weights, a buffer for each group."""
        for part in self.parts:
            self.t.take(WEIGHTS, self.width * part * self.shards)

    def small_gradients(self, shapes: Iterable[Shape]) -> None:
        """See :meth:`Step.small_gradients`; here they are followed like the others, and so small that only buckets notice."""
        for shape in shapes:
            if not self.in_tail or len(shape) > 1:  # the last norm's came long before
                self.arrive(numel(shape), 0)

    def settle_head(self) -> None:
        """See :meth:`Step.settle_head`."""
        self.t.give(GRADIENTS, self.width * self.head)
        self.t.take(TEMPORARIES, self.width * self.head)
        self.arrive(self.head, self.width)

    settle_embedding = settle_head

    def accumulate(self, elements: int) -> None:
        """See :meth:`Step.accumulate`."""
        self.arrive(elements, self.width)

    @abstractmethod
    def arrive(self, elements: int, width: int) -> None:
        """A parameter's gradient is there, in so many bytes per element and counted as temporary; 0: not followed."""

    def _blocks(self, play: Callable[[], None]) -> None:
        """See :meth:`Step._blocks`; blocks are alike from the first that leaves the bucket as it found it."""
        layers, played, alike = self.run.model.n_layer, 0, False
        while played < layers:
            before, state = self.t.live.copy(), self.bucket_state
            if alike:
                played = layers - 1
            play()
            played, alike = played + 1, False
            if state == self.bucket_state and played < layers - 1:
                self.t.repeat(before, layers - 1 - played)
                alike = True

    @property
    def bucket_state(self) -> tuple[int, ...]:
        """What decides what the next gradient does."""
        return (self.filled,)

    def _loss_backward(self) -> None:
        super()._loss_backward()
        self.norm_waits = True

    def block_backward(self) -> None:
        """See :meth:`Step.block_backward`; before the first block the last norm's gradients come."""
        self.last_norm()
        super().block_backward()

    def last_norm(self) -> None:
        """The last norm's gradients, once."""
        if self.norm_waits:
            self.norm_waits = False
            for shape in self.parameters.small:
                if len(shape) == 1:
                    self.arrive(numel(shape), 0)

    def _tail(self) -> None:
        self.in_tail = True
        super()._tail()
        self.in_tail = False

    def _step_in_groups(self) -> None:
        """What the update of a part allocates for a while."""
        if not self.offloads:
            self.t.touch(TEMPORARIES, (self.part_state.together + self.part_state.one_by_one) * max(self.parts))


@lru_cache(maxsize=64)
def _groups(model: ModelConfig) -> tuple[Group, Group]:
    """The shapes of matrices and of vectors, which DeepSpeed's optimizer keeps apart: with weight decay, and without."""
    shapes = parameter_shapes(model).values()
    return tuple(shape for shape in shapes if len(shape) > 1), tuple(shape for shape in shapes if len(shape) == 1)


@lru_cache(maxsize=256)
def _elements(group: Group) -> int:
    return sum(map(numel, group))


@lru_cache(maxsize=1024)
def padded_elements(group: Group, shards: int) -> int:
    """Elements of each rank's parts of a group whose tensors are cut one by one."""
    return sum(padded(shape, shards) for shape in group)


@lru_cache(maxsize=4096)
def padded(shape: Shape, shards: int) -> int:
    """Elements of a tensor that stage 3 has cut into equal parts, each rank one."""
    return math.ceil(numel(shape) / shards)
