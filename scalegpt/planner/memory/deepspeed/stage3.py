"""ZeRO-3 in the memory prediction: every tensor is cut over the ranks, and gathered where it is needed.

:mod:`scalegpt.planner.memory.deepspeed.gather` says which weights are gathered. The rest follows deepspeed 0.19's
``stage3.py``:

- Between steps a rank holds its parts of weights, masters, moments and gradients, the reduce bucket, and whole tensors
  if they have at most ``stage3_param_persistence_threshold`` elements.
- Second copies of the weights (hpZ) live from the first release after an update to the next update. Tensors that are kept
  whole have one only during the update.
- A block's gradients wait until its backward pass is over (blocks are leaf modules). Then they pass through the bucket
  in the dtype of communication. A copy of the bucket joins them, each padded to a multiple of the ranks, and is reduced and
  cut. Each rank whose part of a tensor is not full takes a small tensor of its own for the padding.
- The optimizer updates one group after another, each with a flat copy of the group's gradients.
"""

from collections.abc import Callable

from scalegpt.architecture.parts import TOKENS
from scalegpt.config import RunConfig
from scalegpt.config.backends import Mesh
from scalegpt.planner.memory.deepspeed.gather import Schedule, Visit, gathering, schedule
from scalegpt.planner.memory.deepspeed.settings import Settings
from scalegpt.planner.memory.deepspeed.sharded import (
    NORM_BYTES,
    Shapes,
    ShardedStep,
    offloaded,
    part_of_group,
    part_of_tensor,
    pinned,
)
from scalegpt.planner.memory.tensors import numel
from scalegpt.planner.memory.timeline import BUCKETS, GATHERED, GRADIENTS, TEMPORARIES, WEIGHTS, host_size, rounded


class Stage3(ShardedStep):
    """One simulated optimizer step of stage 3."""

    pins_masters = False

    def __init__(self, run: RunConfig, mesh: Mesh, grad_accum: int, kernel: str, settings: Settings) -> None:
        super().__init__(run, mesh, grad_accum, kernel, settings)
        self.micro_steps = min(grad_accum, 2)  # gradient parts are allocated from the start; the last step holds most
        self.on_host = offloaded(self.zero, "param")
        threshold = int(self.zero["stage3_param_persistence_threshold"])
        whole = [part_of_tensor(shape, mesh.shards) for shape in self.shapes.values() if numel(shape) <= threshold]
        copied = mesh.shards > 1 or self.on_host  # else whole tensors are views of their parts
        self.kept_whole = sum(rounded(self.compute * mesh.shards * part) for part in whole) if copied else 0
        self.parts = [part for group in self.groups for part in self._sub_groups(group)]
        self.gathering = gathering(run, mesh.shards, settings)
        self.plan: Schedule = schedule(self.gathering)
        over = self.gathering.copy_over
        self.copies_of_whole = sum(rounded(self.compute * mesh.shards * part // over) for part in whole) if over else 0
        self.large = 0  # bytes of the gradient that is too large for the bucket
        self.padded = self.padding = 0  # in the bucket: elements with padding, and bytes of the padding's tensors
        self.in_block = False

    def part(self, group: Shapes) -> int:
        """The number of elements in a rank's part of a group of tensors. Each tensor is cut by itself."""
        return part_of_group(group, self.shards)

    def _sub_groups(self, group: Shapes) -> list[int]:
        """A rank's elements of a group, split into sub-groups (``sub_group_size``) that are updated one after another."""
        limit = int(self.zero["sub_group_size"])
        if self.part(group) <= limit:
            return [self.part(group)]
        parts, size = [], 0
        for shape in group:
            size += part_of_tensor(shape, self.shards)
            if size >= limit:
                parts.append(size)
                size = 0
        return [*parts, size] if size else parts

    # --- what lives between steps ------------------------------------------------------------------------------------

    def hold_states(self) -> None:
        """Allocate this rank's parts of all states, the reduce bucket, and the tensors that are kept whole."""
        total = sum(self.parts)
        super().hold_states()
        self.t.hold(WEIGHTS, self.kept_whole)
        self.t.take(BUCKETS, self.sent * self.bucket)
        if self.offloads:
            self.host += host_size(self.accumulated * total, pin=self.pins)
            # The fp32 gradients for the update live beside the accumulated ones.
            self.host += sum(host_size(4 * part, pin=self.pins) for part in self.parts)
        else:
            self.t.take(GRADIENTS, self.accumulated * total)

    def hold_weights(self) -> None:
        """Allocate this rank's parts of the weights: one buffer or, if they are in host memory, a buffer for each group."""
        if self.on_host:
            pin = pinned(self.zero, "param")
            self.host += sum(host_size(self.compute * self.part(group), pin=pin) for group in self.groups)
        else:
            self.t.take(WEIGHTS, self.compute * sum(self.parts))

    # --- gathered weights --------------------------------------------------------------------------------------------

    def _gathered(self, size: int) -> None:
        now = self.t.live[GATHERED]
        if size >= now:
            self.t.hold(GATHERED, size - now)
        else:
            self.t.drop(GATHERED, now - size)

    def _enter(self, visit: Visit) -> None:
        self._gathered(visit.fetching)
        self._gathered(visit.during)

    def _leave(self, visit: Visit) -> None:
        self._gathered(visit.releasing)
        self._gathered(visit.after)

    def before_forward(self) -> None:
        """Gather the head's matrix, which the model uses outside of any submodule."""
        if self.has_gradients and self.gathering.copy_over:
            self.plan = schedule(self.gathering, first=False)
        self._enter(self.plan.start)

    def _embed(self) -> None:
        for visit in self.plan.embeddings:
            self._enter(visit)
        super()._embed()
        self._leave(self.plan.embeddings[-1])

    def _final_norm(self) -> None:
        self._enter(self.plan.norm)
        super()._final_norm()
        self._leave(self.plan.norm)

    def _loss(self) -> None:
        super()._loss()
        self._leave(self.plan.end)

    def _loss_backward(self) -> None:
        self._enter(self.plan.back)
        self._enter(self.plan.norm_back)
        super()._loss_backward()
        self._leave(self.plan.norm_back)

    def _blocks(self, play: Callable[[], None]) -> None:
        """Simulate a pass through all blocks, with weights gathered before each block and released after it."""
        for visit in self.plan.blocks if play == self.block_forward else self.plan.blocks_back[::-1]:
            self._enter(visit)
            play()
            self._leave(visit)

    # --- gradients ---------------------------------------------------------------------------------------------------

    def block_backward(self) -> None:
        """Simulate a block's backward pass, then put the block's gradients into the bucket, matrices first."""
        self.in_block = True
        super().block_backward()
        self.in_block = False
        for shape in sorted(self.parameters.block, key=lambda shape: len(shape) == 1):
            self.arrive(numel(shape), self.compute if len(shape) > 1 else 0)

    def arrive(self, elements: int, width: int, group: int = 0) -> None:  # noqa: ARG002 - others use it
        """Put a gradient into the bucket, or keep it beside the bucket if too large.

        During a block's backward pass, do nothing.
        """
        if self.in_block:
            return
        if self.filled and self.filled + elements > self.bucket:
            self._reduce()
        if self.filled + elements <= self.bucket:
            self.t.give(TEMPORARIES, width * elements)
        else:  # The gradient lives until it is reduced. A position embedding's arrives uncounted (width 0).
            self.large = self.compute * elements
            self.t.take(TEMPORARIES, self.large - width * elements)
        self.filled += elements
        self.largest = max(self.largest, elements)
        self.tensors += 1
        part = -(-elements // self.shards)
        self.padded += part * self.shards
        self.padding += (self.shards - elements // part) * rounded(self.sent * part)

    def _reduce(self) -> None:
        """Reduce the gradients in the bucket: join them in a copy, reduce it, keep this rank's parts."""
        elements, self.filled = self.filled, 0
        if not elements:
            return
        cast = self.sent * elements if self.large and self.sent != self.compute else 0
        alone = self.tensors == 1 and elements % self.shards == 0
        joined, padding = (0, 0) if alone else (self.sent * self.padded, self.padding)
        back = self.accumulated * -(-elements // self.shards) if self.offloads and self.copies_between else 0
        self.t.touch(BUCKETS, cast, joined + padding)
        self.t.touch(BUCKETS, cast, joined, back)
        kept = cast if alone else joined
        if self.offloads and self.last_micro:
            self.t.touch(BUCKETS, kept, back, NORM_BYTES * -(-self.largest // self.shards))
        self.t.give(TEMPORARIES, self.large)
        self.large = self.largest = self.tensors = self.padded = self.padding = 0

    def _tail(self) -> None:
        self._enter(self.plan.embeddings_back[0])
        super()._tail()

    def _embedding_gradient(self, name: str, elements: int) -> None:
        super()._embedding_gradient(name, elements)
        if name != TOKENS:  # the token embedding is gathered next
            self._enter(self.plan.embeddings_back[1])

    def after_backward(self) -> None:
        """Reduce the gradients left in the bucket, and free the gathered embeddings; second copies stay."""
        self._reduce()
        self._gathered(self.plan.copies)

    def _optimizer_step(self) -> None:
        """Simulate the gradient norm, fp16's overflow check, and the update with a flat copy of a group's gradients.

        During the update the tensors that are kept whole between steps are freed. Second copies are freed after it.
        """
        self.t.hold(GATHERED, self.copies_of_whole)
        if not self.offloads:
            self._update()
        self._gathered(0)

    def _update(self) -> None:
        self.t.drop(WEIGHTS, self.kept_whole)
        total = sum(self.parts)
        if self.run.train.precision == "fp16":
            self.t.touch(TEMPORARIES, 4 * total, total)
        largest = part_of_tensor((self.parameters.largest,), self.shards)
        self.t.touch(TEMPORARIES, NORM_BYTES * largest)
        self.t.take(TEMPORARIES, 4 * max(self.parts))
        self._step_in_groups()
        self.t.give(TEMPORARIES, 4 * max(self.parts))
        self.t.hold(WEIGHTS, self.kept_whole)
