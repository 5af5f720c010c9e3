"""The live bytes of one training step, allocation by allocation, in the order in which our trainer makes them.

The step is written once more as a ledger: what each operation of :mod:`scalegpt.model` and each backend allocates, keeps for
the backward pass and frees. Sums over tensors follow from the shapes, so the whole takes well under a millisecond and needs no
torch. `tests/oracle` holds it to traces of the real step.

Symbols: B micro batch, T block size, n = B·T, H width, a heads, V vocabulary, L layers; c bytes of the compute dtype, r of the
residual stream. ``plain`` holds fp32 weights and casts them where it uses them: autograd keeps the cast copies.
"""

from dataclasses import dataclass

from scalegpt.config import RunConfig
from scalegpt.planner.timeline import Timeline, rounded

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Sizes:
    """The sizes that the step's tensors are made of, in elements and bytes."""

    n: int
    hidden: int
    heads: int
    block: int
    batch: int
    vocab: int
    layers: int
    compute: int
    residual: int
    bias: bool

    @classmethod
    def of(cls, run: RunConfig) -> "Sizes":
        """The sizes of a run whose precision and micro batch are fixed."""
        compute = BYTES[run.train.precision]
        return cls(
            n=run.train.micro_batch * run.model.block_size,
            hidden=run.model.n_embd,
            heads=run.model.n_head,
            block=run.model.block_size,
            batch=run.train.micro_batch,
            vocab=run.model.vocab_size,
            layers=run.model.n_layer,
            compute=compute,
            residual=4 if run.train.residual_dtype == "fp32" else compute,
            bias=run.model.bias,
        )

    def stream(self, width: int = 1) -> int:
        """Bytes of [n, width·H] in the compute dtype."""
        return self.compute * self.n * self.hidden * width

    @property
    def residual_stream(self) -> int:
        """Bytes of the residual stream [n, H]."""
        return self.residual * self.n * self.hidden
