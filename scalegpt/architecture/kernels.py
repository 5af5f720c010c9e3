"""What CUDA's kernels allocate for themselves while they run, besides their results.

The ledger counts it. The trace, whose tensors without data run no kernel, reads it here too. Read from torch 2.13, and
not yet measured on a card:

==================  ===================================================================================================
kernel              source in ``aten/src/ATen/native``
==================  ===================================================================================================
flash               ``transformers/cuda/flash_attn/flash_api.cpp: mha_bwd``
mem_efficient       ``transformers/cuda/attention.cu``, ``attention_backward.cu``, and the tiles in
                    ``mem_eff_attention/kernels/cutlassB.h``, of which the largest is taken to fit the card
cudnn               its workspace is opaque; taken to be what flash needs. An estimate
embedding           ``cuda/Embedding.cu``, ``cuda/EmbeddingBackwardKernel.cu``
grouped norm        ``cuda/ForeachReduceOp.cu``
==================  ===================================================================================================
"""

from collections.abc import Iterable
from typing import NamedTuple

Extras = tuple[tuple[str, int], ...]
"""Labels, and bytes of single allocations that live together."""

FLASH_ALIGNED = 8
"""A head whose width this does not divide is padded before flash attention (torch, ``attention.cpp: pad_last_dim``)."""
FLASH_ROWS = 128
"""Flash attention's backward rounds the number of queries up to a multiple of this."""
EFFICIENT_ROWS = 32
"""The memory-efficient kernel's log-sum-exp has its rows rounded up to a multiple of this (``kAlignLSE``)."""
EFFICIENT_WIDE = 128
"""Heads wider than this do not fit the memory-efficient kernel's registers: it adds up in memory."""
EFFICIENT_BLOCKS = 200
"""Blocks over which that kernel spreads the fp32 sums of dK and dV, where it needs them."""
EMBEDDING_UNSORTED = 3072
"""Tokens up to which the embedding's backward sums without sorting them, and needs no space."""
EMBEDDING_ROWS = 10
"""Rows that a thread of the sorted sum adds (``NROWS_PER_THREAD``)."""
NORM_CHUNK = 65_536
"""Elements that a block of the grouped norm takes (``kChunkSize``)."""


class Heads(NamedTuple):
    """Queries, keys or values [B, a, T, D], with the bytes of an element."""

    batch: int
    number: int
    rows: int
    width: int
    element: int

    @property
    def numel(self) -> int:
        """B·a·T·D."""
        return self.batch * self.number * self.rows * self.width


def multiple(size: int, of: int) -> int:
    """The size, rounded up."""
    return -(-size // of) * of


def attention_forward(kernel: str, heads: Heads) -> Extras:
    """What a kernel's forward pass allocates for itself."""
    if kernel == "mem_efficient" and heads.element != 4 and heads.width > EFFICIENT_WIDE:
        return (("mem_efficient: fp32 sum of the output", 4 * heads.numel),)
    return ()


def attention_backward(kernel: str, heads: Heads) -> Extras:
    """What a kernel's backward pass allocates for itself; ``math`` is made of operators that allocate what they return."""
    if kernel == "math":
        return ()
    return _efficient_backward(heads) if kernel == "mem_efficient" else _flash_backward(heads)


def _flash_backward(heads: Heads) -> Extras:
    rows = heads.batch * heads.number * multiple(heads.rows, FLASH_ROWS)
    width = multiple(heads.width, 32 if heads.width <= 128 else 64)
    return ("flash backward: softmax_d", 4 * rows), ("flash backward: dq_accum", 4 * rows * width)


def _efficient_backward(heads: Heads) -> Extras:
    """The rows' sums of dO·O, then fp32 sums of dQ in tiles with a lock each, and of dK and dV for wide heads."""
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
    # In fp32 operators make the rows' sums, with the product and a transposed copy beside them.
    sums = (
        ("mem_efficient backward: dO · O", 4 * heads.numel),
        ("mem_efficient backward: sums of dO · O", delta[1]),
        delta,
    )
    return max(run, sums, key=lambda extras: sum(size for _, size in extras))


def embedding_backward(tokens: int, rows: int, width: int) -> Extras:
    """What the gradient of a table [rows, width] needs to add up the gradients of a number of tokens.

    The sums are fp32 whatever the gradients are. Sorting, which precedes them, needs less.
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
    """The partial sums that the norms of several tensors need, the largest of which has ``largest`` elements."""
    return (("grouped norm: partial sums", 4 * tensors * -(-largest // NORM_CHUNK)),)


def sizes(extras: Extras) -> Iterable[int]:
    """The bytes without their labels."""
    return (size for _, size in extras)
