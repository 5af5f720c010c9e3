"""The live bytes of one transformer block, operation by operation: what ``scalegpt.model.gpt.Block`` allocates and keeps.

Symbols: B micro batch, T block size, n = B·T, H width, a heads; c bytes of the compute dtype, r of the residual stream.
What autograd keeps of a block, without dropout and with flash attention, is (2r + 14c)·n·H + 4·a·n + 16·n bytes: two
inputs of norms (r each), two outputs of norms, QKV (3c), attention's output, the wide layer before and after GELU (4c
each), attention's log-sum-exp and the norms' statistics in fp32. Weights that are fp32 are cast where they are used, and
the copies kept: 12·c·H².
"""

from collections.abc import Callable
from dataclasses import dataclass

from scalegpt.config import RunConfig
from scalegpt.planner.timeline import Timeline, rounded

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}

ACTIVATIONS, TEMPORARIES, COPIES = "activations", "temporaries", "weight copies"

FLASH_BACKWARD_ACCUMULATOR = 4
"""Bytes per element of dQ's fp32 accumulator in flash attention's backward (FlashAttention-2, ``flash_api.cpp: mha_bwd``,
``dq_accum``). Its sequence is rounded up to 128 and its head to 32; it lives during that one call."""


@dataclass(frozen=True)
class Sizes:
    """The sizes that a step's tensors are made of.

    Attributes:
        n: tokens of a micro batch, B·T.
        compute: bytes of the compute dtype, c.
        residual: bytes of the residual stream's dtype, r.
    """

    n: int
    hidden: int
    heads: int
    block: int
    batch: int
    vocab: int
    compute: int
    residual: int
    bias: bool

    @classmethod
    def of(cls, run: RunConfig) -> "Sizes":
        """The sizes of a run whose precision, micro batch and vocabulary are fixed."""
        compute = BYTES[run.train.precision]
        return cls(
            n=run.train.micro_batch * run.model.block_size,
            hidden=run.model.n_embd,
            heads=run.model.n_head,
            block=run.model.block_size,
            batch=run.train.micro_batch,
            vocab=run.model.vocab_size,
            compute=compute,
            residual=4 if run.train.residual_dtype == "fp32" else compute,
            bias=run.model.bias,
        )

    def stream(self, width: int = 1) -> int:
        """Bytes of [n, width·H] in the compute dtype."""
        return self.compute * self.n * self.hidden * width

    @property
    def residual_stream(self) -> int:
        """Bytes of the residual stream [n, H]."""
        return self.residual * self.n * self.hidden


class BlockLedger:
    """One block, forward and backward, on a timeline.

    Args:
        run: a run whose precision and micro batch are fixed.
        timeline: where it is played.
        copies_weights: whether weights are fp32 and cast where they are used, as under ``plain``.
        accumulate: called with a parameter's elements when its gradient has been made, in the compute dtype and counted as
            temporary; it must account for where the gradient goes.
    """

    def __init__(
        self, run: RunConfig, timeline: Timeline, *, copies_weights: bool, accumulate: Callable[[int], None]
    ) -> None:
        self.t, self.s, self.accumulate = timeline, Sizes.of(run), accumulate
        s = self.s
        self.recompute = run.train.recompute
        self.mask = (
            s.n * s.hidden if run.model.dropout > 0 else 0
        )  # a byte for each element, kept for the backward pass
        self.copies = copies_weights and s.compute != 4
        self.mixed = s.residual != s.compute  # norms then give fp32, which is cast to the compute dtype
        self.statistics = 2 * rounded(4 * s.n)
        self.lse = rounded(4 * s.heads * s.n)
        square = s.hidden**2
        self.qkv, self.proj, self.fc, self.out = 3 * square, square, 4 * square, 4 * square

    # --- forward -----------------------------------------------------------------------------------------------------

    def forward(self) -> None:
        """Play the forward pass; afterwards live what the backward needs and the new residual stream."""
        t, s = self.t, self.s
        if self.recompute == "none":
            self._body(ACTIVATIONS)
            self._last_sum()
        elif self.recompute == "selective":
            self._body_once()
            t.take(ACTIVATIONS, s.stream(3), s.stream(), s.stream(), s.stream(4))
            if (
                not self.mask
            ):  # with dropout attention is computed again, and the last matmul's result kept in its place
                t.hold(ACTIVATIONS, self.lse)
            t.take(ACTIVATIONS, s.residual_stream)
        else:
            self._body_once()
            t.take(ACTIVATIONS, s.residual_stream)

    def _body(self, kind: str) -> None:
        """All but the last matmul, with everything that autograd saves kept."""
        t, s = self.t, self.s
        self._norm(kind)
        self._cast(self.qkv)
        t.take(kind, s.stream(3))
        t.take(kind, s.stream())
        t.hold(kind, self.lse)
        self._cast(self.proj)
        self._sum(kind)
        self._norm(kind)
        self._cast(self.fc)
        t.take(kind, s.stream(4))
        t.take(kind, s.stream(4))
        self._cast(self.out)

    def _body_once(self) -> None:
        """The fullest moment of a pass that keeps nothing: GELU, with its input, the norm's output and the sum before."""
        t, s = self.t, self.s
        cast = s.compute * self.fc if self.copies else 0
        t.touch(TEMPORARIES, s.residual_stream, s.stream(), s.stream(4), s.stream(4), cast)

    def _last_sum(self) -> None:
        self._sum(ACTIVATIONS)

    def _norm(self, kind: str) -> None:
        t, s = self.t, self.s
        t.hold(kind, self.statistics)
        if self.mixed:
            t.take(TEMPORARIES, s.residual_stream)
        t.take(kind, s.stream())
        if self.mixed:
            t.give(TEMPORARIES, s.residual_stream)

    def _sum(self, kind: str) -> None:
        """A branch's result, dropped out, and its sum with the residual stream, of which the sum and the mask stay."""
        t, s = self.t, self.s
        t.take(TEMPORARIES, s.stream())
        if self.mask:
            t.take(TEMPORARIES, s.stream())
            t.take(kind, self.mask)
            t.give(TEMPORARIES, s.stream())
        t.take(kind, s.residual_stream)
        t.give(TEMPORARIES, s.stream())

    def _cast(self, numel: int) -> None:
        if self.copies:
            self.t.take(COPIES, self.s.compute * numel)

    def _uncast(self, numel: int) -> None:
        if self.copies:
            self.t.give(COPIES, self.s.compute * numel)

    # --- backward ----------------------------------------------------------------------------------------------------

    def backward(self) -> None:
        """Play the backward pass; the residual stream's gradient is live before and after, counted as temporary."""
        if self.recompute != "none":
            self._again()
        self._feed_forward_backward()
        self._attention_backward()

    def _again(self) -> None:
        """Compute again what was not kept."""
        t, s = self.t, self.s
        if self.recompute == "full":
            self._body(ACTIVATIONS)
            if self.mask:
                self._last_mask()
            return
        self._norm(ACTIVATIONS)
        self._cast(self.qkv)
        if self.mask:
            t.take(ACTIVATIONS, s.stream())
            t.hold(ACTIVATIONS, self.lse)
        self._cast(self.proj)
        if self.mask:
            t.take(TEMPORARIES, s.stream())
            t.take(ACTIVATIONS, self.mask)
        t.take(ACTIVATIONS, s.residual_stream)
        if self.mask:
            t.give(TEMPORARIES, s.stream())
        t.give(ACTIVATIONS, s.stream())  # the projection's result, which was kept for this sum
        self._norm(ACTIVATIONS)
        self._cast(self.fc)
        t.take(ACTIVATIONS, s.stream(4))
        self._cast(self.out)
        if self.mask:
            t.take(TEMPORARIES, s.stream())
            t.take(ACTIVATIONS, self.mask)
            t.give(TEMPORARIES, s.stream())
            t.give(ACTIVATIONS, s.stream())  # the last matmul's result

    def _last_mask(self) -> None:
        """The last matmul and its dropout, computed again for the mask alone."""
        t, s = self.t, self.s
        t.take(TEMPORARIES, s.stream(), s.stream())
        t.take(ACTIVATIONS, self.mask)
        t.give(TEMPORARIES, s.stream(), s.stream())

    def _feed_forward_backward(self) -> None:
        t, s = self.t, self.s
        self._matmul_backward(self.out, incoming=0, outgoing=s.stream(4), saved=s.stream(4))
        t.take(TEMPORARIES, s.stream(4))
        t.give(ACTIVATIONS, s.stream(4))
        t.give(TEMPORARIES, s.stream(4))
        self._matmul_backward(self.fc, incoming=s.stream(4), outgoing=s.stream(), saved=s.stream())
        self._norm_backward()

    def _attention_backward(self) -> None:
        t, s = self.t, self.s
        self._matmul_backward(self.proj, incoming=0, outgoing=s.stream(), saved=0)
        t.take(TEMPORARIES, s.stream(), s.stream(), s.stream())
        t.touch(TEMPORARIES, *self._flash_temporaries())
        t.give(ACTIVATIONS, s.stream(3), s.stream())
        t.drop(ACTIVATIONS, self.lse)
        t.give(TEMPORARIES, s.stream())
        t.take(TEMPORARIES, s.stream(3))  # the three gradients side by side
        t.give(TEMPORARIES, s.stream(), s.stream(), s.stream())
        self._matmul_backward(self.qkv, incoming=s.stream(3), outgoing=s.stream(), saved=s.stream())
        self._norm_backward()

    def _flash_temporaries(self) -> tuple[int, ...]:
        s = self.s
        rows = -(-s.block // 128) * 128
        head = -(-s.hidden // s.heads // 32) * 32
        accumulator = FLASH_BACKWARD_ACCUMULATOR * s.batch * rows * s.heads * head
        return accumulator, 4 * s.batch * s.heads * rows  # and the rows' sums of dO·O

    def _matmul_backward(self, numel: int, *, incoming: int, outgoing: int, saved: int) -> None:
        """Both gradients of a linear layer; ``incoming`` 0 is the residual stream's gradient, which stays."""
        t, s = self.t, self.s
        cast = s.stream() if self.mixed and not incoming else 0
        t.take(TEMPORARIES, cast)
        if self.mask and not incoming:  # the gradient behind the dropout
            t.take(TEMPORARIES, s.stream())
            t.give(TEMPORARIES, cast)
            t.give(ACTIVATIONS, self.mask)
            cast = s.stream()
        t.take(TEMPORARIES, s.compute * numel)
        t.take(TEMPORARIES, outgoing)
        t.give(ACTIVATIONS, saved)
        self._uncast(numel)
        t.give(TEMPORARIES, incoming, cast)
        self.accumulate(numel)

    def _norm_backward(self) -> None:
        t, s = self.t, self.s
        if self.mixed:
            t.take(TEMPORARIES, s.residual_stream)
            t.give(TEMPORARIES, s.stream())
        arriving = s.residual_stream if self.mixed else s.stream()
        t.take(TEMPORARIES, s.residual_stream)
        t.give(TEMPORARIES, arriving)
        t.give(ACTIVATIONS, s.residual_stream)
        t.drop(ACTIVATIONS, self.statistics)
        t.give(TEMPORARIES, s.residual_stream)  # autograd adds the branch's gradient to the stream's in place
