"""ZeRO-3's part of the ledger: every tensor cut over the ranks, and gathered where it is needed.

Beyond what :mod:`scalegpt.planner.memory.deepspeed.gather` says, from deepspeed 0.19's ``stage3.py``:

- Between steps live the parts of weights, masters, moments and gradients, the bucket, and whole tensors of at most
  ``stage3_param_persistence_threshold`` elements.
- A block's gradients wait until its backward pass is over (blocks are leaf modules), pass through the bucket in the dtype of
  communication, and are joined in a copy of it to be reduced and cut.
- The optimizer steps through the groups, each with a flat copy of its gradients.
"""

from collections.abc import Callable, Iterable, Sequence

from scalegpt.architecture.parameters import Shape
from scalegpt.config import RunConfig
from scalegpt.config.backends import Mesh
from scalegpt.planner.memory.deepspeed.gather import Schedule, Visit, gathering, schedule
from scalegpt.planner.memory.deepspeed.sharded import (
    BUCKETS,
    NORM_BYTES,
    Group,
    Settings,
    ShardedStep,
    offloaded,
    padded,
    padded_elements,
    pinned,
)
from scalegpt.planner.memory.sizes import GRADIENTS, TEMPORARIES, WEIGHTS, host_size
from scalegpt.planner.memory.tensors import numel
from scalegpt.planner.memory.timeline import rounded

GATHERED = "gathered weights"


class Stage3(ShardedStep):
    """One optimizer step of stage 3."""

    pins_masters = False

    def __init__(self, run: RunConfig, mesh: Mesh, grad_accum: int, settings: Settings) -> None:
        super().__init__(run, mesh, grad_accum, settings)
        self.micro_steps = min(grad_accum, 2)  # gradients have their place from the start; the last step holds most
        self.on_host = offloaded(self.zero, "param")
        threshold = int(self.zero["stage3_param_persistence_threshold"])
        whole = [padded(shape, mesh.shards) for shape in self.shapes.values() if numel(shape) <= threshold]
        apart = mesh.shards > 1 or offloaded(self.zero, "param")  # else they look into the part, which is the whole
        self.kept_whole = sum(rounded(self.width * mesh.shards * part) for part in whole) if apart else 0
        self.parts = [part for group in self.groups for part in self._sub_groups(group)]
        self.gathering = gathering(run, mesh.shards, settings)
        self.plan: Schedule = schedule(self.gathering)
        self.large = 0  # bytes of the gradient that is too large for the bucket
        self.in_block: list[int] | None = None

    def part(self, group: Group) -> int:
        """See :meth:`ShardedStep.part`; each tensor is cut by itself."""
        return padded_elements(group, self.shards)

    def _sub_groups(self, group: Group) -> list[int]:
        """Elements of the parts that the optimizer steps through one after another."""
        limit = int(self.zero["sub_group_size"])
        if self.part(group) <= limit:
            return [self.part(group)]
        parts, size = [], 0
        for shape in group:
            size += padded(shape, self.shards)
            if size >= limit:
                parts.append(size)
                size = 0
        return [*parts, size] if size else parts

    # --- what lives between steps ------------------------------------------------------------------------------------

    def hold_states(self) -> None:
        """Hold all parts, the bucket, and the tensors that stay whole."""
        total = sum(self.parts)
        super().hold_states()
        self.t.hold(WEIGHTS, self.kept_whole)
        self.t.take(BUCKETS, self.sent * self.bucket)
        if self.offloads:
            self.host += host_size(self.accumulated * total, pin=self.pins)
            self.host += sum(host_size(4 * part, pin=self.pins) for part in self.parts)  # and the fp32 one for the step
        else:
            self.t.take(GRADIENTS, self.accumulated * total)

    def hold_weights(self) -> None:
        """Hold the parts in one buffer, or a buffer for each group in host memory."""
        if self.on_host:
            pin = pinned(self.zero, "param")
            self.host += sum(host_size(self.width * self.part(group), pin=pin) for group in self.groups)
        else:
            self.t.take(WEIGHTS, self.width * sum(self.parts))

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

    def before_forward(self) -> None:
        """The model's own: the head."""
        self._enter(self.plan.start)

    def _embed(self) -> None:
        for visit in self.plan.embeddings:
            self._enter(visit)
        super()._embed()
        self._gathered(self.plan.embeddings[1].after)

    def _final_norm(self) -> None:
        self._enter(self.plan.norm)
        super()._final_norm()
        self._gathered(self.plan.norm.after)

    def _loss(self) -> None:
        super()._loss()
        self._gathered(self.plan.end)

    def _loss_backward(self) -> None:
        self._enter(self.plan.back)
        self._enter(self.plan.norm_back)
        super()._loss_backward()
        self._gathered(self.plan.norm_back.after)

    def _blocks(self, play: Callable[[], None]) -> None:
        """Play each block with what is gathered around it; those in the middle that stand out."""
        forward = play == self.block_forward
        visits = self.plan.blocks if forward else self.plan.blocks_back[::-1]
        number, count = 0, len(visits)
        while number < count:
            before, state = self._others(), self.filled
            self._play(visits[number], play)
            number += 1
            if state == self.filled and number < count - 1:
                self._play_middle(visits, number, before, play)
                number = count - 1
        self._gathered(visits[-1].after)

    def _play_middle(
        self, visits: Sequence[Visit], number: int, before: dict[str, int], play: Callable[[], None]
    ) -> None:
        """From here on only gathered weights differ: play the blocks in which most lives, and leave the last one."""
        after = self._others()
        change = {kind: size - before.get(kind, 0) for kind, size in after.items()}
        grows, middle = sum(change.values()), range(number, len(visits) - 1)
        fullest = max(middle, key=lambda i: (i - number) * grows + visits[i].during)
        widest = max(middle, key=lambda i: (i - number) * grows + visits[i].fetching)
        for i in {fullest, widest}:
            self._jump(after, change, i - number, visits[i - 1].after)
            self._play(visits[i], play)
        self._jump(after, change, len(visits) - 1 - number, visits[-2].after)

    def _play(self, visit: Visit, play: Callable[[], None]) -> None:
        self._enter(visit)
        play()
        self._gathered(visit.after)

    def _others(self) -> dict[str, int]:
        """What lives besides gathered weights."""
        return {kind: size for kind, size in self.t.live.items() if kind != GATHERED}

    def _jump(self, start: dict[str, int], change: dict[str, int], times: int, gathered: int) -> None:
        """Set what lives to the state after so many more blocks."""
        self.t.become({kind: size + times * change[kind] for kind, size in start.items()} | {GATHERED: gathered})

    # --- gradients ---------------------------------------------------------------------------------------------------

    def block_backward(self) -> None:
        """A block's gradients are reduced when all of them are there, matrices first."""
        self.last_norm()
        self.in_block = []
        self.alike("backward", self.play_backward)
        self.in_block = None
        for shape in sorted(self.block_shapes, key=lambda shape: len(shape) == 1):
            self.arrive(numel(shape), self.width if len(shape) > 1 else 0)

    def arrive(self, elements: int, width: int) -> None:
        """Into the bucket, or waiting beside it."""
        if self.in_block is not None:
            self.in_block.append(elements)
            return
        if self.filled and self.filled + elements > self.bucket:
            self._reduce()
        if self.filled + elements <= self.bucket:
            self.t.give(TEMPORARIES, width * elements)
        else:  # it lives until it is reduced: only the position embedding's is not followed, and may be as large
            self.large = self.width * elements
            self.t.take(TEMPORARIES, self.large - width * elements)
        self.filled += elements
        self.largest = max(self.largest, elements)
        self.tensors += 1

    def _reduce(self) -> None:
        """Join, reduce and cut what is in the bucket."""
        elements, self.filled = self.filled, 0
        if not elements:
            return
        cast = self.sent * elements if self.large and self.sent != self.width else 0
        alone = self.tensors == 1 and elements % self.shards == 0
        joined = 0 if alone else self.sent * elements
        back = self.accumulated * -(-elements // self.shards) if self.offloads and self.copies_between else 0
        self.t.touch(BUCKETS, cast, joined, back)
        kept = cast if alone else joined
        if self.offloads and self.last_micro:
            self.t.touch(BUCKETS, kept, back, NORM_BYTES * -(-self.largest // self.shards))
        self.t.give(TEMPORARIES, self.large)
        self.large = self.largest = self.tensors = 0

    def _tail(self) -> None:
        self._enter(self.plan.embeddings_back[0])
        super()._tail()

    def small_gradients(self, shapes: Iterable[Shape]) -> None:
        """See :meth:`ShardedStep.small_gradients`; the position embedding's comes before the token embedding is gathered."""
        super().small_gradients(shapes)
        if self.in_tail:
            self._enter(self.plan.embeddings_back[1])

    def after_backward(self) -> None:
        """Reduce the rest and let go of the embeddings."""
        self._reduce()
        self._gathered(0)

    def _optimizer_step(self) -> None:
        """The norm, the overflow check of fp16, and a flat copy of a group's gradients; meanwhile nothing is kept whole."""
        if self.offloads:
            return
        self.t.drop(WEIGHTS, self.kept_whole)
        total = sum(self.parts)
        if self.run.train.precision == "fp16":
            self.t.touch(TEMPORARIES, 4 * total, total)
        largest = max(padded(shape, self.shards) for shape in self.shapes.values())
        self.t.touch(TEMPORARIES, NORM_BYTES * largest)
        self.t.take(TEMPORARIES, 4 * max(self.parts))
        self._step_in_groups()
        self.t.give(TEMPORARIES, 4 * max(self.parts))
        self.t.hold(WEIGHTS, self.kept_whole)
