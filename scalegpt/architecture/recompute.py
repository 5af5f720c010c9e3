"""Which operations of a block recompute runs again, and which results its selective policy keeps.

``torch.utils.checkpoint`` runs the block's forward again in the backward pass, until the last tensor is there that autograd
needs. Selective recompute keeps the results of operations that are dear, as far as they would be computed again.
"""

from collections.abc import Sequence
from functools import lru_cache

from scalegpt.architecture.decoder import Decoder
from scalegpt.architecture.layers import Numerics
from scalegpt.architecture.operations import MATMULS, Operation, Recorder, Size, Value
from scalegpt.config import ModelConfig


def saves_its_own(op: Operation) -> bool:
    """Whether an operation keeps a result of its own, and so must run to the end."""
    return any(value in op.results for value in op.saves)


def last_saving(operations: Sequence[Operation]) -> Operation:
    """The last operation that saves something, at which recompute stops."""
    return next((op for op in reversed(operations) if op.saves), operations[-1])


def computed_again(operations: Sequence[Operation]) -> tuple[Operation, ...]:
    """The operations before the last that saves something; that one too if it saves a result of its own."""
    last = last_saving(operations)
    return tuple(operations[: operations.index(last) + saves_its_own(last)])


def kept_by_selective(operations: Sequence[Operation]) -> frozenset[Operation]:
    """The operations whose results selective recompute keeps."""
    return frozenset(op for op in computed_again(operations) if op.is_dear)


@lru_cache(maxsize=64)
def kept_matmuls(model: ModelConfig) -> tuple[bool, ...]:
    """For each matmul with a weight in a block, in order, whether selective recompute keeps its result."""
    r, numerics = Recorder(), Numerics(compute=2, residual=2, weights=2, kernel="flash")
    Decoder(model).block.record(r, Value(Size(1)), model.block_size, numerics)
    operations = [entry for entry in r.entries if isinstance(entry, Operation)]
    kept = kept_by_selective(operations)
    return tuple(op in kept for op in operations if op.part == MATMULS)
