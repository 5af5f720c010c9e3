"""The ledger that DeepSpeed's sharding optimizers share: states cut over the ranks, a reduce bucket, host memory."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import lru_cache

from scalegpt.architecture.parameters import Shape
from scalegpt.config import RunConfig
from scalegpt.config.backends import Mesh
from scalegpt.config.optimizers import FP32
from scalegpt.planner.memory.deepspeed.settings import Settings
from scalegpt.planner.memory.states import uniform_group
from scalegpt.planner.memory.step import Step
from scalegpt.planner.memory.tensors import numel
from scalegpt.planner.memory.timeline import GRADIENTS, OPTIMIZER, TEMPORARIES, WEIGHTS, host_size
from scalegpt.units import BYTES

NORM_BYTES = 8
"""Bytes of an element in the fp64 copy from which a gradient's norm is taken (``zero/utils.py: get_norm_dtype``); one tensor
is copied at a time."""

Shapes = tuple[Shape, ...]


def offloaded(zero: Settings, what: str) -> bool:
    """Whether the states of ``what`` live in host memory: ``optimizer``, or ``param`` for the weights."""
    return ((zero.get(f"offload_{what}") or {}).get("device") or "none") != "none"


def pinned(zero: Settings, what: str) -> bool:
    """Whether the offloaded states of ``what`` (``optimizer`` or ``param``) lie in pinned memory."""
    return bool((zero.get(f"offload_{what}") or {}).get("pin_memory"))


class ShardedStep(Step, ABC):
    """The step that stages 1 to 3 share: weights in the compute dtype, fp32 masters and moments cut over the ranks."""

    pins_masters = True

    def __init__(self, run: RunConfig, mesh: Mesh, grad_accum: int, kernel: str, settings: Settings) -> None:
        super().__init__(run, mesh, grad_accum, kernel)
        self.zero = settings["zero_optimization"]
        self.accumulated = BYTES[settings["data_types"]["grad_accum_dtype"]]
        self.sent = BYTES[settings["communication_data_type"]]
        self.offloads, self.pins = offloaded(self.zero, "optimizer"), pinned(self.zero, "optimizer")
        self.bucket = int(self.zero["reduce_bucket_size"])
        self.overlaps = bool(self.zero["overlap_comm"])
        self.copies_between = True  # whether offload copies gradients to the host; false if host and device are one
        self.groups = self.parameters.groups
        self.parts = [self.part(group) for group in self.groups]
        self.part_state = uniform_group(self.optimizer)
        self.filled = self.largest = self.tensors = 0  # in the bucket: elements, those of the largest tensor, tensors

    def part(self, group: Shapes) -> int:
        """Elements of a rank's part of a flat group, padded for aligned sends (``nccl_start_alignment_factor``)."""
        total, align = _elements(group), 2 * self.shards
        return -(-total // align) * 2

    def hold_states(self) -> None:
        """Hold the weights, and this rank's parts of masters and moments."""
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
        """Hold the whole weights, one flat buffer for each group."""
        for part in self.parts:
            self.t.take(WEIGHTS, self.compute * part * self.shards)

    def small_gradients(self, shapes: Iterable[Shape]) -> None:
        """See :meth:`Step.small_gradients`; here each gradient is complete, and none of its bytes count as temporary."""
        for shape in shapes:
            self.arrive(numel(shape), 0)

    def settle_head(self) -> None:
        """See :meth:`Step.settle_head`; the complete gradient becomes temporary and goes on to :meth:`arrive`."""
        self.t.give(GRADIENTS, self.compute * self.head)
        self.t.take(TEMPORARIES, self.compute * self.head)
        self.arrive(self.head, self.compute)

    def accumulate(self, elements: int) -> None:
        """See :meth:`Step.accumulate`; the complete gradient goes on to :meth:`arrive`."""
        self.arrive(elements, self.compute)

    @abstractmethod
    def arrive(self, elements: int, width: int) -> None:
        """Take a parameter's complete gradient, of which ``width`` bytes an element are counted as temporary (0: none)."""

    def _step_in_groups(self) -> None:
        """Play the temporaries of the update, one part after another."""
        if not self.offloads:
            self.t.touch(TEMPORARIES, (self.part_state.together + self.part_state.one_by_one) * max(self.parts))


@lru_cache(maxsize=256)
def _elements(group: Shapes) -> int:
    return sum(map(numel, group))


@lru_cache(maxsize=1024)
def part_of_group(group: Shapes, shards: int) -> int:
    """Elements that a rank holds of a group whose tensors are each cut over the ranks."""
    return sum(part_of_tensor(shape, shards) for shape in group)


@lru_cache(maxsize=4096)
def part_of_tensor(shape: Shape, shards: int) -> int:
    """Elements that a rank holds of a tensor that stage 3 cuts into equal parts, one for each rank."""
    return math.ceil(numel(shape) / shards)
