"""The simulated step that DeepSpeed's stages 1 to 3 share: states cut over the ranks, a reduce bucket, host memory."""

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
"""Bytes of an element in the fp64 copy that DeepSpeed makes of one gradient at a time for its norm (``zero/utils.py:
get_norm_dtype``).
"""

Shapes = tuple[Shape, ...]


def offloaded(zero: Settings, what: str) -> bool:
    """Whether ``what``, ``optimizer`` (its states) or ``param`` (the weights), is offloaded to host memory."""
    return ((zero.get(f"offload_{what}") or {}).get("device") or "none") != "none"


def pinned(zero: Settings, what: str) -> bool:
    """Whether ``what``, ``optimizer`` (its states) or ``param`` (the weights), is in pinned memory when offloaded."""
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
        """Elements of a rank's part of a group, flattened and padded for aligned sends (``nccl_start_alignment_factor``)."""
        total, align = _elements(group), 2 * self.shards
        return -(-total // align) * 2

    def hold_states(self) -> None:
        """Allocate the weights, and this rank's parts of fp32 masters and moments (with offload in host memory)."""
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
        """Allocate the whole weights, one flat buffer for each group of tensors."""
        for part in self.parts:
            self.t.take(WEIGHTS, self.compute * part * self.shards)

    def small_gradients(self, shapes: Iterable[Shape]) -> None:
        """Pass complete gradients of norms, biases or positions to :meth:`arrive`.

        They were not counted as temporary before.
        """
        for shape in shapes:
            self.arrive(numel(shape), 0, int(len(shape) == 1))

    def settle_head(self) -> None:
        """Count the complete gradient of an untied head or the token embedding as temporary; pass it to :meth:`arrive`."""
        self.t.give(GRADIENTS, self.compute * self.head)
        self.t.take(TEMPORARIES, self.compute * self.head)
        self.arrive(self.head, self.compute)

    def accumulate(self, elements: int) -> None:
        """Process a matrix's complete gradient, which so far counts as temporary, in the compute dtype."""
        self.arrive(elements, self.compute)

    @abstractmethod
    def arrive(self, elements: int, width: int, group: int = 0) -> None:
        """Process a parameter's complete gradient, which so far counts as temporary, with ``width`` bytes per element.

        ``group`` is 0 for a matrix, 1 for a vector: its place in ``groups``.
        """

    def _step_in_groups(self) -> None:
        """Simulate the temporaries of the update, which goes through this rank's parts one after another."""
        if not self.offloads:
            self.t.touch(TEMPORARIES, (self.part_state.together + self.part_state.one_by_one) * max(self.parts))


@lru_cache(maxsize=256)
def _elements(group: Shapes) -> int:
    return sum(map(numel, group))


@lru_cache(maxsize=1024)
def part_of_group(group: Shapes, shards: int) -> int:
    """The number of elements in a rank's part of a group of tensors. Each tensor is cut over the ranks by itself."""
    return sum(part_of_tensor(shape, shards) for shape in group)


@lru_cache(maxsize=4096)
def part_of_tensor(shape: Shape, shards: int) -> int:
    """The number of elements in a rank's part of a tensor.

    Stage 3 cuts the tensor into equal parts, one for each rank.
    """
    return math.ceil(numel(shape) / shards)
