"""Attention between the QKV and the output projection, recorded for each attention kernel.

Symbols: B sequences and n tokens of a micro batch, T tokens of a sequence, a heads, H width, c bytes of the compute dtype.
U = c·n·H are the bytes of one activation [n, H], S = 4·B·a·T² the bytes of the fp32 scores. Autograd keeps for the backward
pass, in bytes:

=============  ========================================================================================================
flash, cudnn   QKV and the output, 4U, and the log-sum-exp of each row of scores, 4·a·n. If the width of a head is no
               multiple of 8, flash works on padded Q, K, V and output. Then autograd keeps these four padded tensors
               instead, and the output projection's input besides
mem_efficient  the tensors of flash, never padded; each sequence's T rows of log-sum-exp are rounded up to a multiple of 32
math           fp32 copies of Q, K and V, 12·n·H; the softmax, S; with dropout also its result, S, and its mask, S/4;
               the output projection's input
=============  ========================================================================================================

``math`` follows ``attention.cpp: _scaled_dot_product_attention_math`` operator by operator. It copies Q, K and V to join
batch and heads into one dimension for the batched matmul, unless the micro batch or the number of heads is 1.
"""

from dataclasses import dataclass

from scalegpt.architecture import kernels
from scalegpt.architecture.kernels import Heads
from scalegpt.architecture.layers import FP32
from scalegpt.architecture.operations import ATTENTION, PASSED_ON, Cost, Gradient, Operation, Recorder, Size, Value

_RANDOM_STATE = Size(fixed=1)
"""Size of a dropout seed or offset, a few bytes. Fused kernels return both, and autograd keeps them even without dropout."""


@dataclass(frozen=True)
class AttentionShape:
    """The sizes of one block's attention.

    Attributes:
        tokens: T, tokens of one sequence.
        heads: a, the number of heads.
        width: D, the width of a head.
        element: bytes of an element in the compute dtype.
        dropout: whether attention has dropout.
        one_sequence: whether the micro batch is a single sequence.
    """

    tokens: int
    heads: int
    width: int
    element: int
    dropout: bool
    one_sequence: bool

    def of(self, batch: int, width: int) -> Heads:
        """The shape [batch, a, T, width] of queries, keys or values whose heads are padded to ``width``."""
        return Heads(batch, self.heads, self.tokens, width, self.element)

    def bytes_of(self, width: int, element: int) -> Size:
        """Bytes of queries, keys or values [B, a, T, width], with ``element`` bytes an element."""
        return Size(element * self.heads * self.tokens * width)

    @property
    def pairs(self) -> int:
        """The number of attention scores of one sequence, a·T²."""
        return self.heads * self.tokens**2

    @property
    def result(self) -> Size:
        """Bytes of the output [B, a, T, D] in the compute dtype."""
        return self.bytes_of(self.width, self.element)


def record_heads(r: Recorder, kernel: str, shape: AttentionShape, qkv: Value) -> list[Value]:
    """Record the split of QKV [B, T, 3·H] into views of queries, keys and values [B, a, T, D].

    The backward pass joins their three gradients in one copy. It needs them laid out as [B, T, a, D]. The fused kernels
    return that layout. The gradients of the math kernel and of padded heads are each copied into it first.
    """
    whole, parts = shape.result.times(3), tuple(Value(base=qkv) for _ in range(3))
    r.run(Operation("split", (qkv,), (Gradient(whole),), parts, backward=Cost.moving(2.0 * whole.per_sequence)))
    laid_out = shape.heads > 1 and (kernel == "math" or _padded_width(kernel, shape) != shape.width)
    gradients = (Gradient(shape.result) if laid_out else PASSED_ON,)
    heads = [r.hold(r.run(Operation("heads", (part,), gradients, (Value(base=qkv),)))) for part in parts]
    r.release(parts[0])
    return heads


def _padded_width(kernel: str, shape: AttentionShape) -> int:
    return kernels.multiple(shape.width, kernels.FLASH_ALIGNED) if kernel == "flash" else shape.width


def record_attention(r: Recorder, kernel: str, shape: AttentionShape, q: Value, k: Value, v: Value) -> Value:
    """Record ``scaled_dot_product_attention`` and the reshape after it; return the output projection's input [B, T, a·D].

    Args:
        r: the recorder, inside a scope, which holds the output.
        kernel: ``flash``, ``cudnn``, ``mem_efficient`` or ``math``.
        shape: the sizes.
        q: queries, a view [B, a, T, D].
        k: keys, of the same shape.
        v: values, of the same shape.
    """
    if kernel == "math":
        return _record_math(r, shape, q, k, v)
    width = _padded_width(kernel, shape)
    if width == shape.width:
        return r.hold(_record_fused(r, kernel, shape, width, q, k, v))
    return _record_padded(r, kernel, shape, width, q, k, v)


def _record_fused(r: Recorder, kernel: str, shape: AttentionShape, width: int, q: Value, k: Value, v: Value) -> Value:
    """Record one fused kernel on heads of ``width``.

    A causal kernel computes half of the scores. So it takes half the FLOPs of 2 matmuls in the forward pass, and half the
    FLOPs of 5 in the backward pass (FlashAttention-2, arXiv 2307.08691, section 3.1).
    """
    each = shape.bytes_of(width, shape.element)
    rows = kernels.multiple(shape.tokens, kernels.EFFICIENT_ROWS) if kernel == "mem_efficient" else shape.tokens
    output, lse = Value(each), Value(Size(FP32 * shape.heads * rows))
    states = Value(_RANDOM_STATE), Value(_RANDOM_STATE)
    pairs, moved = float(shape.pairs * shape.width), 4.0 * shape.result.per_sequence
    return r.run(
        Operation(
            f"attention, {kernel}",
            (q, k, v),
            (Gradient(each),) * 3,
            (output, lse, *states),
            part=ATTENTION,
            saves=(q, k, v, output, lse, *states),
            is_expensive=not shape.dropout,
            workspace=lambda batch: [*kernels.sizes(kernels.attention_forward(kernel, shape.of(batch, width)))],
            workspace_back=lambda batch: [*kernels.sizes(kernels.attention_backward(kernel, shape.of(batch, width)))],
            forward=Cost.moving(moved, kernels=2)._replace(attention=2 * pairs),
            backward=Cost.moving(2 * moved, kernels=5)._replace(attention=5 * pairs),
        )
    )


def _record_padded(r: Recorder, kernel: str, shape: AttentionShape, width: int, q: Value, k: Value, v: Value) -> Value:
    """Record flash attention: pad heads to ``width``, attend, cut the output to D, and if a > 1 copy it to [B, T, a·D]."""
    each = shape.bytes_of(width, shape.element)
    with r.scope():
        padded = [r.hold(r.new("pad", part, each, shape.result)) for part in (q, k, v)]
        output = _record_fused(r, kernel, shape, width, *padded)
    cut = Value(base=output)
    r.hold(r.run(Operation("cut", (output,), (Gradient(each),), (cut,)), passing=(output,)))
    return cut if shape.heads == 1 else _record_layout(r, shape, cut)


def _record_layout(r: Recorder, shape: AttentionShape, heads: Value) -> Value:
    """Record a copy of heads [B, a, T, D] into [B, T, a·D]."""
    return r.hold(r.run(Operation("lay out heads", (heads,), (PASSED_ON,), (Value(shape.result),))))


def _record_math(r: Recorder, shape: AttentionShape, q: Value, k: Value, v: Value) -> Value:
    """Record the math kernel: attention as a sequence of single operators, in fp32."""
    full, pairs = shape.bytes_of(shape.width, FP32), shape.tokens**2
    with r.scope():
        if shape.element != FP32:
            q, k, v = (r.hold(r.new("cast", part, full, shape.result)) for part in (q, k, v))
        q = r.hold(r.new("scale", q, full, full))
        mask = Value(Size(fixed=FP32 * pairs))  # made from a mask of one byte an element
        r.hold(r.run(Operation("mask", (), (), (mask,), workspace=lambda _batch: [pairs])))
        k = r.new("scale", k, full, full)
        scores = _record_scores(r, shape, q, k)
        weights = r.hold(_record_softmax(r, shape, scores))
        if shape.element != FP32:
            r.hold(r.run(Operation("cast weights", (), (), (Value(Size(shape.element * shape.pairs)),))))
        output = _record_product(r, shape, weights, v)
        if shape.element != FP32:
            output = r.new("cast", output, shape.result, full, passing=True)
    r.hold(output)
    return output if shape.heads == 1 else _record_layout(r, shape, output)


def _record_joined(r: Recorder, shape: AttentionShape, *parts: Value) -> tuple[tuple[Value, ...], bool]:
    """Record copies that join batch and heads; return them and True, or ``parts`` and False if no copy is needed."""
    if shape.one_sequence or shape.heads == 1:
        return parts, False
    full = shape.bytes_of(shape.width, FP32)
    return tuple(r.run(Operation("join", (part,), (PASSED_ON,), (Value(full),))) for part in parts), True


def _record_scores(r: Recorder, shape: AttentionShape, q: Value, k: Value) -> Value:
    """Record the scores Q·Kᵀ, fp32 [B, a, T, T]."""
    full, flops = shape.bytes_of(shape.width, FP32), 2.0 * shape.pairs * shape.width
    factors, copied = _record_joined(r, shape, q, k)
    scores = r.run(
        Operation(
            "scores",
            factors,
            (Gradient(full), Gradient(full)),
            (Value(Size(FP32 * shape.pairs)),),
            part=ATTENTION,
            saves=factors,
            forward=Cost(flops=flops),
            backward=Cost(flops=2 * flops),
        ),
        passing=factors if copied else (),
    )
    r.release(k)
    return scores


def _record_softmax(r: Recorder, shape: AttentionShape, scores: Value) -> Value:
    """Record the softmax of the masked scores, then dropout; return the attention weights, fp32 [B, a, T, T]."""
    size, rows = Size(FP32 * shape.pairs), shape.heads * shape.tokens
    gradients, probabilities = (Gradient(size),), Value(size)
    softmax = Operation(
        "softmax",
        (scores,),
        gradients,
        (probabilities,),
        saves=(probabilities,),
        workspace=lambda batch: [batch * shape.pairs, batch * rows],
    )
    r.run(softmax, passing=(scores,))
    if not shape.dropout:
        return probabilities
    mask = Value(Size(shape.pairs))
    dropout = Operation("dropout", (probabilities,), gradients, (Value(size), mask), saves=(mask,))
    return r.run(dropout, passing=(probabilities,))


def _record_product(r: Recorder, shape: AttentionShape, weights: Value, v: Value) -> Value:
    """Record the weighted sum of the values. The bytes moved by all operators of the math kernel are counted here.

    Forward, bytes per score: write the scores (4), mask them (8), take the softmax (8), look for rows that are masked
    entirely (5 and 1) and clear these rows (8), dropout (9), cast the weights to a copy that nothing reads (4 + c; none in
    fp32), read the weights (4). Backward: read the softmax (4), write its gradient (4), dropout (9), make the scores'
    gradient (12) and read it twice (8).
    """
    full, scores = shape.bytes_of(shape.width, FP32), Size(FP32 * shape.pairs)
    (values,), copied = _record_joined(r, shape, v)
    flops = 2.0 * shape.pairs * shape.width
    dropout = 9 if shape.dropout else 0
    cast = FP32 + shape.element if shape.element != FP32 else 0
    inputs = 4.0 * shape.result.per_sequence
    moved, back = inputs + (38 + cast + dropout) * shape.pairs, 2 * inputs + (28 + dropout) * shape.pairs
    product = Operation(
        "weighted sum",
        (values, weights),
        (Gradient(full), Gradient(scores)),
        (Value(full),),
        part=ATTENTION,
        saves=(values, weights),
        forward=Cost(flops=flops, moved=moved, fused=moved, kernels=18, fused_kernels=2),
        backward=Cost(flops=2 * flops, moved=back, fused=back, kernels=15, fused_kernels=5),
    )
    if not copied:
        return r.run(product)
    output = r.run(product, passing=(values,))
    return r.run(Operation("part heads", (output,), (Gradient(full),), (Value(base=output),)), passing=(output,))
