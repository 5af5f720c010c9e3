"""The live bytes of attention, kernel by kernel: from queries, keys and values to the projection's input, and back.

Kept for the backward pass, with U = c·n·H the bytes of one activation and S = 4·B·a·T² those of the scores in fp32:

=============  ========================================================================================================
flash, cudnn   QKV and the output, 4U, and the rows' log-sum-exp, 4·a·n. Where heads are not a multiple of 8 wide, flash
               works on padded copies: these four are kept instead, and the projection's input besides
mem_efficient  the same, unpadded; log-sum-exp rows are rounded up to 32 in each sequence
math           Q, K and V as fp32 copies, 12·n·H, and the softmax, S; with dropout what it leaves, S, and its mask, S/4;
               the projection's input
=============  ========================================================================================================

Math follows ``attention.cpp: _scaled_dot_product_attention_math`` operator by operator. Its copies of Q, K and V are made to
join batch and heads for the matrix product, and are not needed where one of the two is 1.
"""

from abc import ABC, abstractmethod

from scalegpt.planner import kernels
from scalegpt.planner.kernels import Heads
from scalegpt.planner.sizes import ACTIVATIONS, TEMPORARIES, Sizes
from scalegpt.planner.timeline import Timeline

RANDOM_STATE = (1, 1)
"""The fused kernels return the state of the random numbers, two tensors of a few bytes, and keep it also without dropout."""


def attention_ledger(kernel: str, timeline: Timeline, sizes: Sizes) -> "AttentionLedger":
    """The ledger of the kernel that :func:`~scalegpt.planner.attention.attention_kernel` names."""
    return (MathAttention if kernel == "math" else FusedAttention)(kernel, timeline, sizes)


class AttentionLedger(ABC):
    """One block's attention on a timeline, between the matrix products around it.

    Attributes:
        moment: bytes of what lives at the fullest moment of a forward pass that keeps nothing, besides QKV.
        saved_input: bytes that the projection alone keeps of its input; 0: attention keeps it too.
        kept: bytes of what selective recompute keeps of attention, besides QKV; empty: attention is computed again.
    """

    moment: tuple[int, ...]
    saved_input: int
    kept: tuple[int, ...] = ()

    def __init__(self, kernel: str, timeline: Timeline, sizes: Sizes) -> None:
        self.kernel, self.t, self.s = kernel, timeline, sizes
        width = sizes.hidden // sizes.heads
        self.heads = Heads(sizes.batch, sizes.heads, sizes.block, width, sizes.compute)
        self.qkv, self.one = sizes.stream(3), sizes.stream()
        self.alone = sizes.heads == 1  # then [B, a, T, D] and [B, T, H] are one layout

    def forward(self, kind: str) -> None:
        """From nothing to the projection's input; what autograd saves is of that kind."""
        self.t.take(kind, self.qkv)
        self.compute(kind)

    @abstractmethod
    def compute(self, kind: str) -> None:
        """The same, with QKV there."""

    @abstractmethod
    def leave(self, kind: str) -> None:
        """The projection's result is there: free what only the code still referred to."""

    @abstractmethod
    def again(self) -> None:
        """What selective recompute computes again, with QKV and :attr:`kept` there."""

    @abstractmethod
    def backward(self) -> None:
        """From the output's gradient, a temporary, to those of Q, K and V side by side in one."""

    def _join(self, *sizes: int) -> None:
        """Free the three gradients of these sizes for one that holds them all."""
        self.t.take(TEMPORARIES, self.qkv)
        self.t.give(TEMPORARIES, *sizes)


class FusedAttention(AttentionLedger):
    """Flash, cuDNN's and the memory-efficient kernel."""

    def __init__(self, kernel: str, timeline: Timeline, sizes: Sizes) -> None:
        super().__init__(kernel, timeline, sizes)
        heads = self.heads
        if kernel == "flash":
            heads = heads._replace(width=kernels.multiple(heads.width, kernels.FLASH_ALIGNED))
        self.padded = heads.width != self.heads.width
        self.each = heads.element * heads.numel
        rows = kernels.multiple(heads.rows, kernels.EFFICIENT_ROWS) if kernel == "mem_efficient" else heads.rows
        self.lse = 4 * heads.batch * heads.number * rows
        self.saved = (self.each, self.lse, *RANDOM_STATE)
        self.in_forward = tuple(kernels.sizes(kernels.attention_forward(kernel, heads)))
        self.in_backward = tuple(kernels.sizes(kernels.attention_backward(kernel, heads)))
        self.copies = (self.each,) * 3 if self.padded else ()
        self.kept = () if sizes.dropout else self.saved
        # Cut to the heads' width, a single head is a view; several are laid out anew.
        self.saved_input = self.one if self.padded and not self.alone else 0
        self.moment = (*self.copies, *self.saved, *self.in_forward, self.saved_input)

    def compute(self, kind: str) -> None:
        """See :meth:`AttentionLedger.compute`."""
        self.t.take(kind, *self.copies, *self.saved)
        self.t.touch(TEMPORARIES, *self.in_forward)
        self.t.take(kind, self.saved_input)

    def leave(self, kind: str) -> None:
        """See :meth:`AttentionLedger.leave`; the padded copies took QKV's place."""
        if self.padded:
            self.t.give(kind, self.qkv)

    def again(self) -> None:
        """See :meth:`AttentionLedger.again`; with dropout attention itself."""
        if not self.kept:
            self.compute(ACTIVATIONS)
        else:
            self.t.take(ACTIVATIONS, *self.copies, self.saved_input)

    def backward(self) -> None:
        """See :meth:`AttentionLedger.backward`; padded gradients come in, and are cut and laid out anew going out."""
        t = self.t
        each = (self.each,) * 3
        if self.padded:
            t.take(TEMPORARIES, self.each)
            t.give(TEMPORARIES, self.one)
        t.take(TEMPORARIES, *each)
        t.touch(TEMPORARIES, *self.in_backward)
        t.give(ACTIVATIONS, *(self.copies or (self.qkv,)), *self.saved)
        t.give(TEMPORARIES, self.each)
        for size in self.copies:
            t.take(TEMPORARIES, self.one)
            t.give(TEMPORARIES, size)
        if self.padded and not self.alone:
            t.touch(TEMPORARIES, self.one)
        self._join(*(self.one,) * 3)


class MathAttention(AttentionLedger):
    """Attention out of single operators."""

    def __init__(self, kernel: str, timeline: Timeline, sizes: Sizes) -> None:
        super().__init__(kernel, timeline, sizes)
        heads = self.heads
        self.half = sizes.compute != 4  # then all is computed in fp32
        self.full = 4 * heads.numel
        self.joined = heads.batch == 1 or self.alone
        self.keeps_qkv = self.joined and not self.half  # as V
        rows = heads.batch * heads.number * heads.rows
        self.scores = 4 * rows * heads.rows
        self.masked = rows * heads.rows
        self.dropped = (self.scores, self.masked) if sizes.dropout else ()
        self.mask = heads.rows**2
        self.saved_input = self.one
        converted = (self.full,) * (4 if self.half else 1)  # Q, K, V; Q scaled
        self.moment = (*converted, 4 * self.mask, self.scores, self.scores, self.masked, rows)
        self.rows = rows

    def compute(self, kind: str) -> None:
        """See :meth:`AttentionLedger.compute`."""
        t, full = self.t, self.full
        scaled = kind if self.joined else TEMPORARIES  # what need not be copied is itself kept
        if self.half:
            t.take(TEMPORARIES, full, full)
            t.take(scaled, full)
        t.take(scaled, full)
        t.touch(TEMPORARIES, self.mask, 4 * self.mask)
        t.take(TEMPORARIES, 4 * self.mask)
        t.take(scaled, full)
        if not self.joined:
            t.take(kind, full, full)
        t.take(TEMPORARIES, self.scores)
        if not self.joined:
            t.give(TEMPORARIES, full)
        self._softmax(kind)
        if self.half:
            t.take(TEMPORARIES, self.scores // 2)
        if not self.joined:
            t.take(kind, full)
        self._output(kind)

    def _softmax(self, kind: str) -> None:
        t = self.t
        t.take(kind, self.scores)
        t.touch(TEMPORARIES, self.masked, self.rows)
        t.give(TEMPORARIES, self.scores)
        t.take(kind, *self.dropped)

    def _output(self, kind: str) -> None:
        """The product with V, in the compute dtype, and its heads side by side."""
        t, full = self.t, self.full
        t.take(TEMPORARIES, full)
        if self.half:
            t.take(TEMPORARIES, self.one)
            t.give(TEMPORARIES, full)
        t.give(TEMPORARIES, 4 * self.mask)
        if not self.joined:
            t.give(TEMPORARIES, full)
        if self.half:
            t.give(TEMPORARIES, full, full, *(() if self.joined else (full,)), self.scores // 2)
        t.take(kind, self.one)
        if self.alone:
            t.give(TEMPORARIES, self.one)

    def leave(self, kind: str) -> None:
        """See :meth:`AttentionLedger.leave`."""
        if not self.keeps_qkv:
            self.t.give(kind, self.qkv)
        if not self.alone:
            self.t.give(TEMPORARIES, self.one)

    def again(self) -> None:
        """See :meth:`AttentionLedger.again`: everything, since only matrix products of two dimensions are kept."""
        self.compute(ACTIVATIONS)

    def backward(self) -> None:
        """See :meth:`AttentionLedger.backward`."""
        t, full, scores = self.t, self.full, self.scores
        if self.half:
            t.take(TEMPORARIES, full)
            t.give(TEMPORARIES, self.one)
        if not self.joined:
            t.touch(TEMPORARIES, full)
        t.take(TEMPORARIES, full, scores)
        t.give(TEMPORARIES, full)
        t.give(ACTIVATIONS, self.qkv if self.keeps_qkv else full)
        if self.dropped:
            t.give(ACTIVATIONS, scores)
            t.touch(TEMPORARIES, scores)
            t.give(ACTIVATIONS, self.masked)
        t.touch(TEMPORARIES, scores)
        t.give(ACTIVATIONS, scores)
        t.take(TEMPORARIES, full, full)
        t.give(TEMPORARIES, scores)
        t.give(ACTIVATIONS, full, full)
        t.touch(TEMPORARIES, full)
        for _ in range(3 if self.half else 0):
            t.take(TEMPORARIES, self.one)
            t.give(TEMPORARIES, full)
        if not self.alone:
            t.touch(TEMPORARIES, self.one)
        self._join(*(self.one,) * 3)
