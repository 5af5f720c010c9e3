"""The live bytes of one transformer block, operation by operation: what ``scalegpt.model.gpt.Block`` allocates and keeps.

Symbols: B micro batch, T block size, n = B·T, H width, a heads; c bytes of the compute dtype, r of the residual stream.
What autograd keeps of a block, without dropout and with flash attention, is (2r + 14c)·n·H + 4·a·n + 16·n bytes: two
inputs of norms (r each), two outputs of norms, QKV (3c), attention's output, the wide layer before and after GELU (4c
each), attention's log-sum-exp and the norms' statistics in fp32. Weights that are fp32 are cast where they are used, and
the copies kept: c·(12·H² + 2·H), the matrices and the norms' weights (with biases 4·H; none where what comes in is fp32).
Other attention kernels keep other tensors: :mod:`scalegpt.planner.attention_ledger`.
"""

from collections.abc import Callable

from scalegpt.config import RunConfig
from scalegpt.planner.attention_ledger import attention_ledger
from scalegpt.planner.sizes import ACTIVATIONS, COPIES, TEMPORARIES, Sizes
from scalegpt.planner.timeline import Timeline, rounded


class BlockLedger:
    """One block, forward and backward, on a timeline.

    Attributes:
        attention: the ledger of attention, which the kernel decides on.

    Args:
        run: a run whose precision and micro batch are fixed.
        kernel: of attention, by the name that :func:`~scalegpt.planner.attention.attention_kernel` gives it.
        timeline: where it is played.
        sizes: the run's.
        fp32_weights: whether weights are fp32 and cast where they are used, as under ``plain``; else they come in the
            compute dtype.
        accumulate: called with a parameter's elements when its gradient has been made, in the compute dtype and counted as
            temporary; it must account for where the gradient goes.
    """

    def __init__(
        self,
        run: RunConfig,
        kernel: str,
        timeline: Timeline,
        sizes: Sizes,
        *,
        fp32_weights: bool,
        accumulate: Callable[[int], None],
    ) -> None:
        self.t, self.s, self.accumulate = timeline, sizes, accumulate
        s = sizes
        self.attention = attention_ledger(kernel, timeline, s)
        self.recompute = run.train.recompute
        self.mask = s.n * s.hidden if s.dropout else 0  # a byte for each element, kept for the backward pass
        self.copies = fp32_weights and s.compute != 4
        self.mixed = s.residual != s.compute  # norms then give fp32, which is cast to the compute dtype
        self.statistics = 2 * rounded(4 * s.n)
        # A norm casts its weights to the dtype of what comes in, and autograd keeps the copies.
        cast = s.residual != (4 if fp32_weights else s.compute)
        self.norm_copies = (s.residual * s.hidden,) * (2 if s.bias else 1) if cast else ()
        square = s.hidden**2
        self.qkv, self.proj, self.fc, self.out = 3 * square, square, 4 * square, 4 * square
        self.one, self.four, self.stream = s.stream(), s.stream(4), s.residual_stream

    # --- forward -----------------------------------------------------------------------------------------------------

    def forward(self) -> None:
        """Play the forward pass; afterwards live what the backward needs and the new residual stream."""
        if self.recompute == "none":
            self._body(ACTIVATIONS)
            self._sum(ACTIVATIONS)
        elif self.recompute == "selective":
            self._keep_dear_results()
        else:
            self._keep_nothing()

    def _body(self, kind: str) -> None:
        """All but the last matmul, with everything that autograd saves kept."""
        t = self.t
        self._norm(kind)
        self._cast(self.qkv)
        self.attention.forward(kind)
        self._cast(self.proj)
        self._sum(kind, lambda: self.attention.leave(kind))
        self._norm(kind)
        self._cast(self.fc)
        t.take(kind, self.four)
        t.take(kind, self.four)
        self._cast(self.out)

    def _keep_dear_results(self) -> None:
        """A pass that keeps QKV, attention unless it has dropout, its projection and the wide layer."""
        t, dropped = self.t, (self.one,) if self.mask else ()
        t.take(TEMPORARIES, self.one)  # the norm's output
        t.take(ACTIVATIONS, self.attention.qkv)
        t.touch(TEMPORARIES, *self.attention.moment)
        t.take(ACTIVATIONS, *self.attention.kept, self.one)
        t.give(TEMPORARIES, self.one)
        t.take(TEMPORARIES, self.stream, self.one)  # the sum, and its norm
        t.take(ACTIVATIONS, self.four)
        t.touch(TEMPORARIES, self.four, self._copy(self.out), self.one)
        t.give(TEMPORARIES, self.one)
        t.take(ACTIVATIONS, *dropped)  # with dropout the last matmul's result is kept, and not computed again
        t.take(ACTIVATIONS, self.stream)
        t.give(TEMPORARIES, self.stream)

    def _keep_nothing(self) -> None:
        """A pass whose fullest moment is attention's, GELU's or the last matmul's, each with a norm's output beside it."""
        t = self.t
        t.touch(TEMPORARIES, self.one, self.attention.qkv, *self.attention.moment)
        t.touch(TEMPORARIES, self.stream, self.one, self.four, self.four)
        t.touch(TEMPORARIES, self.stream, self.one, self.four, self._copy(self.out), self.one)
        t.take(ACTIVATIONS, self.stream)

    def _norm(self, kind: str) -> None:
        t = self.t
        t.take(COPIES, *self.norm_copies)
        t.hold(kind, self.statistics)
        if self.mixed:
            t.take(TEMPORARIES, self.stream)
        t.take(kind, self.one)
        if self.mixed:
            t.give(TEMPORARIES, self.stream)

    def _sum(self, kind: str, leave: Callable[[], None] | None = None) -> None:
        """A branch's result, dropped out, and its sum with the residual stream, of which the sum and the mask stay.

        ``leave`` is called when the result is there.
        """
        t = self.t
        t.take(TEMPORARIES, self.one)
        if leave is not None:
            leave()
        if self.mask:
            t.take(TEMPORARIES, self.one)
            t.take(kind, self.mask)
            t.give(TEMPORARIES, self.one)
        t.take(kind, self.stream)
        t.give(TEMPORARIES, self.one)

    def _copy(self, numel: int) -> int:
        """Bytes of a weight's copy in the compute dtype."""
        return self.s.compute * numel if self.copies else 0

    def _cast(self, numel: int) -> None:
        if self.copies:
            self.t.take(COPIES, self.s.compute * numel)

    def _uncast(self, numel: int) -> None:
        if self.copies:
            self.t.give(COPIES, self.s.compute * numel)

    # --- backward ----------------------------------------------------------------------------------------------------

    def backward(self) -> None:
        """Play the backward pass; the residual stream's gradient is live before and after, counted as temporary."""
        self._receive()
        if self.recompute != "none":
            self._again()
        self._feed_forward_backward()
        self._attention_backward()

    def _again(self) -> None:
        """Compute again what was not kept."""
        t = self.t
        if self.recompute == "full":
            self._body(ACTIVATIONS)
            if self.mask:
                self._last_mask()
            return
        self._norm(ACTIVATIONS)
        self._cast(self.qkv)
        self.attention.again()
        self._cast(self.proj)
        self.attention.leave(ACTIVATIONS)
        if self.mask:
            t.take(TEMPORARIES, self.one)
            t.take(ACTIVATIONS, self.mask)
        t.take(ACTIVATIONS, self.stream)
        if self.mask:
            t.give(TEMPORARIES, self.one)
        t.give(ACTIVATIONS, self.one)  # the projection's result, which was kept for this sum
        self._norm(ACTIVATIONS)
        self._cast(self.fc)
        t.take(ACTIVATIONS, self.four)
        self._cast(self.out)
        if self.mask:
            t.take(TEMPORARIES, self.one)
            t.take(ACTIVATIONS, self.mask)
            t.give(TEMPORARIES, self.one)
            t.give(ACTIVATIONS, self.one)  # the last matmul's result

    def _last_mask(self) -> None:
        """The last matmul and its dropout, computed again for the mask alone."""
        t = self.t
        t.take(TEMPORARIES, self.one, self.one)
        t.take(ACTIVATIONS, self.mask)
        t.give(TEMPORARIES, self.one, self.one)

    def _feed_forward_backward(self) -> None:
        t = self.t
        self._matmul_backward(self.out, incoming=0, outgoing=self.four, saved=self.four)
        t.take(TEMPORARIES, self.four)
        t.give(ACTIVATIONS, self.four)
        t.give(TEMPORARIES, self.four)
        self._matmul_backward(self.fc, incoming=self.four, outgoing=self.one, saved=self.one)
        self._norm_backward()

    def _attention_backward(self) -> None:
        attention = self.attention
        self._receive()
        self._matmul_backward(self.proj, incoming=0, outgoing=self.one, saved=attention.saved_input)
        attention.backward()
        self._matmul_backward(self.qkv, incoming=attention.qkv, outgoing=self.one, saved=self.one)
        self._norm_backward()

    def _receive(self) -> None:
        """The stream's gradient, cast to the compute dtype for a branch."""
        if self.mixed:
            self.t.take(TEMPORARIES, self.one)

    def _matmul_backward(self, numel: int, *, incoming: int, outgoing: int, saved: int) -> None:
        """Both gradients of a linear layer; ``incoming`` 0 is the residual stream's gradient, which stays."""
        t = self.t
        cast = self.one if self.mixed and not incoming else 0
        if self.mask and not incoming:  # the gradient behind the dropout
            t.take(TEMPORARIES, self.one)
            t.give(TEMPORARIES, cast)
            t.give(ACTIVATIONS, self.mask)
            cast = self.one
        t.take(TEMPORARIES, self.s.compute * numel)
        t.take(TEMPORARIES, outgoing)
        t.give(ACTIVATIONS, saved)
        self._uncast(numel)
        t.give(TEMPORARIES, incoming, cast)
        self.accumulate(numel)

    def _norm_backward(self) -> None:
        t = self.t
        if self.mixed:
            t.take(TEMPORARIES, self.stream)
            t.give(TEMPORARIES, self.one)
        arriving = self.stream if self.mixed else self.one
        t.take(TEMPORARIES, self.stream)
        t.give(TEMPORARIES, arriving)
        t.give(ACTIVATIONS, self.stream)
        t.drop(ACTIVATIONS, self.statistics)
        t.give(COPIES, *self.norm_copies)
        t.give(TEMPORARIES, self.stream)  # autograd adds the branch's gradient to the stream's in place
