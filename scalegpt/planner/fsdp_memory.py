"""FSDP2's part of the ledger: shards, gathered weights, and the buffers of its collectives.

Read from torch 2.13's ``torch/distributed/fsdp/_fully_shard`` (``foreach_all_gather``, ``foreach_reduce``,
``FSDPParamGroup``), for the groups that our backend makes: one for each block, one for the root with embeddings, final norm
and head. Tensors are cut along their first dimension into ⌈rows / W⌉ rows, so a rank may hold padding.

- Gathering a group allocates a buffer of all its weights in the compute dtype and the weights themselves. In the forward pass
  the buffer lives until the next gather has begun; in the backward pass it is freed at once, but the next block's is already
  on its way.
- Reducing a group copies its gradients into an fp32 buffer, which lives until the next reduction, and leaves an fp32 shard.
- On inner micro steps of stages 0 and 2 nothing is reduced: whole fp32 gradients add up.
"""

from scalegpt.config import RunConfig
from scalegpt.planner.block import TEMPORARIES
from scalegpt.planner.parameters import Shape
from scalegpt.planner.step import GRADIENTS, Step, numel
from scalegpt.planner.timeline import rounded

GATHERED, GATHER_BUFFERS, REDUCE_BUFFERS = "gathered weights", "gather buffers", "reduce buffers"


class FSDPStep(Step):
    """One optimizer step under ``fsdp``, at stage 0, 2 or 3."""

    casts_weights = False

    def __init__(self, run: RunConfig, ranks: int, grad_accum: int) -> None:
        super().__init__(run, ranks, grad_accum)
        self.stage = run.parallel.stage
        self.shards = ranks if self.stage > 0 else 1
        self.buffered = self.reducing = 0  # bytes of the buffers that wait to be freed
        self.stays_gathered = False  # from an inner micro step to the next

    def held(self, shape: Shape) -> int:
        """See :meth:`Step.held`; a shard is padded to ⌈rows / W⌉ rows."""
        return rounded(4 * self._padded(shape) // self.shards)

    def _padded(self, shape: Shape) -> int:
        return -(-shape[0] // self.shards) * self.shards * numel(shape[1:])

    def _gathered(self, shapes: list[Shape]) -> int:
        return sum(rounded(self.s.compute * self._padded(shape)) for shape in shapes)

    def _flat(self, shapes: list[Shape], size: int) -> int:
        return rounded(size * sum(self._padded(shape) for shape in shapes))

    # --- gathering ---------------------------------------------------------------------------------------------------

    def _gather(self, shapes: list[Shape], *, keep_buffer: bool) -> None:
        buffer = self._flat(shapes, self.s.compute) if self.shards > 1 else 0
        self.t.hold(GATHER_BUFFERS, buffer)
        self.t.hold(GATHERED, self._gathered(shapes))
        self._free_buffer()
        if keep_buffer:
            self.buffered = buffer
        else:
            self.t.drop(GATHER_BUFFERS, buffer)

    def _free_buffer(self) -> None:
        self.t.drop(GATHER_BUFFERS, self.buffered)
        self.buffered = 0

    def before_forward(self) -> None:
        """Gather the root, unless an inner micro step has left it gathered."""
        if not self.stays_gathered:
            self._gather(self.root_shapes, keep_buffer=True)

    def block_forward(self) -> None:
        """Gather, compute, and at stage 3 give back; stages 0 and 2 keep the weights to the step's end."""
        if not self.stays_gathered:
            self._gather(self.block_shapes, keep_buffer=True)
        self.block.forward()
        if self.stage == 3:
            self.t.drop(GATHERED, self._gathered(self.block_shapes))

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
            self._gather(self.block_shapes, keep_buffer=False)
            fetches = self.shards > 1 and not self.at_last_block  # the next block's weights, meanwhile
            prefetch = self._flat(self.block_shapes, self.s.compute) if fetches else 0
            t.hold(GATHER_BUFFERS, prefetch)
        self.block.backward()
        if self.stage == 3:
            t.drop(GATHER_BUFFERS, prefetch)
        matrices = [shape for shape in self.block_shapes if len(shape) > 1]
        self._finish_group(self.block_shapes, matrices)

    def after_backward(self) -> None:
        """The root's gradients, reduced or added up."""
        heads = [shape for name, shape in self.shapes.items() if name in {"wte.weight", "head.weight"}]
        self._finish_group(self.root_shapes, heads)
        self._free_buffer()
        self.stays_gathered = not self.reduces
        if self.reduces:
            self.t.drop(REDUCE_BUFFERS, self.reducing)
            self.reducing = 0

    def _finish_group(self, shapes: list[Shape], counted: list[Shape]) -> None:
        """Give the weights back where the stage says so, and turn the group's gradients into what is kept.

        ``counted`` are the tensors whose gradients, in the compute dtype, are on the ledger already.
        """
        t, s = self.t, self.s
        t.hold(GRADIENTS, sum(rounded(s.compute * numel(shape)) for shape in shapes if shape not in counted))
        mine = sum(rounded(s.compute * numel(shape)) for shape in shapes)
        whole = sum(rounded(4 * numel(shape)) for shape in shapes)
        if not self.reduces:
            if s.compute != 4:
                t.hold(GRADIENTS, whole)
                t.drop(GRADIENTS, mine)
            if self.has_gradients:
                t.drop(GRADIENTS, whole)
            return
        t.drop(GATHERED, self._gathered(shapes))
        if self.stage != 3 and self.has_gradients:  # they join what has added up
            t.drop(GRADIENTS, mine)
            mine = whole
        t.drop(REDUCE_BUFFERS, self.reducing)
        self.reducing = self._flat(shapes, 4)
        t.hold(REDUCE_BUFFERS, self.reducing)
        t.drop(GRADIENTS, mine)
        shard = rounded(self._flat(shapes, 4) // self.shards)
        t.hold(GRADIENTS, shard)
        if self.stage == 3 and self.has_gradients:
            t.drop(GRADIENTS, shard)
