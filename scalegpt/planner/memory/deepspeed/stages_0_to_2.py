"""DeepSpeed's stages 0 to 2 in the memory prediction: the optimizers, and the buffers through which gradients pass.

Follows deepspeed 0.19. All sizes, dtypes and limits come from the completed configuration of
:mod:`scalegpt.planner.memory.deepspeed.settings`, which the trainer gives DeepSpeed. DeepSpeed makes one of these optimizers:

=====  ============================  ==================================================================================
stage  optimizer                     gradients
=====  ============================  ==================================================================================
0      torch's own                   fp32, whole; copied into one buffer to be reduced
0      fp16's unfused wrapper        fp16, whole; the buffer and an fp32 copy of it, and fp32 copies for the step
1      bf16's (``BF16_Optimizer``)   bf16 and fp32, both whole, and a copy of the fp32 ones to be reduced
1      ZeRO's, in all other cases   fp32, whole until they are reduced
2      ZeRO's                        a rank's part in fp32; until reduced, a bucket in the weights' dtype
3      ZeRO's, stage 3               a rank's part in fp32 and an fp32 bucket, both from the start
=====  ============================  ==================================================================================

ZeRO's optimizers treat matrices and vectors as two groups, each flattened and cut into equal parts. In each phase the
prediction is for the rank that holds the most bytes. In the blocks' backward pass this is the last rank, which owns the
gradients that are reduced first. At the end it is the first rank, which owns the token embedding's gradient.

With optimizer offload, the masters, the moments and an fp32 gradient live in host memory. At stages 1 and 2 the device
still holds a rank's part of the fp32 gradient, and a buffer for the largest tensor. Pinned host memory comes in powers
of two (torch's ``CachingHostAllocator``).
"""

from collections.abc import Iterable
from itertools import accumulate

from scalegpt.config import RunConfig
from scalegpt.config.backends import Mesh
from scalegpt.planner.memory.deepspeed.settings import Settings
from scalegpt.planner.memory.deepspeed.sharded import NORM_BYTES, ShardedStep, offloaded
from scalegpt.planner.memory.deepspeed.stage3 import Stage3
from scalegpt.planner.memory.step import Step
from scalegpt.planner.memory.tensors import numel
from scalegpt.planner.memory.timeline import BUCKETS, GRADIENTS, OPTIMIZER, TEMPORARIES, WEIGHTS, host_size, rounded

FALLBACK_BUCKET = 500_000_000
"""Elements of collected gradients after which the engine reduces them (``engine.py: MEMORY_OPT_ALLREDUCE_SIZE``)."""


def make_step(run: RunConfig, *, mesh: Mesh, grad_accum: int, kernel: str, settings: Settings) -> Step:
    """Make the simulated step of the optimizer that DeepSpeed chooses, on the rank with the largest peak.

    Args:
        run: a run whose precision and micro batch are fixed.
        mesh: how the ranks are laid out.
        grad_accum: micro batches per optimizer step.
        kernel: the attention kernel.
        settings: DeepSpeed's configuration from :func:`~scalegpt.planner.memory.deepspeed.settings.deepspeed_settings`.
    """
    zero = settings["zero_optimization"]
    fp16, offload = settings["fp16"]["enabled"], offloaded(zero, "optimizer")
    if zero["stage"] == 3:
        return Stage3(run, mesh, grad_accum, kernel, settings)
    if zero["stage"] == 0:
        return (UnfusedStep if fp16 else EngineStep)(run, mesh, grad_accum, kernel)
    in_fp32 = settings["data_types"]["grad_accum_dtype"] == "fp32"
    if zero["stage"] == 1 and settings["bf16"]["enabled"] and in_fp32 and not offload:
        return BF16Step(run, mesh, grad_accum, kernel, settings)
    return (Stage1 if zero["stage"] == 1 else Stage2)(run, mesh, grad_accum, kernel, settings)


class EngineStep(Step):
    """Stage 0 in fp32 or bf16: the step of ``plain``, with one buffer for the reduction."""

    def after_backward(self) -> None:
        """In the last micro step reduce a copy of the gradients, in one piece or in pieces of some 5e8 elements."""
        if self.last_micro:
            self.t.touch(TEMPORARIES, self.gradient_bytes * largest_pile(map(numel, self.shapes.values())))


class UnfusedStep(EngineStep):
    """Stage 0 in fp16: weights and gradients in fp16, masters beside them."""

    def hold_states(self) -> None:
        """Allocate what lives between steps: fp16 weights, and the optimizer's state, which includes fp32 masters."""
        super().hold_states()
        masters = self.over_all(self.held)
        self.t.drop(WEIGHTS, masters)
        self.t.hold(OPTIMIZER, masters)
        self.t.hold(WEIGHTS, self.over_all(lambda shape: rounded(self.compute * numel(shape))))

    def accumulate(self, elements: int) -> None:
        """Keep a new fp16 gradient as the parameter's, or add it to the existing one, without a cast to fp32."""
        if not self.has_gradients:
            self.t.take(GRADIENTS, self.compute * elements)
        self.t.give(TEMPORARIES, self.compute * elements)

    def after_backward(self) -> None:
        """In the last micro step copy fp16 gradients into a buffer, and reduce an fp32 copy of this buffer."""
        if self.last_micro:
            pile = largest_pile(map(numel, self.shapes.values()))
            self.t.touch(TEMPORARIES, self.compute * pile, 4 * pile)

    def _optimizer_step(self) -> None:
        """Simulate the update with fp32 copies of all gradients."""
        whole = self.over_all(self.held)
        self.t.hold(GRADIENTS, whole)
        super()._optimizer_step()
        self.t.drop(GRADIENTS, whole)


def largest_pile(sizes: Iterable[int]) -> int:
    """The most elements that the engine copies into one buffer.

    It adds tensors until their elements exceed :data:`FALLBACK_BUCKET`.
    """
    largest = pile = count = 0
    for size in sizes:
        pile, count = pile + size, count + 1
        if count > 1 or pile <= FALLBACK_BUCKET:  # a single tensor is not copied
            largest = max(largest, pile)
        if pile > FALLBACK_BUCKET:
            pile = count = 0
    return largest


class BF16Step(ShardedStep):
    """Stage 1 in bf16: ``BF16_Optimizer``, which keeps whole fp32 gradients on every rank and reduces them there."""

    def __init__(self, run: RunConfig, mesh: Mesh, grad_accum: int, kernel: str, settings: Settings) -> None:
        super().__init__(run, mesh, grad_accum, kernel, settings)
        self.at_once = bool(settings["bf16"].get("immediate_grad_update", False))

    def hold_states(self) -> None:
        """Allocate what lives between steps: weights, this rank's parts of the states, and whole fp32 gradients."""
        super().hold_states()
        for part in self.parts:
            self.t.take(GRADIENTS, self.accumulated * part * self.shards)

    def arrive(self, elements: int, width: int, group: int = 0) -> None:  # noqa: ARG002 - others use it
        """Add a gradient to the parameter's fp32 gradient at once, or keep it in bf16 until the backward pass ends."""
        if self.at_once:
            self.t.touch(TEMPORARIES, self.accumulated * elements)
        elif not self.has_gradients:
            self.t.take(GRADIENTS, self.compute * elements)
        self.t.give(TEMPORARIES, width * elements)

    def after_backward(self) -> None:
        """Add bf16 gradients to the fp32 ones, tensor by tensor; in the last micro step reduce a copy of the fp32 ones."""
        if not self.at_once:
            self.t.touch(TEMPORARIES, self.accumulated * self.parameters.largest)
        if self.last_micro:
            pile = largest_pile(part * self.shards for part in self.parts)
            self.t.touch(TEMPORARIES, self.accumulated * pile if len(self.parts) > 1 else 0)

    def _optimizer_step(self) -> None:
        self._step_in_groups()


class PartStep(ShardedStep):
    """The step that stages 1 and 2 of ZeRO's own optimizer share; each backward pass allocates reduce buckets."""

    def __init__(self, run: RunConfig, mesh: Mesh, grad_accum: int, kernel: str, settings: Settings) -> None:
        super().__init__(run, mesh, grad_accum, kernel, settings)
        self.compact = self.accumulated == 4 and self.compute != 4
        self.open = self.owned = 0  # bytes of the buckets and of this rank's gradients
        self.ahead = [0, 0]  # elements of matrices and of vectors whose gradients the backward pass has yet to make
        self.owners: set[int] = set()  # the ranks that own parts of the gradients in the bucket
        self.waiting = 0  # bytes of a gradient that is too large for the bucket
        self.kept = 0  # bytes of such gradients that are reduced, but live until the backward pass ends

    def hold_states(self) -> None:
        """Allocate weights and states; with offload also a buffer for the largest tensor, on host and device."""
        super().hold_states()
        if self.offloads:
            largest = self.compute * self.parameters.largest
            self.t.take(BUCKETS, largest)
            self.host += host_size(largest, pin=self.pins)
            for part in self.parts:  # the fp32 gradient, and the weights on their way back
                self.host += host_size(4 * part, pin=self.pins) + host_size(self.compute * part, pin=self.pins)

    @property
    def staged(self) -> int:
        """Bytes of an element in the bucket."""
        return self.compute

    def open_buckets(self) -> None:
        """Allocate the reduce buckets (two if communication overlaps), unless this backward pass has done so."""
        if not self.open:
            count = 2 if self.overlaps else 1
            self.open = count * rounded(self.staged * self.bucket)
            self.t.hold(BUCKETS, self.open)

    def close_buckets(self) -> None:
        """Free the buckets."""
        self.t.drop(BUCKETS, self.open)
        self.open = 0

    def before_backward(self) -> None:
        """Note that the backward pass goes through both groups from their ends to their starts."""
        self.ahead = [sum(map(numel, group)) for group in self.groups]

    def into_bucket(self, elements: int, width: int, kind: str, group: int, start: int | None = None) -> None:
        """Copy a gradient into the bucket. If it does not fit, reduce the bucket first.

        A gradient larger than the bucket stays beside it.

        Args:
            elements: number of elements of the gradient.
            width: bytes per element of the gradient before it is copied.
            kind: the kind of memory that the gradient counts as before it is copied.
            group: whether the gradient is a matrix's (0) or a vector's (1).
            start: where the gradient starts in its flattened group; by default before all gradients that the backward
                pass has made.
        """
        if self.filled + elements > self.bucket:
            self.reduce()
        if start is None:
            start = self.ahead[group] = self.ahead[group] - elements
        self.owners.update(range(start // self.parts[group], (start + elements - 1) // self.parts[group] + 1))
        if elements > self.bucket:
            self.waiting = width * elements
            self.t.give(kind, self.waiting)
            self.t.take(BUCKETS, self.waiting)
            if self.offloads:  # the gradient is cloned, so that its memory is not reused
                self.t.touch(BUCKETS, self.waiting)
        else:
            self.t.give(kind, width * elements)
        self.filled += elements
        self.largest = max(self.largest, elements)
        self.tensors += 1

    def reduce(self) -> None:
        """Reduce the gradients in the bucket, and keep this rank's part of them.

        Gradients of a single rank are reduced in the bucket itself. Gradients of several ranks are first joined in a
        copy. In a compact buffer a rank's gradients are separate, so several gradients of one rank are joined in a copy
        too (``stage_1_and_2.py: average_tensor``).
        """
        elements, self.filled = self.filled, 0
        if not elements:
            return
        if not self.owned and not (self.offloads and not self.compact):
            kept = self.parts if self.compact else [self.overlapping]
            self.owned = sum(rounded(4 * part) for part in kept)
            self.t.hold(GRADIENTS, self.owned)
        alone = len(self.owners) == 1 and (self.tensors == 1 or not self.compact)
        joined = 0 if alone else self.staged * elements
        self.t.touch(BUCKETS, joined, self.sent * elements if self.sent != self.staged else 0)
        if self.offloads and self.last_micro:
            self.t.touch(TEMPORARIES, NORM_BYTES * min(self.largest, self.parts[0]))
        self.largest = self.tensors = 0
        self.owners.clear()
        if self.compact and self.staged != 4 and not (self.offloads and self.last_micro):
            self.kept += rounded(self.waiting)
        else:
            self.t.give(BUCKETS, self.waiting)
        self.waiting = 0

    @property
    def overlapping(self) -> int:
        """Elements of all tensors of which a rank owns a part: the larger of the first and the last rank's sums."""
        first = last = 0
        for group, part in zip(self.groups, self.parts, strict=True):
            start, bound = 0, part * (self.shards - 1)
            for size in map(numel, group):
                first += size if start < part else 0
                last += size if start + size > bound else 0
                start += size
        return max(first, last)

    def _optimizer_step(self) -> None:
        """Simulate the gradient norm, by tensor, and the update, with a flat copy of gradients that are not contiguous."""
        if not self.offloads:
            self.t.touch(TEMPORARIES, NORM_BYTES * min(self.parameters.largest, self.parts[0]))
            if not self.compact:
                self.t.take(TEMPORARIES, 4 * self.parts[0])
            self._step_in_groups()


class Stage2(PartStep):
    """Stage 2: gradients pass through the bucket as they are made, in every micro step."""

    def hold_states(self) -> None:
        """Allocate weights and states; with offload in fp32 also a host buffer for the sum of the micro steps' gradients."""
        super().hold_states()
        if self.offloads and not self.compact and self.grad_accum > 1:
            self.host += host_size(self.compute * self.overlapping, pin=self.pins)

    def arrive(self, elements: int, width: int, group: int = 0) -> None:
        """Copy a gradient into the bucket."""
        self.open_buckets()
        self.into_bucket(elements, width, TEMPORARIES, group)

    def after_backward(self) -> None:
        """Reduce the gradients left in the bucket, and free the buckets."""
        self.reduce()
        self.t.drop(BUCKETS, self.kept)
        self.kept = 0
        self.close_buckets()
        if not self.compact and self.has_gradients:
            self.t.drop(GRADIENTS, self.owned)  # they have been added to the first micro step's
        if not self.compact:
            self.owned = 0


class Stage1(PartStep):
    """Stage 1 in fp16 or fp32, or with offload: whole fp32 gradients until the last micro step reduces them."""

    @property
    def staged(self) -> int:
        """Bytes of an element in the bucket."""
        return 4

    def arrive(self, elements: int, width: int, group: int = 0) -> None:
        """Add a gradient, cast to fp32, to the parameter's fp32 gradient.

        In the last micro step, if communication overlaps, put the sum into the bucket at once.
        """
        self.open_buckets()
        if width == 4:
            self.t.give(TEMPORARIES, width * elements)
        self.t.take(GRADIENTS, 4 * elements)
        if width != 4:
            self.t.give(TEMPORARIES, width * elements)
        if self.has_gradients:
            self.t.give(GRADIENTS, 4 * elements)
        if self.overlaps and self.last_micro:
            self.into_bucket(elements, 4, GRADIENTS, group)

    def after_backward(self) -> None:
        """In the last micro step reduce what is left: the bucket or, if communication does not overlap, all gradients."""
        if not self.last_micro:
            return
        if not self.overlaps:
            for number, group in enumerate(self.groups):
                for elements, end in zip(map(numel, group), accumulate(map(numel, group)), strict=True):
                    self.into_bucket(elements, 4, GRADIENTS, number, end - elements)
        self.reduce()
        if not self.compact or self.shards == 1:
            self.close_buckets()

    def _optimizer_step(self) -> None:
        """Simulate the update. Gradients that other ranks own are still live, in the bucket or, if too large, beside it."""
        fuller = self.offloads or not self.run.model.tie_head  # a rank without the token embedding is fuller
        foreign = 4 * self.head if fuller and self.shards > 1 and self.head > self.bucket else 0
        self.t.take(TEMPORARIES, foreign)
        super()._optimizer_step()
        self.t.give(TEMPORARIES, foreign)
        self.close_buckets()
