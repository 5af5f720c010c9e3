"""FSDP2 in the memory prediction: shards, gathered weights, and the buffers of its collectives.

Follows torch 2.13's ``torch/distributed/fsdp/_fully_shard`` (``foreach_all_gather``, ``foreach_reduce``,
``FSDPParamGroup``), for the groups that our backend makes: one for each block, and one for the root, which has
embeddings, final norm and head. A tensor is cut along its first dimension into ⌈rows / W⌉ rows for each rank, so a
rank's shard may hold padding.

- Gathering a group allocates a buffer for all its weights in the compute dtype, and the weights themselves. In the forward
  pass the buffer lives until the next group's weights exist. In the backward pass it is allocated one block ahead, and lives
  until the group's own weights exist.
- Reducing a group copies its gradients into a buffer in the dtype of reduction, and makes this rank's fp32 shard of the
  result. The buffer lives until the next reduction.
- At stages 0 and 2 only the last micro step reduces. Until then whole gradients add up in the dtype of reduction. Stage 0
  copies its weights to the compute dtype in each micro step; stage 2 gathers them once for all micro steps.
- With offload (stage 3) shards of weights, moments and gradients live in host memory. Weights and gradients are pinned there,
  and a pinned allocation is a power of two. To gather a group, its fp32 shards are copied to the device one by one and cast.
  The casts live until the gather's buffer is filled. The fp32 shard of a group's reduced gradients goes to the host before
  the next group's is made.
- With replicas of several shards (HSDP) a group's reduced shard is all-reduced over the replicas. FSDP2 keeps it until the
  backward pass has ended (``AllReduceState``); without offload it is the gradient itself. At stage 3 only the last micro
  step all-reduces. Until then FSDP2 adds up each replica's shards (``_partial_reduce_output``), which take the gradients'
  place. With offload every micro step all-reduces.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from scalegpt.architecture.parameters import Shape
from scalegpt.config import ParallelConfig, RunConfig
from scalegpt.config.backends import Mesh
from scalegpt.planner.memory.states import state_bytes
from scalegpt.planner.memory.step import Step
from scalegpt.planner.memory.tensors import numel
from scalegpt.planner.memory.timeline import (
    GATHER_BUFFERS,
    GATHERED,
    GRADIENTS,
    REDUCE_BUFFERS,
    TEMPORARIES,
    host_size,
    rounded,
)
from scalegpt.units import BYTES

REDUCE_DTYPE = "fp32"
"""The dtype in which gradients are reduced and added up. The backend and the trace use this constant too."""


def reduces_over_replicas(parallel: ParallelConfig, *, last: bool) -> bool:
    """Whether stage 3 all-reduces gradients over the replicas in a micro step; ``last`` says that it is the step's last."""
    return last or parallel.offload == "all"


def padded(shape: Shape, shards: int) -> int:
    """Elements of a tensor after its rows are padded to a multiple of the number of shards."""
    return -(-shape[0] // shards) * shards * numel(shape[1:])


@dataclass(frozen=True)
class Group:
    """Bytes of one FSDP group, whose parameters are gathered together and whose gradients are reduced together.

    Attributes:
        gathered: the whole weights in the compute dtype.
        buffer: the gather's buffer for all weights in the compute dtype; 0 with a single shard, which gathers nothing.
        casts: for each weight, its shard in the compute dtype; in fp32 the shard's copy on the device.
        shards: for each weight, its fp32 shard, which lives beside the cast; 0 in fp32, which needs no cast.
        gradients: the whole gradients in the compute dtype.
        accumulated: the whole gradients in the dtype of reduction.
        converting: the most bytes beyond ``gradients`` while these are cast to the dtype of reduction one after another.
        reduced: the reduction's buffer for all whole gradients, in the dtype of reduction.
        part: this rank's part of the reduced gradients in the dtype of reduction; 0 if this dtype is fp32.
        shard: this rank's part of the reduced gradients in fp32.
    """

    gathered: int
    buffer: int
    casts: tuple[int, ...]
    shards: tuple[int, ...]
    gradients: int
    accumulated: int
    converting: int
    reduced: int
    part: int
    shard: int

    @classmethod
    @lru_cache(maxsize=512)
    def of(cls, shapes: tuple[Shape, ...], shards: int, compute: int, reduce: int) -> "Group":
        """The group of tensors of these shapes.

        ``compute`` and ``reduce`` are the bytes of an element in these dtypes.
        """
        sizes = [padded(shape, shards) for shape in shapes]
        flat = sum(sizes)
        low = [rounded(compute * numel(shape)) for shape in shapes]
        high = [rounded(reduce * numel(shape)) for shape in shapes]
        grown = accumulate(high_ - low_ for high_, low_ in zip(high, low, strict=True))
        return cls(
            gathered=sum(rounded(compute * size) for size in sizes),
            buffer=rounded(compute * flat) if shards > 1 else 0,
            casts=tuple(rounded(compute * size // shards) for size in sizes),
            shards=tuple(rounded(4 * size // shards) if compute != 4 else 0 for size in sizes),
            gradients=sum(low),
            accumulated=sum(high),
            converting=max(more + size for more, size in zip(grown, low, strict=True)),
            reduced=rounded(reduce * flat),
            part=rounded(reduce * flat // shards) if reduce != 4 else 0,
            shard=rounded(4 * flat // shards),
        )


class FSDPStep(Step):
    """One simulated optimizer step under ``fsdp``, at stage 0, 2 or 3."""

    def __init__(self, run: RunConfig, mesh: Mesh, grad_accum: int, kernel: str) -> None:
        super().__init__(run, mesh, grad_accum, kernel)
        self.stage = run.parallel.stage
        self.offloads = run.parallel.offload == "all"
        self.replicas = mesh.replicas
        if self.stage == 3:
            self.micro_steps = min(grad_accum, 2)  # each micro step reduces, so the second stands for all later ones
        self.reduce = BYTES[REDUCE_DTYPE]
        self.block_group = Group.of(self.parameters.block, self.shards, self.compute, self.reduce)
        self.root_group = Group.of(self.parameters.root, self.shards, self.compute, self.reduce)
        self.buffered = self.reducing = 0  # bytes of the gather's and the reduction's buffer that still live
        self.held_parts = 0  # with replicas, bytes of reduced gradients that live until the backward pass ends
        self.stays_gathered = False  # at stage 2, whether the micro step before left the weights gathered

    def _part(self, shape: Shape) -> int:
        """Bytes of this rank's shard of an fp32 tensor, including row padding, before the allocator rounds them."""
        return 4 * padded(shape, self.shards) // self.shards

    def held(self, shape: Shape) -> int:
        """Bytes that a rank holds of an fp32 tensor of this shape: its shard, padded to ⌈rows / W⌉ rows."""
        return rounded(self._part(shape))

    def hold_states(self) -> None:
        """Allocate what lives between steps.

        Offloaded weights and gradients are in pinned host memory, moments in unpinned.
        """
        if not self.offloads:
            super().hold_states()
            return
        pinned = self.over_all(lambda shape: 2 * host_size(self._part(shape), pin=True))
        self.host = pinned + state_bytes(self.optimizer, self.counted, self._part)

    @property
    def largest_held(self) -> int:
        """The number of elements of this rank's largest shard, including row padding."""
        return max(padded(shape, self.shards) for _, shape in self.counted) // self.shards

    # --- gathering ---------------------------------------------------------------------------------------------------

    def _gather(self, group: Group) -> None:
        """Gather a group in the forward pass; the gather's buffer lives until the next group's weights exist."""
        self._send(group)
        self._copy_out(group)
        self._free_buffer()
        self.buffered = group.buffer

    def _copy_out(self, group: Group) -> None:
        if self.shards == 1:
            self._copy(group)
        else:
            self.t.hold(GATHERED, group.gathered)

    def _fetch(self) -> None:
        """Begin to gather a block ahead of its backward pass: allocate the gather's buffer."""
        if self.shards > 1:
            self._send(self.block_group)
            self.buffered = self.block_group.buffer

    def _send(self, group: Group) -> None:
        """Begin to gather a group: allocate the gather's buffer, with offload also casts of the shards until sent."""
        t = self.t
        if self.offloads and self.shards > 1:
            for cast, shard in zip(group.casts, group.shards, strict=True):
                t.hold(GATHER_BUFFERS, shard + cast)
                t.drop(GATHER_BUFFERS, shard)
        t.hold(GATHER_BUFFERS, group.buffer)
        if self.offloads and self.shards > 1:
            t.drop(GATHER_BUFFERS, sum(group.casts))

    def _copy(self, group: Group) -> None:
        """Copy the weights of a group with a single shard, one by one; a cast is freed when the next one is made."""
        t, before = self.t, 0
        copies = self.offloads or self.compute != 4
        for cast, shard in zip(group.casts, group.shards, strict=True):
            if copies:
                t.hold(GATHER_BUFFERS, cast + (shard if self.offloads else 0))
                t.drop(GATHER_BUFFERS, before + (shard if self.offloads else 0))
                before = cast
            t.hold(GATHERED, cast)
        t.drop(GATHER_BUFFERS, before)

    def _free_buffer(self) -> None:
        self.t.drop(GATHER_BUFFERS, self.buffered)
        self.buffered = 0

    def before_forward(self) -> None:
        """Gather the root group, unless the micro step before left it gathered."""
        if not self.stays_gathered:
            self._gather(self.root_group)

    def block_forward(self) -> None:
        """Gather a block's weights and simulate its forward pass; stage 3 then frees the weights, other stages keep them."""
        if not self.stays_gathered:
            self._gather(self.block_group)
        super().block_forward()
        if self.stage == 3:
            self.t.drop(GATHERED, self.block_group.gathered)

    def before_backward(self) -> None:
        """Free the last gather's buffer and, at stage 3, begin to gather the last block; the root stays gathered."""
        self._free_buffer()
        if self.stage == 3:
            self._fetch()

    # --- gradients ---------------------------------------------------------------------------------------------------

    @property
    def reduces(self) -> bool:
        """Whether this micro step reduces its gradients."""
        return self.stage == 3 or self.last_micro

    @property
    def adds_at_once(self) -> bool:
        """Whether a new gradient is added to an existing one as soon as it is made.

        It is not if compute and reduction dtype differ, since FSDP2 then waits for all gradients of a group, nor at
        stage 3, which reduces gradients instead.
        """
        return self.compute == self.reduce and self.has_gradients and self.stage != 3

    def accumulate(self, elements: int) -> None:
        """Add a matrix's new gradient to an existing one at once, or keep it in the compute dtype until its group is done."""
        self.t.give(TEMPORARIES, self.compute * elements)
        if not self.adds_at_once:
            self.t.take(GRADIENTS, self.compute * elements)

    def block_backward(self) -> None:
        """Gather a block's weights, simulate its backward pass, and reduce or add up its gradients."""
        if self.stage == 3:
            self._copy_out(self.block_group)
            self._free_buffer()
            if not self.at_last_block:
                self._fetch()
        super().block_backward()
        self._finish_group(self.block_group)

    def after_backward(self) -> None:
        """Reduce or add up the root's gradients, and free the collectives' buffers."""
        self._finish_group(self.root_group)
        self._free_buffer()
        self.stays_gathered = self.stage == 2 and not self.reduces
        if self.reduces:
            self.t.drop(REDUCE_BUFFERS, self.reducing + self.held_parts)
            self.reducing = self.held_parts = 0

    def _finish_group(self, group: Group) -> None:
        """Free a group's weights unless they stay gathered, and reduce its gradients or add them up."""
        t, mine = self.t, group.gradients
        joins = self.has_gradients and self.stage != 3  # are these added to earlier micro steps' gradients?
        if not self.reduces:
            t.drop(GATHERED, 0 if self.stage == 2 else group.gathered)
            if self.compute != self.reduce:
                t.hold(GRADIENTS, 0 if joins else group.converting)
                t.drop(GRADIENTS, mine if joins else group.converting + mine - group.accumulated)
            return
        t.drop(GATHERED, group.gathered)
        if joins and self.compute != self.reduce:
            t.drop(GRADIENTS, mine)
        if joins:
            mine = group.accumulated
        t.drop(REDUCE_BUFFERS, self.reducing)
        self.reducing = group.reduced
        t.hold(REDUCE_BUFFERS, self.reducing)
        t.drop(GRADIENTS, mine)
        t.hold(REDUCE_BUFFERS, group.part)
        t.hold(GRADIENTS, group.shard)
        if self.replicas > 1:
            self.held_parts += group.part
        else:
            t.drop(REDUCE_BUFFERS, group.part)
        if self.offloads or (self.stage == 3 and self.has_gradients):
            t.drop(GRADIENTS, group.shard)
        if self.offloads and self.replicas > 1:
            t.hold(REDUCE_BUFFERS, group.shard)
            self.held_parts += group.shard

    def _optimizer_step(self) -> None:
        """Simulate the gradient norm and the update; with offload both run in host memory."""
        if not self.offloads:
            super()._optimizer_step()
