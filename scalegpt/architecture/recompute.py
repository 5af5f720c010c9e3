"""Which operations of a block recompute (activation checkpointing) runs again, and which results its selective form keeps.

``torch.utils.checkpoint`` runs the block's forward pass again in the backward pass, up to the last tensor that autograd
needs. Selective recompute keeps the results of those expensive operations that would otherwise run again.
"""

from collections.abc import Sequence
from functools import lru_cache

from scalegpt.architecture.decoder import Decoder
from scalegpt.architecture.layers import Numerics
from scalegpt.architecture.operations import MATMULS, Operation, Recorder, Value
from scalegpt.config import ModelConfig


def saves_its_own(op: Operation) -> bool:
    """Whether autograd saves a result of the operation.

    If autograd saves a result, recompute must run the operation. If not, its inputs are enough.
    """
    return any(value in op.results for value in op.saves)


def last_saving(operations: Sequence[Operation]) -> Operation:
    """The last operation for which autograd saves a tensor, where recompute stops; without one, the last operation."""
    return next((op for op in reversed(operations) if op.saves), operations[-1])


def recomputed(operations: Sequence[Operation]) -> tuple[Operation, ...]:
    """The operations that run again: all before :func:`last_saving`'s, and that one too if autograd saves its result."""
    last = last_saving(operations)
    return tuple(operations[: operations.index(last) + saves_its_own(last)])


def kept_by_selective(operations: Sequence[Operation]) -> frozenset[Operation]:
    """The operations whose results selective recompute keeps."""
    return frozenset(op for op in recomputed(operations) if op.is_expensive)


@lru_cache(maxsize=64)
def kept_matmuls(model: ModelConfig) -> tuple[bool, ...]:
    """For each matmul with a weight in a block, in order, whether selective recompute keeps its result."""
    r, numerics = Recorder(), Numerics(compute=2, residual=2, weights=2, kernel="flash")
    Decoder(model).block.record(r, Value(), model.block_size, numerics)
    kept = kept_by_selective(r.operations)
    return tuple(op in kept for op in r.operations if op.part == MATMULS)
