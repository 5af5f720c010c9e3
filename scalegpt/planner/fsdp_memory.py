"""FSDP2's part of the ledger: shards, gathered weights, and the buffers of its collectives.

Read from torch 2.13's ``torch/distributed/fsdp/_fully_shard`` (``foreach_all_gather``, ``foreach_reduce``,
``FSDPParamGroup``), for the groups that our backend makes: one for each block, one for the root with embeddings, final norm
and head. Tensors are cut along their first dimension into ⌈rows / W⌉ rows, so a rank may hold padding.

- Gathering a group allocates a buffer of all its weights in the compute dtype and the weights themselves. In the forward pass
  the buffer lives until the next gather has begun; in the backward pass it is freed at once, but the next block's is already
  on its way.
- Reducing a group copies its gradients into an fp32 buffer, which lives until the next reduction, and leaves an fp32 shard.
- On inner micro steps of stages 0 and 2 nothing is reduced: whole fp32 gradients add up.
- With offload (stage 3) shards of weights, moments and gradients live in host memory, weights and gradients in pinned memory,
  where an allocation is a power of two. To gather a group its fp32 shards are copied to the device one by one and cast, and
  the casts live until all have been sent. The fp32 shard of a reduced group goes to the host before the next one is made.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

from scalegpt.config import RunConfig
from scalegpt.planner.memory import Prediction
from scalegpt.planner.parameters import Shape
from scalegpt.planner.sizes import TEMPORARIES, host_size
from scalegpt.planner.step import GRADIENTS, Step, numel
from scalegpt.planner.timeline import rounded

GATHERED, GATHER_BUFFERS, REDUCE_BUFFERS = "gathered weights", "gather buffers", "reduce buffers"


def padded(shape: Shape, shards: int) -> int:
    """Elements of a tensor whose rows are made a multiple of the shards."""
    return -(-shape[0] // shards) * shards * numel(shape[1:])


@dataclass(frozen=True)
class Group:
    """The bytes of the tensors that are gathered and reduced together.

    Attributes:
        gathered: of the whole weights, in the compute dtype.
        buffer: of all of them in one; 0 where nothing is sent.
        casts: of each shard in the compute dtype; with fp32 weights only what is copied to the device.
        shards: of each shard in fp32, beside its cast; 0 where there is none.
        gradients: of the gradients in the compute dtype.
        small: of those among them that are counted with the group alone.
        accumulated: of whole fp32 gradients.
        reduced: of all gradients in one, in fp32.
        shard: of this rank's part of it.
    """

    gathered: int
    buffer: int
    casts: tuple[int, ...]
    shards: tuple[int, ...]
    gradients: int
    small: int
    accumulated: int
    reduced: int
    shard: int

    @classmethod
    @lru_cache(maxsize=512)
    def of(cls, shapes: tuple[Shape, ...], counted: tuple[Shape, ...], shards: int, compute: int) -> "Group":
        """The group of these tensors; the gradients of ``counted`` ones are on the ledger before their group's turn."""
        sizes = [padded(shape, shards) for shape in shapes]
        flat = sum(sizes)
        gradients = {shape: rounded(compute * numel(shape)) for shape in shapes}
        return cls(
            gathered=sum(rounded(compute * size) for size in sizes),
            buffer=rounded(compute * flat) if shards > 1 else 0,
            casts=tuple(rounded(compute * size // shards) for size in sizes),
            shards=tuple(rounded(4 * size // shards) if compute != 4 else 0 for size in sizes),
            gradients=sum(gradients[shape] for shape in shapes),
            small=sum(gradients[shape] for shape in shapes) - sum(gradients[shape] for shape in counted),
            accumulated=sum(rounded(4 * numel(shape)) for shape in shapes),
            reduced=rounded(4 * flat),
            shard=rounded(4 * flat // shards),
        )


class FSDPStep(Step):
    """One optimizer step under ``fsdp``, at stage 0, 2 or 3."""

    casts_weights = False

    def __init__(self, run: RunConfig, ranks: int, grad_accum: int) -> None:
        super().__init__(run, ranks, grad_accum)
        self.stage = run.parallel.stage
        self.offloads = run.parallel.offload == "all"
        self.shards = ranks if self.stage > 0 else 1
        if self.stage == 3:
            self.micro_steps = min(grad_accum, 2)  # each reduces, also the last
        matrices = tuple(shape for shape in self.block_shapes if len(shape) > 1)
        tables = tuple(self.shapes[name] for name in ("wte.weight", "head.weight") if name in self.shapes)
        self.block_group = Group.of(self.block_shapes, matrices, self.shards, self.s.compute)
        self.root_group = Group.of(self.root_shapes, tables, self.shards, self.s.compute)
        self.buffered = self.reducing = 0  # bytes of the buffers that wait to be freed
        self.stays_gathered = False  # from an inner micro step to the next

    def play(self) -> Prediction:
        """See :meth:`Step.play`; adds the host's memory."""
        return replace(super().play(), host_bytes=self._host_bytes() if self.offloads else 0)

    def _host_bytes(self) -> int:
        """Weights and gradients in pinned memory, and the optimizer's state, which torch makes as it makes any tensor."""
        pinned = self.over_all(lambda shape: 2 * host_size(self._part(shape), pin=True))
        return pinned + self.optimizer.state_bytes(self.counted, self._part)

    def _part(self, shape: Shape) -> int:
        """Bytes of this rank's part of an fp32 tensor."""
        return 4 * padded(shape, self.shards) // self.shards

    def held(self, shape: Shape) -> int:
        """See :meth:`Step.held`; a shard is padded to ⌈rows / W⌉ rows."""
        return rounded(4 * padded(shape, self.shards) // self.shards)

    def hold_states(self) -> None:
        """See :meth:`Step.hold_states`."""
        if not self.offloads:
            super().hold_states()

    @property
    def largest_held(self) -> int:
        """See :attr:`Step.largest_held`."""
        return max(padded(shape, self.shards) for shape in (*self.block_shapes, *self.root_shapes)) // self.shards

    # --- gathering ---------------------------------------------------------------------------------------------------

    def _gather(self, group: Group, *, keep_buffer: bool) -> None:
        self._send(group)
        if self.shards == 1:
            self._copy(group)
        else:
            self.t.hold(GATHERED, group.gathered)
        self._free_buffer()
        if keep_buffer:
            self.buffered = group.buffer
        else:
            self.t.drop(GATHER_BUFFERS, group.buffer)

    def _send(self, group: Group) -> None:
        """Begin to gather: the buffer, with what it is filled from beside it."""
        t = self.t
        if self.offloads and self.shards > 1:
            for cast, shard in zip(group.casts, group.shards, strict=True):
                t.hold(GATHER_BUFFERS, shard + cast)
                t.drop(GATHER_BUFFERS, shard)
        t.hold(GATHER_BUFFERS, group.buffer)
        if self.offloads and self.shards > 1:
            t.drop(GATHER_BUFFERS, sum(group.casts))

    def _copy(self, group: Group) -> None:
        """Where nothing is sent each weight is cast and copied; one's cast is freed when the next one's is made."""
        t, before = self.t, 0
        copies = self.offloads or self.s.compute != 4
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
        """Gather the root, unless an inner micro step has left it gathered."""
        if not self.stays_gathered:
            self._gather(self.root_group, keep_buffer=True)

    def block_forward(self) -> None:
        """Gather, compute, and at stage 3 give back; stages 0 and 2 keep the weights to the step's end."""
        if not self.stays_gathered:
            self._gather(self.block_group, keep_buffer=True)
        self.block.forward()
        if self.stage == 3:
            self.t.drop(GATHERED, self.block_group.gathered)

    def before_backward(self) -> None:
        """At stages 0 and 2 the root's backward hook finds nothing to gather, and lets the last buffer go."""
        if self.stage != 3:
            self._free_buffer()

    # --- gradients ---------------------------------------------------------------------------------------------------

    @property
    def reduces(self) -> bool:
        """Whether this micro step reduces its gradients."""
        return self.stage == 3 or self.last_micro

    def accumulate(self, elements: int) -> None:
        """The gradient stays as it is until the block's are all there."""
        self.t.give(TEMPORARIES, self.s.compute * elements)
        self.t.take(GRADIENTS, self.s.compute * elements)

    def small_gradients(self, shapes: object) -> None:
        """Counted with their group."""

    def settle_head(self) -> None:
        """An untied head's gradient waits for the root's."""

    def settle_embedding(self) -> None:
        """The token embedding's gradient waits for the root's."""

    def block_backward(self) -> None:
        """Gather, compute, reduce."""
        t = self.t
        if self.stage == 3:
            self._free_buffer()
            self._gather(self.block_group, keep_buffer=False)
            fetches = self.shards > 1 and not self.at_last_block  # the next block's weights, meanwhile
            if fetches:
                self._send(self.block_group)
        self.block.backward()
        if self.stage == 3 and fetches:
            t.drop(GATHER_BUFFERS, self.block_group.buffer)
        self._finish_group(self.block_group)

    def after_backward(self) -> None:
        """The root's gradients, reduced or added up."""
        self._finish_group(self.root_group)
        self._free_buffer()
        self.stays_gathered = not self.reduces
        if self.reduces:
            self.t.drop(REDUCE_BUFFERS, self.reducing)
            self.reducing = 0

    def _finish_group(self, group: Group) -> None:
        """Give the weights back where the stage says so, and turn the group's gradients into what is kept."""
        t, mine = self.t, group.gradients
        t.hold(GRADIENTS, group.small)
        if not self.reduces:
            if self.s.compute != 4:
                t.hold(GRADIENTS, group.accumulated)
                t.drop(GRADIENTS, mine)
            if self.has_gradients:
                t.drop(GRADIENTS, group.accumulated)
            return
        t.drop(GATHERED, group.gathered)
        if self.stage != 3 and self.has_gradients:  # they join what has added up
            t.drop(GRADIENTS, mine)
            mine = group.accumulated
        t.drop(REDUCE_BUFFERS, self.reducing)
        self.reducing = group.reduced
        t.hold(REDUCE_BUFFERS, self.reducing)
        t.drop(GRADIENTS, mine)
        t.hold(GRADIENTS, group.shard)
        if self.offloads or (self.stage == 3 and self.has_gradients):
            t.drop(GRADIENTS, group.shard)

    def _optimizer_step(self) -> None:
        """See :meth:`Step._optimizer_step`; what is offloaded is updated where it lies."""
        if not self.offloads:
            super()._optimizer_step()
