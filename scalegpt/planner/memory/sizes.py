"""The sizes that the tensors of a training step are made of, and the kinds that the ledger sorts them into."""

from dataclasses import dataclass

from scalegpt.config import RunConfig
from scalegpt.units import BYTES

ACTIVATIONS, TEMPORARIES, COPIES = "activations", "temporaries", "weight copies"
WEIGHTS, GRADIENTS, OPTIMIZER, INPUTS, LOSS = "weights", "gradients", "optimizer state", "inputs", "loss"


@dataclass(frozen=True)
class Sizes:
    """The sizes that a step's tensors are made of.

    Attributes:
        n: tokens of a micro batch, B·T.
        batch: B.
        compute: bytes of the compute dtype, c.
        residual: bytes of the residual stream's dtype, r.
    """

    n: int
    batch: int
    compute: int
    residual: int

    @classmethod
    def of(cls, run: RunConfig) -> "Sizes":
        """The sizes of a run whose precision, micro batch and vocabulary are fixed."""
        compute = BYTES[run.train.precision]
        return cls(
            n=run.train.micro_batch * run.model.block_size,
            batch=run.train.micro_batch,
            compute=compute,
            residual=4 if run.train.residual_dtype == "fp32" else compute,
        )


def host_size(count: int, *, pin: bool) -> int:
    """Host memory for a tensor of so many bytes: pinned allocations are powers of two (torch's ``CachingHostAllocator``)."""
    return 1 << (count - 1).bit_length() if pin and count else count
