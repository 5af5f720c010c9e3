"""The head and the cross entropy of its logits: their memory and work, over full logits or chunk by chunk.

The torch code is in :mod:`scalegpt.model.loss`. Symbols: n tokens of a micro batch, V vocabulary, H width, k tokens of a
chunk, c bytes of an element in the compute dtype.
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
"""Numbers of kernels that the loss starts: for full logits; for a chunk's matmuls; and for each :data:`LOSS_ROWS` rows
of a chunk between its matmuls, in eager mode and compiled.
"""

CAPPING = 52, 6
"""Bytes moved per logit, and number of kernels, that a soft cap adds in eager mode: a quotient, tanh and a product in
fp32, each with its derivative. The chunked loss already has fp32 logits, so there the cap adds 8 bytes and 2 kernels
less.
"""


@dataclass(frozen=True)
class LossPart:
    """The head and the loss.

    Attributes:
        model: the model's configuration.
        kind: the loss, ``full`` or ``chunked``.
        chunk: k, the number of tokens whose logits exist at once in the chunked loss.
    """

    model: ModelConfig
    kind: str
    chunk: int

    @classmethod
    def of(cls, model: ModelConfig, train: TrainConfig) -> "LossPart":
        """The head and the loss of a run with these settings."""
        return cls(model, train.loss, train.loss_chunk)

    @property
    def has_cap(self) -> bool:
        """Whether logits are soft-capped."""
        return self.model.logit_softcap is not None

    def record(self, r: Recorder, hidden: Value, tokens: int, numerics: Numerics) -> Value:
        """Record hidden states [T, H] → the mean loss, a scalar whose bytes are not counted."""
        return (self._record_full if self.kind == "full" else self._record_chunked)(r, hidden, tokens, numerics)

    def _record_full(self, r: Recorder, hidden: Value, tokens: int, numerics: Numerics) -> Value:
        """Record the logits, their fp32 copy and the log-softmax. Autograd keeps only the log-softmax."""
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
        """Record the chunked loss, with one chunk's logits at a time.

        The loss's forward pass already computes the gradients of the hidden states and of the head's matrix. Autograd keeps
        these gradients instead of the hidden states.
        """
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
        """Bytes that a chunk allocates: its logits, and the larger of fp32 copies of rows and a gradient of the head."""
        chunk, vocabulary = min(self.chunk, tokens), self.model.vocab_size
        logits, rows = c * chunk * vocabulary, FP32 * min(LOSS_ROWS, chunk) * vocabulary
        part = c * vocabulary * self.model.n_embd if c != FP32 else 0
        copies = 2 if self.has_cap else int(c != FP32)  # fp32 copies; with a cap, the capped rows and their tanh
        return [logits, *([rows] * copies if copies * rows > part else [part])]

    def cost(self, tokens: int, numerics: Numerics, *, compiled: bool) -> Cost:
        """The work of head and loss for one micro batch, forward and backward pass together.

        Bytes moved per logit: one matmul writes the logit, and two read it or its gradient (3c). Between the matmuls
        the chunked loss casts to fp32 (c + 4), takes the maximum (4) and the softmax in place (8), looks for the
        softmax's maximum (4), clears the rows of ignored targets (8) and casts back (4 + c). A compiled chunked loss
        reads logits twice and writes them once (3c). The full loss casts to fp32 (c + 4), takes the log-softmax (8),
        makes the gradients of the mean (4) and of the log-softmax (12), and casts back (4 + c). In fp32 nothing is
        cast. Each chunk adds V·H numbers to the head's fp32 gradient. The matmuls write logits, the gradient of the
        hidden states, and for each chunk a gradient of the head.

        Args:
            tokens: n, tokens of the micro batch.
            numerics: the dtypes.
            compiled: whether the loss is compiled.
        """
        c, model = numerics.compute, self.model
        logits, head = float(tokens) * model.vocab_size, float(model.vocab_size) * model.n_embd
        flops, written = 6.0 * logits * model.n_embd, logits + float(tokens) * model.n_embd
        capping, kernels_of_capping = CAPPING if self.has_cap else (0, 0)
        casts = 2 * (c + FP32) if c != FP32 else 0
        if self.kind == "full":
            moved = (3 * c + casts + 24 + capping) * logits + 2 * c * head
            kernels = KERNELS_OF_FULL_LOSS + kernels_of_capping
            return Cost(flops=flops, moved=moved, kernels=kernels, outputs=written + head)
        if self.has_cap and casts:
            capping, kernels_of_capping = capping - 8, kernels_of_capping - 2
        chunks = -(-tokens // self.chunk)
        added = 2 * c + 8 if c != FP32 else 8
        between = 3 * c if compiled else casts + 24 + capping
        # The last chunk counts as a whole one, so that kernels depend on the number of chunks alone.
        kernels = KERNELS_OF_ROWS_COMPILED if compiled else KERNELS_OF_ROWS + kernels_of_capping
        kernels = KERNELS_OF_CHUNK + kernels * -(-self.chunk // LOSS_ROWS)
        moved = (3 * c + between) * logits + added * head * chunks
        return Cost(flops=flops, moved=moved, kernels=kernels * chunks, outputs=written + head * chunks)


def _record_softcap(r: Recorder, logits: Value, size: Size, passing: Sequence[Value]) -> Value:
    """Record the soft cap of the logits: divide, tanh, multiply. Autograd keeps the result of tanh.

    ``passing`` holds the logits if no Python name refers to them, so that they may be freed after the cap.
    """
    gradients = (Gradient(size),)
    quotient, share, capped = Value(size), Value(size), Value(size)
    r.run(Operation("divide", (logits,), gradients, (quotient,)))
    r.run(Operation("tanh", (quotient,), gradients, (share,), saves=(share,)), passing=(quotient,))
    return r.run(Operation("multiply", (share,), gradients, (capped,)), passing=(share, *passing))
