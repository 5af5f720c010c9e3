"""How queries, keys and values are made from the QKV projection's result: as views, normed, or turned by rotary positions.

Symbols: B sequences of T tokens, a heads of queries, k heads of keys and values, D width of a head, c bytes of the
compute dtype. The table shows what autograd keeps of the QKV [B, T, a + 2k, D] for the backward pass:

==================  ===================================================================================================
as views            nothing more than attention keeps: queries, keys and values are the QKV itself
rotary positions    copies of all three, which attention keeps, and not the QKV
qk_norm             the QKV, of which the norms read queries and keys, and normed copies of these, turned or not; a number
                    in fp32 for each head and token. Values are a view of the QKV
==================  ===================================================================================================
"""

from dataclasses import dataclass

from scalegpt.architecture.attention import AttentionShape, returns_in_order
from scalegpt.architecture.layers import FP32, STATISTICS, Layer, Numerics
from scalegpt.architecture.operations import PASSED_ON, Cost, Gradient, Operation, Recorder, Size, Value


@dataclass(frozen=True)
class HeadNorm(Layer):
    """RMSNorm over each head of queries or keys."""

    def record(self, r: Recorder, x: Value, shape: AttentionShape, heads: int, numerics: Numerics) -> Value:
        """Record the norm of a view [B, T, heads, D] of the QKV.

        CUDA's kernel copies its input and the incoming gradient, unless they are contiguous (torch's
        ``layer_norm_kernel.cu: _fused_rms_norm_cuda``). Bytes moved per element, in units of c: forward, the copy (2),
        a read and a write; backward, the copy (2), three reads and a write, and for the weight's gradient at least two
        reads.
        """
        size = Size(shape.element * heads * shape.tokens * shape.width)
        cast = numerics.weights != shape.element
        copies = (Value(Size(fixed=shape.element * shape.width)),) if cast else ()
        statistics, once = Value(Size(STATISTICS * heads * shape.tokens)), float(size.per_sequence)
        in_order = bool(shape.rotated) or returns_in_order(numerics.kernel, shape, heads)

        def copied(batch: int) -> list[int]:
            return [size.at(batch)]

        return r.run(
            Operation(
                self.name,
                (x,),
                (Gradient(size),),
                (Value(size), statistics),
                copies=copies,
                saves=(x, statistics, *copies),
                workspace=copied,
                workspace_back=copied if in_order else lambda batch: copied(batch) * 2,
                forward=Cost(moved=4 * once, fused=2 * once, kernels=2, fused_kernels=1),
                backward=Cost(moved=10 * once, fused=4 * once, kernels=5, fused_kernels=2),
            )
        )


def record_heads(
    r: Recorder, shape: AttentionShape, qkv: Value, norms: tuple[HeadNorm, ...], numerics: Numerics
) -> tuple[Value, Value, Value]:
    """Record how queries [B, T, a, D], keys and values [B, T, k, D] are made from the QKV, and release the QKV's name.

    The backward pass joins their three gradients in one copy, whatever their layout.

    Args:
        r: the recorder, inside a scope, which holds the results.
        shape: the sizes.
        qkv: [B, T, a + 2k, D].
        norms: the norms of queries and keys; empty: the model has none.
        numerics: the dtypes.
    """
    sizes = shape.result, shape.keys, shape.keys
    whole = Size(sum(size.per_sequence for size in sizes))
    views = tuple(Value(base=qkv) for _ in sizes)
    r.run(Operation("split", (qkv,), (Gradient(whole),), views, backward=Cost.moving(2.0 * whole.per_sequence)))
    if norms or not shape.rotated:
        v = r.run(Operation("heads", (views[2],), (PASSED_ON,), (Value(base=qkv),)))
    else:
        copying = Cost.moving(2.0 * shape.keys.per_sequence)
        v = r.run(Operation("copy", (views[2],), (PASSED_ON,), (Value(shape.keys),), forward=copying))
    parts, counts = list(views[:2]), (shape.heads, shape.kv_heads)
    for i, norm in enumerate(norms):
        parts[i] = norm.record(r, parts[i], shape, counts[i], numerics)
    if shape.rotated:
        for i, size in enumerate(sizes[:2]):
            parts[i] = _record_rotation(r, shape, parts[i], size, passing=bool(norms))
    elif not norms:
        parts = [r.run(Operation("heads", (view,), (PASSED_ON,), (Value(base=qkv),))) for view in parts]
    r.release(views[0])
    r.release(qkv)
    return r.hold(parts[0]), r.hold(parts[1]), r.hold(v)


def _record_rotation(r: Recorder, shape: AttentionShape, heads: Value, size: Size, *, passing: bool) -> Value:
    """Record the rotation of ``heads`` (``size`` bytes) into a new tensor. The gradient is turned back in the same way.

    Besides its result it makes an fp32 copy of the numbers that are turned, unless they are fp32, and half of the
    result in fp32. In bytes for each number, it reads and writes the copy (c + 4), and then for each half a product
    (8), a product that is added to it (12) and a copy into the result (4 + c).
    """
    c, numel = shape.element, size.per_sequence // shape.element
    turned = numel * shape.rotated // shape.width
    casting, rest = c + FP32 if c != FP32 else 0, 2.0 * c * (numel - turned)
    moved = turned * (24.0 + c + casting) + rest
    kernels = 6 + (c != FP32) + (shape.rotated < shape.width)
    alone = not shape.normed  # a compiled block turns heads in the kernel that norms them
    cost = Cost(moved=moved, fused=2.0 * size.per_sequence if alone else 0.0, kernels=kernels, fused_kernels=int(alone))

    def temporaries(batch: int) -> list[int]:
        return [batch * FP32 * turned if c != FP32 else 0, batch * FP32 * turned // 2]

    return r.run(
        Operation(
            "rotate",
            (heads,),
            (Gradient(size),),
            (Value(size),),
            workspace=temporaries,
            workspace_back=temporaries,
            forward=cost,
            backward=cost,
        ),
        passing=(heads,) if passing else (),
    )
