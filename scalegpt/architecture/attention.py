"""Attention between its projections, kernel by kernel: from queries, keys and values to the projection's input.

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

from dataclasses import dataclass

from scalegpt.architecture import kernels
from scalegpt.architecture.kernels import Heads
from scalegpt.architecture.layers import FP32
from scalegpt.architecture.operations import ATTENTION, PASSED_ON, Cost, Gradient, Operation, Recorder, Size, Value

_RANDOM_STATE = Size(fixed=1)
"""The fused kernels return the state of the random numbers, two tensors of a few bytes, and keep it also without dropout."""


@dataclass(frozen=True)
class AttentionShape:
    """The sizes of one block's attention.

    Attributes:
        tokens: T, of one sequence.
        heads: a.
        width: D, of a head.
        element: bytes of the compute dtype.
        dropout: whether there is any.
        one_sequence: whether the micro batch is 1.
    """

    tokens: int
    heads: int
    width: int
    element: int
    dropout: bool
    one_sequence: bool

    def of(self, batch: int, width: int) -> Heads:
        """Queries, keys or values of a micro batch, padded to a width."""
        return Heads(batch, self.heads, self.tokens, width, self.element)

    @property
    def numel(self) -> int:
        """a·T·D, of one sequence."""
        return self.heads * self.tokens * self.width

    @property
    def pairs(self) -> int:
        """a·T², of one sequence."""
        return self.heads * self.tokens**2

    @property
    def result(self) -> Size:
        """Bytes of the output in the compute dtype."""
        return Size(self.element * self.numel)


def record_heads(r: Recorder, kernel: str, shape: AttentionShape, qkv: Value) -> list[Value]:
    """Cut QKV into views of queries, keys and values [B, a, T, D]; their gradients are joined in one copy.

    The fused kernels return gradients laid out as [B, T, a, D]. Others are laid out anew, each by a copy.
    """
    element = shape.element
    whole, parts = Size(3 * element * shape.numel), [Value(Size(), base=qkv) for _ in range(3)]
    moved = 6.0 * element * shape.numel
    r.run(
        Operation(
            name="split",
            inputs=(qkv,),
            gradients=(Gradient(whole),),
            results=tuple(parts),
            backward=Cost(moved=moved, fused=moved, kernels=1, fused_kernels=1),
        )
    )
    laid_out = shape.heads > 1 and (kernel == "math" or _padded_width(kernel, shape) != shape.width)
    gradient = Gradient(shape.result) if laid_out else PASSED_ON
    heads = []
    for part in parts:
        view = Value(Size(), base=qkv)
        heads.append(r.hold(r.run(Operation(name="heads", inputs=(part,), gradients=(gradient,), results=(view,)))))
    r.release(parts[0])
    return heads


def _padded_width(kernel: str, shape: AttentionShape) -> int:
    return kernels.multiple(shape.width, kernels.FLASH_ALIGNED) if kernel == "flash" else shape.width


def record_attention(r: Recorder, kernel: str, shape: AttentionShape, q: Value, k: Value, v: Value) -> Value:
    """Record ``scaled_dot_product_attention`` and the reshape behind it; returns the projection's input [B, T, a·D].

    Args:
        r: inside a scope, which holds the output.
        kernel: ``flash``, ``cudnn``, ``mem_efficient`` or ``math``.
        shape: the sizes.
        q: queries, a view [B, a, T, D].
        k: keys.
        v: values.
    """
    if kernel == "math":
        return _record_math(r, shape, q, k, v)
    width = _padded_width(kernel, shape)
    if width == shape.width:
        return r.hold(_record_fused(r, kernel, shape, width, q, k, v))
    return _record_padded(r, kernel, shape, width, q, k, v)


def _record_fused(r: Recorder, kernel: str, shape: AttentionShape, width: int, q: Value, k: Value, v: Value) -> Value:
    """One kernel. FLOPs of causal attention: 2 matmuls forward, 5 backward (FlashAttention-2, arXiv 2307.08691, 3.1)."""
    each = Size(shape.element * shape.heads * shape.tokens * width)
    rows = kernels.multiple(shape.tokens, kernels.EFFICIENT_ROWS) if kernel == "mem_efficient" else shape.tokens
    output, lse = Value(each), Value(Size(4 * shape.heads * rows))
    states = Value(_RANDOM_STATE), Value(_RANDOM_STATE)
    pairs, moved = float(shape.pairs * shape.width), 4.0 * shape.element * shape.numel
    return r.run(
        Operation(
            name=f"attention, {kernel}",
            part=ATTENTION,
            inputs=(q, k, v),
            gradients=(Gradient(each),) * 3,
            results=(output, lse, *states),
            saves=(q, k, v, output, lse, *states),
            is_dear=not shape.dropout,
            workspace=lambda batch: [*kernels.sizes(kernels.attention_forward(kernel, shape.of(batch, width)))],
            workspace_back=lambda batch: [*kernels.sizes(kernels.attention_backward(kernel, shape.of(batch, width)))],
            forward=Cost(attention=2 * pairs, moved=moved, fused=moved, kernels=2, fused_kernels=2),
            backward=Cost(attention=5 * pairs, moved=2 * moved, fused=2 * moved, kernels=5, fused_kernels=5),
        )
    )


def _record_padded(r: Recorder, kernel: str, shape: AttentionShape, width: int, q: Value, k: Value, v: Value) -> Value:
    """Flash on padded heads, whose output is cut; several heads are then laid out anew."""
    each = Size(shape.element * shape.heads * shape.tokens * width)
    with r.scope():
        padded = [
            r.hold(
                r.run(
                    Operation(name="pad", inputs=(part,), gradients=(Gradient(shape.result),), results=(Value(each),))
                )
            )
            for part in (q, k, v)
        ]
        output = _record_fused(r, kernel, shape, width, *padded)
    cut = Value(Size(), base=output)
    r.run(Operation(name="cut", inputs=(output,), gradients=(Gradient(each),), results=(cut,)), passing=(output,))
    r.hold(cut)
    return cut if shape.heads == 1 else _record_layout(r, shape, cut)


def _record_layout(r: Recorder, shape: AttentionShape, heads: Value) -> Value:
    """[B, a, T, D] → [B, T, a·D], by a copy."""
    flat = Value(shape.result)
    return r.hold(r.run(Operation(name="lay out heads", inputs=(heads,), gradients=(PASSED_ON,), results=(flat,))))


def _record_math(r: Recorder, shape: AttentionShape, q: Value, k: Value, v: Value) -> Value:
    """Attention out of single operators, in fp32."""
    full = Size(4 * shape.numel)
    half, joined = shape.element != 4, shape.one_sequence or shape.heads == 1
    with r.scope():
        if half:
            q, k, v = (r.hold(_new(r, "cast", part, full, shape.result)) for part in (q, k, v))
        q = r.hold(_new(r, "scale", q, full, full))
        r.hold(_record_mask(r, shape))
        k = _new(r, "scale", k, full, full)
        scores = _record_scores(r, shape, q, k, joined=joined)
        weights = r.hold(_record_softmax(r, shape, scores))
        if half:
            cast = Value(Size(2 * shape.pairs))
            r.hold(r.run(Operation(name="cast weights", inputs=(), gradients=(), results=(cast,))))
        output = _record_product(r, shape, weights, v, joined=joined)
        if half:
            output = _new(r, "cast", output, shape.result, full, passing=True)
    r.hold(output)
    return output if shape.heads == 1 else _record_layout(r, shape, output)


def _new(r: Recorder, name: str, value: Value, size: Size, gradient: Size, *, passing: bool = False) -> Value:
    """An elementwise operation that saves nothing."""
    made = Operation(name=name, inputs=(value,), gradients=(Gradient(gradient),), results=(Value(size),))
    return r.run(made, passing=(value,) if passing else ())


def _record_mask(r: Recorder, shape: AttentionShape) -> Value:
    """The causal mask in fp32, made from one of bytes."""
    pairs = shape.tokens**2
    mask = Value(Size(fixed=4 * pairs))
    return r.run(Operation(name="mask", inputs=(), gradients=(), results=(mask,), workspace=lambda _batch: [pairs]))


def _record_scores(r: Recorder, shape: AttentionShape, q: Value, k: Value, *, joined: bool) -> Value:
    """Q·Kᵀ, on copies that join batch and heads."""
    full, scale_k = Size(4 * shape.numel), k
    copies = []
    if not joined:
        q, k = (
            r.run(Operation(name="join", inputs=(x,), gradients=(PASSED_ON,), results=(Value(full),))) for x in (q, k)
        )
        copies = [q, k]
    flops = 2.0 * shape.pairs * shape.width
    scores = r.run(
        Operation(
            name="scores",
            part=ATTENTION,
            inputs=(q, k),
            gradients=(Gradient(full), Gradient(full)),
            results=(Value(Size(4 * shape.pairs)),),
            saves=(q, k),
            forward=Cost(flops=flops),
            backward=Cost(flops=2 * flops),
        ),
        passing=copies,
    )
    r.release(scale_k)
    return scores


def _record_softmax(r: Recorder, shape: AttentionShape, scores: Value) -> Value:
    """Softmax of the masked scores, and dropout."""
    size, rows = Size(4 * shape.pairs), shape.heads * shape.tokens
    probabilities = Value(size)
    r.run(
        Operation(
            name="softmax",
            inputs=(scores,),
            gradients=(Gradient(size),),
            results=(probabilities,),
            saves=(probabilities,),
            workspace=lambda batch: [batch * shape.pairs, batch * rows],
        ),
        passing=(scores,),
    )
    if not shape.dropout:
        return probabilities
    mask = Value(Size(shape.pairs))
    return r.run(
        Operation(
            name="dropout",
            inputs=(probabilities,),
            gradients=(Gradient(size),),
            results=(Value(size), mask),
            saves=(mask,),
        ),
        passing=(probabilities,),
    )


def _record_product(r: Recorder, shape: AttentionShape, weights: Value, v: Value, *, joined: bool) -> Value:
    """The weighted sum of the values, which also counts what the whole of attention moves.

    Bytes a pair of tokens, in fp32: the scores are written (4), masked (8), turned into their softmax (8), in which masked
    rows are looked for (5 and 1) and cleared (8); dropout (9); a cast that nothing reads (4 + c, none in fp32); read (4).
    Backward: the softmax is read (4), its gradient written (4), dropout (9), the scores' gradient (12) read twice (8).
    """
    full, scores = Size(4 * shape.numel), Size(4 * shape.pairs)
    copies = []
    if not joined:
        v = r.run(Operation(name="join", inputs=(v,), gradients=(PASSED_ON,), results=(Value(full),)))
        copies = [v]
    flops = 2.0 * shape.pairs * shape.width
    dropout = 9 if shape.dropout else 0
    cast = FP32 + shape.element if shape.element != FP32 else 0
    inputs = 4.0 * shape.element * shape.numel
    moved, back = inputs + (38 + cast + dropout) * shape.pairs, 2 * inputs + (28 + dropout) * shape.pairs
    output = r.run(
        Operation(
            name="weighted sum",
            part=ATTENTION,
            inputs=(v, weights),
            gradients=(Gradient(full), Gradient(scores)),
            results=(Value(full),),
            saves=(v, weights),
            forward=Cost(flops=flops, moved=moved, fused=moved, kernels=18, fused_kernels=2),
            backward=Cost(flops=2 * flops, moved=back, fused=back, kernels=15, fused_kernels=5),
        ),
        passing=copies,
    )
    if joined:
        return output
    heads = Value(Size(), base=output)
    return r.run(
        Operation(name="part heads", inputs=(output,), gradients=(Gradient(full),), results=(heads,)), passing=(output,)
    )
