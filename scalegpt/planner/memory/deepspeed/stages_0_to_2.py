"""DeepSpeed's part of the ledger: what its optimizers hold, and the buffers that gradients pass through.

Read from deepspeed 0.19. All sizes, dtypes and limits come from the completed configuration of
:mod:`scalegpt.planner.memory.deepspeed.settings`, which is what the trainer gives DeepSpeed. Which optimizer that makes:

=====  ============================  ==================================================================================
stage  optimizer                     gradients
=====  ============================  ==================================================================================
0      torch's own                   fp32, whole; copied into one buffer to be reduced
0      fp16's unfused wrapper        fp16, whole; the buffer and an fp32 copy of it, and fp32 copies for the step
1      bf16's (``BF16_Optimizer``)   bf16 and fp32, both whole, and a copy of the fp32 ones to be reduced
1      ZeRO's, otherwise             fp32, whole until they are reduced
2      ZeRO's                        each rank its part in fp32; a bucket in the weights' dtype before
3      ZeRO's, stage 3               each rank its part in fp32, from the start; an fp32 bucket, from the start
=====  ============================  ==================================================================================

ZeRO's optimizers treat matrices and vectors as two groups, each flattened and cut into equal parts. Predicted is the
fullest rank of each phase: the last one in the blocks' backward pass, where it is the first to own what is reduced, and
the first one at the end, where the token embedding is its own.

With optimizer offload masters, moments and a gradient live in host memory; at stages 1 and 2 the device still holds the
part of the fp32 gradient and a buffer for the largest tensor. Pinned host memory comes in powers of two (torch's
``CachingHostAllocator``).
"""

from collections.abc import Iterable, Iterator

from scalegpt.config import RunConfig
from scalegpt.config.backends import Mesh
from scalegpt.planner.memory.deepspeed.sharded import BUCKETS, NORM_BYTES, Settings, ShardedStep, offloaded
from scalegpt.planner.memory.deepspeed.stage3 import Stage3
from scalegpt.planner.memory.sizes import GRADIENTS, OPTIMIZER, TEMPORARIES, WEIGHTS, host_size
from scalegpt.planner.memory.step import Step
from scalegpt.planner.memory.tensors import numel
from scalegpt.planner.memory.timeline import rounded

FALLBACK_BUCKET = 500_000_000
"""Elements after which the engine reduces what it has collected (``engine.py: MEMORY_OPT_ALLREDUCE_SIZE``)."""


def make_step(run: RunConfig, *, mesh: Mesh, grad_accum: int, settings: Settings) -> "Step":
    """The step of the fullest rank that these settings make DeepSpeed take.

    Args:
        run: a run whose precision and micro batch are fixed.
        mesh: how the ranks are laid out.
        grad_accum: micro batches per optimizer step.
        settings: DeepSpeed's configuration from :func:`~scalegpt.planner.memory.deepspeed.settings.deepspeed_settings`.
    """
    zero = settings["zero_optimization"]
    fp16, offload = settings["fp16"]["enabled"], offloaded(zero, "optimizer")
    if zero["stage"] == 3:
        return Stage3(run, mesh, grad_accum, settings)
    if zero["stage"] == 0:
        return UnfusedStep(run, mesh, grad_accum) if fp16 else EngineStep(run, mesh, grad_accum)
    in_fp32 = settings["data_types"]["grad_accum_dtype"] == "fp32"
    if zero["stage"] == 1 and settings["bf16"]["enabled"] and in_fp32 and not offload:
        return BF16Step(run, mesh, grad_accum, settings)
    return (Stage1 if zero["stage"] == 1 else Stage2)(run, mesh, grad_accum, settings)


class EngineStep(Step):
    """Stage 0 in fp32 or bf16: as ``plain``, and one buffer for the reduction."""

    def after_backward(self) -> None:
        """Reduce a copy of the gradients, in one piece or in pieces of 5e8 elements."""
        if self.last_micro:
            self.t.touch(TEMPORARIES, self.gradient_bytes * largest_pile(map(numel, self.shapes.values())))


class UnfusedStep(EngineStep):
    """Stage 0 in fp16: weights and gradients in fp16, masters beside them."""

    def hold_states(self) -> None:
        """See :meth:`Step.hold_states`."""
        super().hold_states()
        masters = sum(self.held(shape) for shape in self.shapes.values())
        self.t.drop(WEIGHTS, masters)
        self.t.hold(OPTIMIZER, masters)
        self.t.hold(WEIGHTS, sum(rounded(self.s.compute * numel(shape)) for shape in self.shapes.values()))

    def accumulate(self, elements: int) -> None:
        """See :meth:`Step.accumulate`: it becomes the parameter's, or is added to it."""
        if not self.has_gradients:
            self.t.take(GRADIENTS, self.s.compute * elements)
        self.t.give(TEMPORARIES, self.s.compute * elements)

    def settle_head(self) -> None:
        """See :meth:`Step.settle_head`."""
        if self.has_gradients:
            self.t.give(GRADIENTS, self.gradient_bytes * self.head)

    settle_embedding = settle_head

    def after_backward(self) -> None:
        """Reduce an fp32 copy of a copy."""
        if self.last_micro:
            pile = largest_pile(map(numel, self.shapes.values()))
            self.t.touch(TEMPORARIES, self.s.compute * pile, 4 * pile)

    def _optimizer_step(self) -> None:
        """Fp32 copies of all gradients."""
        whole = sum(self.held(shape) for shape in self.shapes.values())
        self.t.hold(GRADIENTS, whole)
        super()._optimizer_step()
        self.t.drop(GRADIENTS, whole)


def largest_pile(sizes: Iterable[int]) -> int:
    """Elements that the engine copies together at most: it collects tensors until they pass the limit."""
    largest = pile = count = 0
    for size in sizes:
        pile, count = pile + size, count + 1
        if count > 1 or pile <= FALLBACK_BUCKET:  # a single tensor is not copied
            largest = max(largest, pile)
        if pile > FALLBACK_BUCKET:
            pile = count = 0
    return largest


class BF16Step(ShardedStep):
    """Stage 1 in bf16: ``BF16_Optimizer``, which reduces all gradients everywhere, whole and in fp32."""

    def __init__(self, run: RunConfig, mesh: Mesh, grad_accum: int, settings: Settings) -> None:
        super().__init__(run, mesh, grad_accum, settings)
        self.at_once = bool(settings["bf16"].get("immediate_grad_update", False))

    def hold_states(self) -> None:
        """See :meth:`ShardedStep.hold_states`; the fp32 gradients are there from the start."""
        super().hold_states()
        for part in self.parts:
            self.t.take(GRADIENTS, self.accumulated * part * self.shards)

    def arrive(self, elements: int, width: int) -> None:
        """Added to the fp32 gradient at once, or kept in bf16 until the end."""
        if self.at_once:
            self.t.touch(TEMPORARIES, self.accumulated * elements)
        elif not self.has_gradients:
            self.t.take(GRADIENTS, self.width * elements)
        self.t.give(TEMPORARIES, width * elements)

    def after_backward(self) -> None:
        """Add the bf16 gradients to the fp32 ones, tensor by tensor, and reduce a copy of the groups."""
        if not self.at_once:
            self.t.touch(TEMPORARIES, self.accumulated * max(map(numel, self.shapes.values())))
        if self.last_micro:
            pile = largest_pile(part * self.shards for part in self.parts)
            self.t.touch(TEMPORARIES, self.accumulated * pile if len(self.parts) > 1 else 0)

    def _optimizer_step(self) -> None:
        self._step_in_groups()


class PartStep(ShardedStep):
    """What stages 1 and 2 of ZeRO's own optimizer share: buckets that are allocated in each backward pass."""

    def __init__(self, run: RunConfig, mesh: Mesh, grad_accum: int, settings: Settings) -> None:
        super().__init__(run, mesh, grad_accum, settings)
        self.compact = self.accumulated == 4 and self.width != 4
        self.open = self.owned = 0  # bytes of the buckets and of this rank's gradients
        self.waiting = 0  # bytes of a gradient that is too large for the bucket
        self.kept = 0  # of one that has been reduced and is not let go before the end of the backward pass

    def hold_states(self) -> None:
        """See :meth:`ShardedStep.hold_states`; with offload a buffer for the largest tensor, there and here."""
        super().hold_states()
        if self.offloads:
            largest = self.width * max(map(numel, self.shapes.values()))
            self.t.take(BUCKETS, largest)
            self.host += host_size(largest, pin=self.pins)
            for part in self.parts:  # the gradient, and the weights on their way back
                self.host += host_size(4 * part, pin=self.pins) + host_size(self.width * part, pin=self.pins)

    @property
    def staged(self) -> int:
        """Bytes of an element in the bucket."""
        return self.width

    @property
    def bucket_state(self) -> tuple[int, ...]:
        """See :attr:`ShardedStep.bucket_state`."""
        return self.filled, self.largest, self.open, self.owned, self.waiting

    def open_buckets(self) -> None:
        """Allocate the buckets, once in a backward pass."""
        if not self.open:
            count = 2 if self.overlaps else 1
            self.open = count * rounded(self.staged * self.bucket)
            self.t.hold(BUCKETS, self.open)

    def close_buckets(self) -> None:
        """Free them."""
        self.t.drop(BUCKETS, self.open)
        self.open = 0

    def into_bucket(self, elements: int, width: int, kind: str) -> None:
        """Copy a gradient into the bucket, which is reduced before if it is too full; a very large one waits by itself."""
        if self.filled + elements > self.bucket:
            self.reduce()
        if elements > self.bucket:
            self.waiting = width * elements
            if kind != BUCKETS:
                self.t.give(kind, self.waiting)
                self.t.take(BUCKETS, self.waiting)
            if self.offloads:  # it is cloned, lest its memory be used for something else
                self.t.touch(BUCKETS, self.waiting)
        else:
            self.t.give(kind, width * elements)
        self.filled += elements
        self.largest = max(self.largest, elements)
        self.tensors += 1

    def reduce(self) -> None:
        """Reduce what is in the bucket, and keep this rank's part of it."""
        elements, self.filled = self.filled, 0
        if not elements:
            return
        if not self.owned and not (self.offloads and not self.compact):
            self.owned = (
                sum(rounded(4 * part) for part in self.parts) if self.compact else rounded(4 * self.overlapping)
            )
            self.t.hold(GRADIENTS, self.owned)
        alone = self.tensors == 1 and elements <= self.parts[0]
        joined = 0 if alone else self.staged * elements
        self.t.touch(BUCKETS, joined, self.sent * elements if self.sent != self.staged else 0)
        if self.offloads and self.last_micro:
            self.t.touch(TEMPORARIES, NORM_BYTES * min(self.largest, self.parts[0]))
        self.largest = self.tensors = 0
        if self.compact and self.staged != 4 and not (self.offloads and self.last_micro):
            self.kept += rounded(self.waiting)
        else:
            self.t.give(BUCKETS, self.waiting)
        self.waiting = 0

    @property
    def overlapping(self) -> int:
        """Elements of all tensors of which the first or the last rank owns some."""
        first = last = 0
        for group, part in zip(self.groups, self.parts, strict=True):
            start, bound = 0, part * (self.shards - 1)
            for size in map(numel, group):
                first += size if start < part else 0
                last += size if start + size > bound else 0
                start += size
        return max(first, last)

    def _optimizer_step(self) -> None:
        """The norm, tensor by tensor; where gradients are not in one piece, a flat copy of a group's."""
        if not self.offloads:
            self.t.touch(TEMPORARIES, NORM_BYTES * min(max(map(numel, self.shapes.values())), self.parts[0]))
            if not self.compact:
                self.t.take(TEMPORARIES, 4 * self.parts[0])
            self._step_in_groups()


class Stage2(PartStep):
    """Stage 2: gradients pass through the bucket as they are made, in every micro step."""

    def hold_states(self) -> None:
        """See :meth:`PartStep.hold_states`; in fp32 gradients add up in host memory."""
        super().hold_states()
        if self.offloads and not self.compact and self.grad_accum > 1:
            self.host += host_size(self.width * self.overlapping, pin=self.pins)

    def arrive(self, elements: int, width: int) -> None:
        """Into the bucket."""
        self.open_buckets()
        self.into_bucket(elements, width, TEMPORARIES)

    def after_backward(self) -> None:
        """Reduce the rest."""
        self.reduce()
        self.t.drop(BUCKETS, self.kept)
        self.kept = 0
        self.close_buckets()
        if not self.compact and self.has_gradients:
            self.t.drop(GRADIENTS, self.owned)  # added to the first micro step's
        if not self.compact:
            self.owned = 0


class Stage1(PartStep):
    """Stage 1 in fp16 or fp32, or with offload: whole fp32 gradients until the last micro step reduces them."""

    @property
    def staged(self) -> int:
        """Bytes of an element in the bucket."""
        return 4

    def arrive(self, elements: int, width: int) -> None:
        """Cast to fp32 and added up; with overlapping communication reduced at once."""
        self.open_buckets()
        if width == 4:
            self.t.give(TEMPORARIES, width * elements)
        self.t.take(GRADIENTS, 4 * elements)
        if width != 4:
            self.t.give(TEMPORARIES, width * elements)
        if self.has_gradients:
            self.t.give(GRADIENTS, 4 * elements)
        if self.overlaps and self.last_micro:
            self.into_bucket(elements, 4, GRADIENTS)

    def after_backward(self) -> None:
        """Without overlapping communication, reduce everything now, in the order of the parameters."""
        if not self.last_micro:
            return
        if not self.overlaps:
            for elements in self._in_order():
                self.into_bucket(elements, 4, GRADIENTS)
        self.reduce()
        if not self.compact or self.shards == 1:
            self.close_buckets()

    def _in_order(self) -> Iterator[int]:
        for group in self.groups:
            yield from map(numel, group)

    def _optimizer_step(self) -> None:
        """The gradients of other ranks' parameters are still there: in the bucket, or a very large one by itself."""
        fuller = self.offloads or not self.run.model.tie_head  # than the rank whose the token embedding is
        foreign = 4 * self.head if fuller and self.shards > 1 and self.head > self.bucket else 0
        self.t.take(TEMPORARIES, foreign)
        super()._optimizer_step()
        self.t.give(TEMPORARIES, foreign)
        self.close_buckets()
