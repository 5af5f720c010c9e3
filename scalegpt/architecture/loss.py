"""Cross entropy of the head's logits: what it allocates and computes, over full logits or chunk by chunk.

The modules are in :mod:`scalegpt.model.loss`. Symbols: n tokens of a micro batch, V vocabulary, H width, k tokens of a
chunk; c bytes of the compute dtype.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from scalegpt.architecture.layers import FP32, Numerics
from scalegpt.architecture.operations import MATMULS, Cost, Gradient, Operation, Recorder, Size, Value
from scalegpt.architecture.parts import HEAD, matrix_of_head
from scalegpt.config import ModelConfig
from scalegpt.config.train import LOSS_ROWS, TrainConfig

KERNELS_OF_FULL_LOSS = 14
KERNELS_OF_CHUNK, KERNELS_OF_ROWS, KERNELS_OF_ROWS_COMPILED = 5, 18, 4
"""Kernels of the loss: over full logits; of a chunk's matmuls; and of each :data:`LOSS_ROWS` rows between them."""

CAPPING = 52, 6
"""Bytes a logit and kernels that a soft cap adds in eager mode: a quotient, tanh and a product in fp32, each with its
derivative. Where a chunk's logits are cast to fp32 in any case, 8 bytes and 2 kernels fewer."""


@dataclass(frozen=True)
class LossPart:
    """The head and the loss.

    Attributes:
        model: the model.
        kind: ``full`` or ``chunked``.
        chunk: k, tokens whose logits exist at once.
    """

    model: ModelConfig
    kind: str
    chunk: int

    @classmethod
    def of(cls, model: ModelConfig, train: TrainConfig) -> "LossPart":
        """The loss that a run trains with."""
        return cls(model, train.loss, train.loss_chunk)

    @property
    def has_cap(self) -> bool:
        """Whether logits are soft-capped."""
        return self.model.logit_softcap is not None

    def record(self, r: Recorder, hidden: Value, tokens: int, numerics: Numerics) -> Value:
        """Hidden states [T, H] → the loss, whose bytes are not counted."""
        return (self._record_full if self.kind == "full" else self._record_chunked)(r, hidden, tokens, numerics)

    def _record_full(self, r: Recorder, hidden: Value, tokens: int, numerics: Numerics) -> Value:
        """Logits, their fp32 copy and the log-softmax, of which the last is kept."""
        numel, c = tokens * self.model.vocab_size, numerics.compute
        size, exact = Size(c * numel), Size(FP32 * numel)
        with r.scope():
            logits, passing = r.hold(matrix_of_head(self.model).record(r, hidden, tokens, numerics)), list[Value]()
            if c != FP32:
                logits = r.new("cast", logits, exact, size)
                passing = [logits]
            if self.has_cap:
                logits, passing = r.hold(_record_softcap(r, logits, exact, passing)), []
            gradients, probabilities = (Gradient(exact),), Value(exact)
            r.run(Operation("log-softmax", (logits,), gradients, (probabilities,), saves=(probabilities,)))
            mean = Operation("mean", (probabilities,), gradients, (Value(),))
            return r.run(mean, passing=(probabilities, *passing))

    def _record_chunked(self, r: Recorder, hidden: Value, tokens: int, numerics: Numerics) -> Value:
        """Both gradients, and a chunk's logits at a time; the hidden states are not kept."""
        c, numel = numerics.compute, self.model.vocab_size * self.model.n_embd
        made = Value(Size(c * tokens * self.model.n_embd)), Value(Size(fixed=FP32 * numel))
        return r.run(
            Operation(
                "chunked loss",
                (hidden,),
                (Gradient(reuses=made[0]),),
                (Value(), *made),
                part=MATMULS,
                copies=(Value(Size(fixed=c * numel)),) if numerics.weights != c else (),
                saves=made,
                parameter=HEAD,
                weight=numel,
                weight_gradient=made[1],
                workspace=lambda batch: self._fullest(batch * tokens, c),
            )
        )

    def _fullest(self, tokens: int, c: int) -> list[int]:
        """A chunk's logits, and beside them some rows in fp32, or the chunk's part of the head's gradient."""
        chunk, vocabulary = min(self.chunk, tokens), self.model.vocab_size
        logits, rows = c * chunk * vocabulary, FP32 * min(LOSS_ROWS, chunk) * vocabulary
        part = c * vocabulary * self.model.n_embd if c != FP32 else 0
        copies = 2 if self.has_cap else int(c != FP32)  # with a cap, of the capped rows and their share of the cap
        return [logits, *([rows] * copies if copies * rows > part else [part])]

    def cost(self, tokens: int, numerics: Numerics, *, compiled: bool) -> Cost:
        """The work of the loss with its gradients, which the chunked loss computes at once.

        Bytes a logit: one matmul writes it and two read it (3c). Chunked, between them: cast to fp32 (c + 4), its maximum
        (4), the softmax in place (8), whose maximum is sought (4), rows that do not count cleared (8), cast back (4 + c);
        compiled, two reads and a write (3c). Full: cast to fp32 (c + 4), the log-softmax (8), the gradients of both
        (4 and 12), cast back (4 + c). In fp32 nothing is cast. Each chunk adds V·H numbers to the head's fp32 gradient.

        Args:
            tokens: n, of the micro batch.
            numerics: the dtypes.
            compiled: whether the loss is compiled.
        """
        c, model = numerics.compute, self.model
        logits, head = float(tokens) * model.vocab_size, float(model.vocab_size) * model.n_embd
        flops = 6.0 * logits * model.n_embd
        capping, kernels_of_capping = CAPPING if self.has_cap else (0, 0)
        casts = 2 * (c + FP32) if c != FP32 else 0
        if self.kind == "full":
            moved = (3 * c + casts + 24 + capping) * logits + 2 * c * head
            return Cost(flops=flops, moved=moved, kernels=KERNELS_OF_FULL_LOSS + kernels_of_capping)
        if self.has_cap and casts:
            capping, kernels_of_capping = capping - 8, kernels_of_capping - 2
        chunks = -(-tokens // self.chunk)
        added = 2 * c + 8 if c != FP32 else 8
        between = 3 * c if compiled else casts + 24 + capping
        # The last chunk counts as a whole one, so that kernels depend on the number of chunks alone.
        kernels = KERNELS_OF_ROWS_COMPILED if compiled else KERNELS_OF_ROWS + kernels_of_capping
        kernels = KERNELS_OF_CHUNK + kernels * -(-self.chunk // LOSS_ROWS)
        return Cost(flops=flops, moved=(3 * c + between) * logits + added * head * chunks, kernels=kernels * chunks)


def _record_softcap(r: Recorder, logits: Value, size: Size, passing: Sequence[Value]) -> Value:
    """A quotient, tanh, which keeps its result, and a product; ``passing`` are the logits where they have no name."""
    gradients = (Gradient(size),)
    quotient, share, capped = Value(size), Value(size), Value(size)
    r.run(Operation("divide", (logits,), gradients, (quotient,)))
    r.run(Operation("tanh", (quotient,), gradients, (share,), saves=(share,)), passing=(quotient,))
    return r.run(Operation("multiply", (share,), gradients, (capped,)), passing=(share, *passing))
