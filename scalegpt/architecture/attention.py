"""Attention between the QKV and the output projection, recorded for each attention kernel.

Symbols: B sequences and n tokens of a micro batch, T tokens of a sequence, a heads of queries, k heads of keys and values,
D width of a head, c bytes of the compute dtype. U = c·n·a·D are the bytes of the queries and of the output, K = c·n·k·D those
of the keys and of the values, S = 4·B·a·T² the bytes of the fp32 scores. The table shows what autograd keeps for the backward
pass, in bytes:

=============  ========================================================================================================
flash, cudnn   Queries, keys, values and the output (2U + 2K), and the log-sum-exp of each row of scores (4·a·n). If the
               width of a head is not a multiple of 8, flash works on padded Q, K, V and output. Autograd then keeps these
               four padded tensors instead, and also the output projection's input.
mem_efficient  The same tensors, never padded. Each sequence's T rows of log-sum-exp are rounded up to a multiple of 32.
               If k < a, keys and values are expanded to a heads in each pass, and the copies are not kept.
math           fp32 copies of Q, K and V (12·n·a·D), for which keys and values are first expanded if k < a; the softmax
               (S); with dropout also its result (S) and its mask (S/4); the output projection's input.
=============  ========================================================================================================

``math`` follows ``attention.cpp: _scaled_dot_product_attention_math`` operator by operator. It copies Q, K and V to join
batch and heads into one dimension for the batched matmul, unless the micro batch or the number of heads is 1.
"""

from dataclasses import dataclass

from scalegpt.architecture import kernels
from scalegpt.architecture.kernels import Heads
from scalegpt.architecture.layers import FP32, Numerics
from scalegpt.architecture.operations import ATTENTION, PASSED_ON, Cost, Gradient, Operation, Recorder, Size, Value
from scalegpt.config import ModelConfig

_RANDOM_STATE = Size(fixed=1)
"""Size of a dropout seed or offset: a few bytes.

Fused kernels return both, and autograd keeps them even without dropout.
"""


@dataclass(frozen=True)
class AttentionShape:
    """The sizes of one block's attention.

    Attributes:
        tokens: T, tokens of one sequence.
        heads: a, the number of heads of queries.
        kv_heads: k, the number of heads of keys and values.
        width: D, the width of a head.
        element: bytes of an element in the compute dtype.
        dropout: whether attention has dropout.
        one_sequence: whether the micro batch is a single sequence.
        packed: whether a mask, which all blocks share, keeps attention inside documents; otherwise attention is causal.
        rotated: R, how many numbers of each head are turned by rotary positions; 0: the model has no rotary positions.
        normed: whether queries and keys pass through an RMSNorm.
    """

    tokens: int
    heads: int
    kv_heads: int
    width: int
    element: int
    dropout: bool
    one_sequence: bool
    packed: bool = False
    rotated: int = 0
    normed: bool = False

    @classmethod
    def of(cls, model: ModelConfig, tokens: int, numerics: Numerics) -> "AttentionShape":
        """The sizes of the model's attention over sequences of ``tokens`` tokens."""
        rotated = model.rotary_width if model.position == "rope" else 0
        sizes = tokens, model.n_head, model.kv_heads, model.head_width
        places = numerics.one_sequence, numerics.packed, rotated, model.qk_norm
        return cls(*sizes, numerics.compute, model.dropout > 0, *places)

    @property
    def grouped(self) -> bool:
        """Whether each head of keys and values serves several heads of queries."""
        return self.kv_heads < self.heads

    def kernel_heads(self, batch: int, width: int) -> Heads:
        """The shape that a kernel gets for ``batch`` sequences, with heads padded to ``width``."""
        return Heads(batch, self.heads, self.tokens, width, self.element, self.kv_heads)

    def bytes_of(self, width: int, element: int, *, keys: bool = False) -> Size:
        """Bytes of the queries [B, a, T, width], or of ``keys`` or values [B, k, T, width]."""
        return Size(element * (self.kv_heads if keys else self.heads) * self.tokens * width)

    @property
    def pairs(self) -> int:
        """The number of attention scores of one sequence, a·T²."""
        return self.heads * self.tokens**2

    @property
    def result(self) -> Size:
        """Bytes of the queries and of the output [B, a, T, D] in the compute dtype."""
        return self.bytes_of(self.width, self.element)

    @property
    def keys(self) -> Size:
        """Bytes of the keys and of the values [B, k, T, D] in the compute dtype."""
        return self.bytes_of(self.width, self.element, keys=True)

    @property
    def moved(self) -> float:
        """Bytes of queries, keys, values and output of one sequence."""
        return 2.0 * (self.result.per_sequence + self.keys.per_sequence)


def returns_in_order(kernel: str, shape: AttentionShape, heads: int) -> bool:
    """Whether the kernel returns the gradients of queries or keys of ``heads`` heads in the layout [B, T, heads, D]."""
    return heads == 1 or (kernel != "math" and _padded_width(kernel, shape) == shape.width)


def _padded_width(kernel: str, shape: AttentionShape) -> int:
    return kernels.multiple(shape.width, kernels.FLASH_ALIGNED) if kernel == "flash" else shape.width


def record_attention(r: Recorder, kernel: str, shape: AttentionShape, q: Value, k: Value, v: Value) -> Value:
    """Record ``scaled_dot_product_attention`` and the reshape after it; return the output projection's input [B, T, a·D].

    Args:
        r: the recorder, inside a scope, which holds the output.
        kernel: ``flash``, ``cudnn``, ``mem_efficient`` or ``math``.
        shape: the sizes.
        q: queries [B, a, T, D], laid out as [B, T, a, D].
        k: keys [B, k, T, D], laid out as [B, T, k, D].
        v: values, of the same shape as the keys.
    """
    if kernel == "math":
        return _record_math(r, shape, q, k, v)
    width = _padded_width(kernel, shape)
    if width == shape.width:
        return r.hold(_record_fused(r, kernel, shape, width, q, k, v))
    return _record_padded(r, kernel, shape, width, q, k, v)


def _record_fused(r: Recorder, kernel: str, shape: AttentionShape, width: int, q: Value, k: Value, v: Value) -> Value:
    """Record one fused kernel on heads of ``width``.

    A causal kernel computes half of the scores. It takes half the FLOPs of two matmuls in the forward pass, and half
    the FLOPs of five in the backward pass (FlashAttention-2, arXiv 2307.08691, section 3.1). With a mask it computes
    all scores, and reads the mask once for each head.
    """
    each, keys = (shape.bytes_of(width, shape.element, keys=keys) for keys in (False, True))
    rows = kernels.multiple(shape.tokens, kernels.EFFICIENT_ROWS) if kernel == "mem_efficient" else shape.tokens
    output, lse = Value(each), Value(Size(FP32 * shape.heads * rows))
    states = Value(_RANDOM_STATE), Value(_RANDOM_STATE)
    pairs = float(shape.pairs * shape.width * (2 if shape.packed else 1))
    moved = shape.moved + (shape.element * shape.pairs if shape.packed else 0)
    return r.run(
        Operation(
            f"attention, {kernel}",
            (q, k, v),
            (Gradient(each), Gradient(keys), Gradient(keys)),
            (output, lse, *states),
            part=ATTENTION,
            saves=(q, k, v, output, lse, *states),
            is_expensive=not shape.dropout,
            workspace=lambda batch: _temporaries(kernel, shape.kernel_heads(batch, width), back=False),
            workspace_back=lambda batch: _temporaries(kernel, shape.kernel_heads(batch, width), back=True),
            forward=Cost.moving(moved, kernels=2)._replace(attention=2 * pairs),
            backward=Cost.moving(2 * moved, kernels=5)._replace(attention=5 * pairs),
        )
    )


def _temporaries(kernel: str, heads: Heads, *, back: bool) -> list[int]:
    """The bytes of a fused kernel's temporary allocations.

    A kernel without grouped heads gets copies of keys and values, expanded to all query heads. The backward pass expands
    them again. A single head of keys and values is expanded without a copy. The kernel makes gradients of the expanded
    keys and values. Their sums over each group are the recorded gradients.
    """
    extras = [*kernels.sizes((kernels.attention_backward if back else kernels.attention_forward)(kernel, heads))]
    if kernel != "mem_efficient" or not heads.expanded:
        return extras
    copies = [heads.expanded] * 2 if heads.keys > 1 else []
    sums = [heads.expanded - heads.expanded * heads.keys // heads.number] * 2 if back else []
    return [*extras, *copies, *sums]


def _record_padded(r: Recorder, kernel: str, shape: AttentionShape, width: int, q: Value, k: Value, v: Value) -> Value:
    """Record flash attention: pad heads to ``width``, attend, cut the output to D, and if a > 1 copy it to [B, T, a·D]."""
    each = shape.bytes_of(width, shape.element)
    with r.scope():
        keys = shape.bytes_of(width, shape.element, keys=True)
        sizes = ((q, each, shape.result), (k, keys, shape.keys), (v, keys, shape.keys))
        padded = [r.hold(r.new("pad", part, size, gradient)) for part, size, gradient in sizes]
        output = _record_fused(r, kernel, shape, width, *padded)
    cut = Value(base=output)
    r.hold(r.run(Operation("cut", (output,), (Gradient(each),), (cut,)), passing=(output,)))
    return cut if shape.heads == 1 else _record_layout(r, shape, cut)


def _record_layout(r: Recorder, shape: AttentionShape, heads: Value) -> Value:
    """Record a copy of heads [B, a, T, D] into [B, T, a·D]."""
    return r.hold(r.run(Operation("lay out heads", (heads,), (PASSED_ON,), (Value(shape.result),))))


def _record_math(r: Recorder, shape: AttentionShape, q: Value, k: Value, v: Value) -> Value:
    """Record the math kernel, which computes attention as a sequence of separate fp32 operators."""
    full, pairs = shape.bytes_of(shape.width, FP32), shape.tokens**2
    keys = shape.bytes_of(shape.width, FP32, keys=True)
    with r.scope():
        if shape.element != FP32:
            q = r.hold(r.new("cast", q, full, shape.result))
            k, v = (r.hold(r.new("cast", part, keys, shape.keys)) for part in (k, v))
        q = r.hold(r.new("scale", q, full, full))
        if not shape.packed:
            mask = Value(Size(fixed=FP32 * pairs))  # made from a mask of one byte an element
            r.hold(r.run(Operation("mask", (), (), (mask,), workspace=lambda _batch: [pairs])))
        if shape.grouped:
            k, v = (r.hold(r.new("expand", part, full, keys)) for part in (k, v))
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


def _record_joined(r: Recorder, shape: AttentionShape, part: Value, *, keys: bool = False) -> tuple[Value, bool]:
    """Record a copy that joins batch and heads; return it and True, or ``part`` and False if no copy is needed.

    Expanded ``keys`` and values are already joined.
    """
    if shape.one_sequence or shape.heads == 1 or (keys and shape.grouped):
        return part, False
    full = shape.bytes_of(shape.width, FP32)
    return r.run(Operation("join", (part,), (PASSED_ON,), (Value(full),))), True


def _record_scores(r: Recorder, shape: AttentionShape, q: Value, k: Value) -> Value:
    """Record the scores Q·Kᵀ, fp32 [B, a, T, T]."""
    full, flops = shape.bytes_of(shape.width, FP32), 2.0 * shape.pairs * shape.width
    numel = shape.heads * shape.tokens * shape.width
    (left, left_copied), (right, right_copied) = _record_joined(r, shape, q), _record_joined(r, shape, k, keys=True)
    factors = left, right
    scores = r.run(
        Operation(
            "scores",
            factors,
            (Gradient(full), Gradient(full)),
            (Value(Size(FP32 * shape.pairs)),),
            part=ATTENTION,
            saves=factors,
            forward=Cost(flops=flops, outputs=float(shape.pairs)),
            backward=Cost(flops=2 * flops, outputs=2.0 * numel),
        ),
        passing=[value for value, copied in ((left, left_copied), (right, right_copied)) if copied],
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
    values, copied = _record_joined(r, shape, v, keys=True)
    flops, numel = 2.0 * shape.pairs * shape.width, shape.heads * shape.tokens * shape.width
    dropout = 9 if shape.dropout else 0
    cast = FP32 + shape.element if shape.element != FP32 else 0
    inputs = shape.moved
    moved, back = inputs + (38 + cast + dropout) * shape.pairs, 2 * inputs + (28 + dropout) * shape.pairs
    product = Operation(
        "weighted sum",
        (values, weights),
        (Gradient(full), Gradient(scores)),
        (Value(full),),
        part=ATTENTION,
        saves=(values, weights),
        forward=Cost(flops=flops, moved=moved, fused=moved, kernels=18, fused_kernels=2, outputs=float(numel)),
        backward=Cost(
            2 * flops, moved=back, fused=back, kernels=15, fused_kernels=5, outputs=float(numel + shape.pairs)
        ),
    )
    if not copied:
        return r.run(product)
    output = r.run(product, passing=(values,))
    return r.run(Operation("part heads", (output,), (Gradient(full),), (Value(base=output),)), passing=(output,))
