"""The temporary memory that CUDA's kernels allocate while they run, besides their results.

The planner counts this memory. The trace of a step (:mod:`scalegpt.tracing`) uses the same sizes, since it runs no
kernels: its tensors have no data. The sizes follow the source of torch 2.13 and have not been measured on a card yet:

==================  ===================================================================================================
kernel              source in ``aten/src/ATen/native``
==================  ===================================================================================================
flash               ``transformers/cuda/flash_attn/flash_api.cpp: mha_bwd``
mem_efficient       ``transformers/cuda/attention.cu``, ``attention_backward.cu``, and the tiles in
                    ``mem_eff_attention/kernels/cutlassB.h``; the largest tile is assumed to fit the card
cudnn               an estimate: its workspace is opaque, and is assumed to be as large as flash's
embedding           ``cuda/Embedding.cu``, ``cuda/EmbeddingBackwardKernel.cu``
grouped norm        ``cuda/ForeachReduceOp.cu``
==================  ===================================================================================================
"""

from collections.abc import Iterable
from typing import NamedTuple

Extras = tuple[tuple[str, int], ...]
"""(label, bytes) of each allocation; all of them live at once."""

FLASH_ALIGNED = 8
"""Before flash attention heads are padded to a multiple of this width (torch, ``attention.cpp: pad_last_dim``)."""
FLASH_ROWS = 128
"""Flash attention's backward rounds the number of queries up to a multiple of this."""
EFFICIENT_ROWS = 32
"""The memory-efficient kernel rounds the rows of its log-sum-exp up to a multiple of this (``kAlignLSE``)."""
EFFICIENT_WIDE = 128
"""Widest head that fits the registers of the memory-efficient kernel; for wider heads its fp32 sums are in memory."""
EFFICIENT_BLOCKS = 200
"""The most thread blocks over which the memory-efficient kernel spreads the fp32 sums of dK and dV for wide heads."""
EMBEDDING_UNSORTED = 3072
"""Up to this many tokens, the embedding's backward pass adds gradients without sorting them, and allocates nothing."""
EMBEDDING_ROWS = 10
"""Rows of the gradient that one thread of the embedding's sorted sum adds (``NROWS_PER_THREAD``)."""
NORM_CHUNK = 65_536
"""Elements that one thread block of the grouped norm reads (``kChunkSize``)."""


class Heads(NamedTuple):
    """The shape [B, a, T, D] of queries (batch, heads, rows, width), the bytes of an element, and the number of key heads."""

    batch: int
    number: int
    rows: int
    width: int
    element: int
    keys: int

    @property
    def numel(self) -> int:
        """The number of elements of the queries, B·a·T·D."""
        return self.batch * self.number * self.rows * self.width

    @property
    def expanded(self) -> int:
        """Bytes of keys or values that are expanded to one head for each head of queries; 0 if heads are not shared."""
        return self.element * self.numel if self.keys < self.number else 0


def multiple(size: int, of: int) -> int:
    """``size``, rounded up to a multiple of ``of``."""
    return -(-size // of) * of


def attention_forward(kernel: str, heads: Heads) -> Extras:
    """The temporary allocations of an attention kernel's forward pass, without the expanded keys of mem_efficient."""
    if kernel == "mem_efficient" and heads.element != 4 and heads.width > EFFICIENT_WIDE:
        return (("mem_efficient: fp32 sum of the output", 4 * heads.numel),)
    return ()


def attention_backward(kernel: str, heads: Heads) -> Extras:
    """The temporary allocations of an attention kernel's backward pass.

    ``math`` has none, since its operators allocate only what they return.
    """
    if kernel == "math":
        return ()
    return _efficient_backward(heads) if kernel == "mem_efficient" else _flash_backward(heads)


def _flash_backward(heads: Heads) -> Extras:
    rows = heads.batch * heads.number * multiple(heads.rows, FLASH_ROWS)
    width = multiple(heads.width, 32 if heads.width <= 128 else 64)
    sums = ("flash backward: softmax_d", 4 * rows), ("flash backward: dq_accum", 4 * rows * width)
    if not heads.expanded:
        return sums
    return (
        *sums,
        ("flash backward: dk of each query", heads.expanded),
        ("flash backward: dv of each query", heads.expanded),
    )


def _efficient_backward(heads: Heads) -> Extras:
    """The allocations: row sums of dO·O; fp32 sums of dQ in tiles with a lock each; for wide heads also sums of dK and dV."""
    narrow, half = heads.width <= 64, heads.element != 4
    queries = 64 if narrow else 128  # kBlockSizeI
    keys = 128 if half and not narrow and heads.width <= EFFICIENT_WIDE else 64  # kBlockSizeJ
    tiles = -(-heads.rows // queries) * -(-heads.width // keys)
    floats = tiles * (queries * keys + 4)
    matrices = heads.batch * heads.number
    if half and heads.width > EFFICIENT_WIDE:
        splits = max(1, min(-(-heads.rows // keys), EFFICIENT_BLOCKS // matrices))
        floats += 2 * splits * keys * multiple(heads.width, queries)
    delta = ("mem_efficient backward: delta", 4 * matrices * heads.rows)
    run = delta, ("mem_efficient backward: fp32 sums", 4 * floats * matrices)
    if half:
        return run
    # In fp32, separate operators first make the row sums of dO·O, with the product and a transposed copy of the sums.
    sums = (
        ("mem_efficient backward: dO · O", 4 * heads.numel),
        ("mem_efficient backward: sums of dO · O", delta[1]),
        delta,
    )
    return max(run, sums, key=lambda extras: sum(size for _, size in extras))


def embedding_backward(tokens: int, rows: int, width: int) -> Extras:
    """The temporary allocations of the kernel that sums the gradients of ``tokens`` tokens into a table [rows, width].

    The sums are fp32 whatever the gradients' dtype. The tokens are sorted first, which needs less memory than the sums.
    """
    if tokens <= EMBEDDING_UNSORTED:
        return ()
    segments = min(tokens, rows)
    parts = tokens // EMBEDDING_ROWS + segments
    return (
        ("embedding backward: sorted tokens", 8 * tokens),
        ("embedding backward: positions of sorted tokens", 8 * tokens),
        ("embedding backward: segments", 8 * tokens),
        ("embedding backward: parts per segment", 8 * segments),
        ("embedding backward: offsets", 8 * segments),
        ("embedding backward: parts", 8 * parts),
        ("embedding backward: partial sums", 4 * parts * width),
    )


def grouped_norm(tensors: int, largest: int) -> Extras:
    """The temporary allocation of ``_foreach_norm`` over ``tensors`` tensors, the largest of ``largest`` elements."""
    return (("grouped norm: partial sums", 4 * tensors * -(-largest // NORM_CHUNK)),)


def sizes(extras: Extras) -> Iterable[int]:
    """The bytes of the allocations, without their labels."""
    return (size for _, size in extras)
