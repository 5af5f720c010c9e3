"""The parts of a decoder (embeddings, block, head), with their parameters and the operations that they run.

Symbols: T tokens of a sequence, H width of the residual stream, F width of the feed-forward layer. A part records what the
``forward`` of the module of the same name in :mod:`scalegpt.model` does, including how long its Python names keep
tensors alive.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from scalegpt.architecture import kernels
from scalegpt.architecture.attention import AttentionShape, record_attention
from scalegpt.architecture.heads import HeadNorm, record_heads
from scalegpt.architecture.layers import ACTIVATIONS, FP32, Layer, Linear, Norm, Numerics, record_dropout, record_sum
from scalegpt.architecture.operations import PASSED_ON, Gradient, Operation, Recorder, Size, Value
from scalegpt.architecture.parameters import Dim, Parameter
from scalegpt.config import ModelConfig

TOKENS, POSITIONS, HEAD = "wte.weight", "wpe.weight", "head.weight"
"""Names of the matrices outside the blocks: token embedding (which the head may share), position embedding, untied head."""


def width_of(model: ModelConfig) -> Dim:
    """H, the width of the residual stream."""
    return Dim.of("H", model.n_embd)


def inner_of(model: ModelConfig) -> Dim:
    """F, the width of the feed-forward layer, as a dimension. Its symbol is 4·H if that is its width."""
    return width_of(model).times(4) if model.inner_width == 4 * model.n_embd else Dim.of("F", model.inner_width)


def heads_of(model: ModelConfig) -> tuple[Dim, Dim]:
    """The width of all queries together, a·D, and of all keys together, k·D; each is H if it equals H by definition."""
    if model.head_size is None and model.kv_heads == model.n_head:
        return width_of(model), width_of(model)
    head, keys = Dim.of("D", model.head_width), Dim.of("k", model.kv_heads)
    queries = width_of(model) if model.head_size is None else Dim.of("a", model.n_head).times(head)
    return queries, keys.times(head)


def vocabulary_of(model: ModelConfig) -> Dim:
    """V, the size of the vocabulary."""
    return Dim.of("V", model.vocab_size)


def norm_of(model: ModelConfig, name: str, part: str) -> Norm:
    """A norm over the residual stream; ``name`` and ``part`` as in :class:`~scalegpt.architecture.layers.Layer`."""
    is_rms = model.norm == "rmsnorm"
    return Norm(name, part, model.has_bias and not is_rms, (width_of(model),), is_rms)


class Part:
    """A part of the model: layers with parameters, and the operations that it records."""

    layers: tuple[Layer, ...] = ()

    def parameters(self) -> Iterator[Parameter]:
        """The parameters of the part's layers, in the torch module's order."""
        for layer in self.layers:
            yield from layer.parameters()


class Attention(Part):
    """Causal self-attention: one matmul for queries, keys and values, attention, and a projection.

    The rows of the QKV matrix are those of all query heads, then of all key heads, then of all value heads.
    """

    def __init__(self, model: ModelConfig) -> None:
        self.model, width = model, width_of(model)
        queries, keys = heads_of(model)
        rows = queries.plus(keys.times(2))
        self.qkv = Linear("attn.qkv", "attention, qkv", model.has_qkv_bias, (rows, width))
        self.proj = Linear("attn.proj", "attention, proj", model.has_bias, (width, queries))
        head = (Dim.of("D", model.head_width),)
        names = ("attn.q_norm", "attn.k_norm") if model.qk_norm else ()
        self.norms = tuple(HeadNorm(name, "attention, norms", False, head) for name in names)
        self.layers = self.qkv, self.proj, *self.norms

    def record(self, r: Recorder, x: Value, tokens: int, numerics: Numerics) -> Value:
        """Record attention with both projections: normed hidden states [T, H] → the residual branch [T, H]."""
        shape = AttentionShape.of(self.model, tokens, numerics)
        with r.scope():
            r.hold(x)
            q, k, v = record_heads(r, shape, self.qkv.record(r, x, tokens, numerics), self.norms, numerics)
            y = record_attention(r, numerics.kernel, shape, q, k, v)
            return self.proj.record(r, y, tokens, numerics)


class FeedForward(Part):
    """The feed-forward layer: a matmul from H to F, or to 2·F with a gate, the activation, and a matmul from F to H."""

    def __init__(self, model: ModelConfig) -> None:
        self.model, width, inner = model, width_of(model), inner_of(model)
        rows = inner.times(2) if model.is_gated else inner
        self.fc = Linear("mlp.fc", "feed-forward, fc", model.has_bias, (rows, width))
        self.proj = Linear("mlp.proj", "feed-forward, proj", model.has_bias, (width, inner))
        self.layers = self.fc, self.proj

    def record(self, r: Recorder, x: Value, tokens: int, numerics: Numerics) -> Value:
        """Record the feed-forward layer: normed hidden states [T, H] → the residual branch [T, H]."""
        with r.scope():
            r.hold(x)
            wide = self.fc.record(r, x, tokens, numerics)
            numel = tokens * self.model.inner_width
            active = ACTIVATIONS[self.model.activation](r, wide, numel, numerics.compute)
            return self.proj.record(r, active, tokens, numerics, passing=True)


class Block(Part):
    """One transformer block: attention, then feed-forward, each on a normed copy of the residual stream.

    In a parallel block both branches read the block's input. A compiled block, parallel or not, fuses the second norm with
    the residual sum before it, so that the norm does not read its input from memory again.
    """

    def __init__(self, model: ModelConfig) -> None:
        self.model, self.attn, self.mlp = model, Attention(model), FeedForward(model)
        self.ln1, self.ln2 = (norm_of(model, name, "norms") for name in ("ln1", "ln2"))
        self.layers = self.ln1, *self.attn.layers, self.ln2, *self.mlp.layers

    def record(self, r: Recorder, x: Value, tokens: int, numerics: Numerics) -> Value:
        """Record one block: the residual stream [T, H] → the residual stream [T, H]."""
        numel = tokens * self.model.n_embd
        branch = self.attn.record(r, self.ln1.record(r, x, tokens, numerics), tokens, numerics)
        middle = record_sum(r, x, self._drop(r, branch, numel, numerics), numel, numerics)
        read = x if self.model.parallel_block else middle
        branch = self.mlp.record(r, self.ln2.record(r, read, tokens, numerics, follows_sum=True), tokens, numerics)
        result = record_sum(r, middle, self._drop(r, branch, numel, numerics), numel, numerics)
        r.release(middle)
        return result

    def _drop(self, r: Recorder, x: Value, numel: int, numerics: Numerics) -> Value:
        return record_dropout(r, x, numel, numerics.compute) if self.model.dropout else x


@dataclass(frozen=True)
class Embedding:
    """The token embedding and, if positions are learned, the position embedding, which is added to it."""

    model: ModelConfig

    def parameters(self) -> Iterator[Parameter]:
        """The tables: token embedding [V, H] and, if positions are learned, position embedding [T, H]."""
        width = width_of(self.model)
        yield Parameter(TOKENS, (vocabulary_of(self.model), width), "token embedding")
        if self.model.position == "learned":
            yield Parameter(POSITIONS, (Dim.of("T", self.model.block_size), width), "position embedding")

    def record(self, r: Recorder, tokens: int, numerics: Numerics) -> Value:
        """Record the lookups and their sum: ids [T] → the residual stream [T, H].

        The looked-up rows, and the dense gradients of the tables, have the weights' dtype.
        """
        model, c, residual = self.model, numerics.compute, numerics.residual
        numel = tokens * model.n_embd
        with r.scope():
            x = self._look_up(r, TOKENS, model.vocab_size, Size(numel), numerics)
            if model.position == "learned":
                table, gradient = self._positions(r, tokens, numel, numerics)
                gradients = PASSED_ON, gradient
                x = r.run(Operation("sum", (x, table), gradients, (Value(Size(c * numel)),)), passing=(x, table))
            if numerics.mixed:
                x = r.new("cast", x, Size(residual * numel), Size(c * numel), passing=True)
            return record_dropout(r, x, numel, residual) if model.dropout else x

    def _positions(self, r: Recorder, tokens: int, numel: int, numerics: Numerics) -> tuple[Value, Gradient]:
        """Record the lookup of the positions, once for all sequences; return the rows and their gradient in the sum.

        Packed sequences have their own positions, which :mod:`scalegpt.architecture.packing` counts. The gradient of
        their rows is the gradient of the sum.
        """
        rows = self.model.block_size
        if numerics.packed:
            return self._look_up(r, POSITIONS, rows, Size(numel), numerics), PASSED_ON
        positions = Value(Size(fixed=8 * tokens))
        r.hold(r.run(Operation("positions", (), (), (positions,))))
        table = self._look_up(r, POSITIONS, rows, Size(fixed=numel), numerics, saves=(positions,))
        return table, Gradient(Size(fixed=numerics.compute * numel))

    def _look_up(
        self, r: Recorder, name: str, rows: int, numel: Size, numerics: Numerics, saves: tuple[Value, ...] = ()
    ) -> Value:
        """Record a lookup of ``numel`` elements in a table of ``rows`` rows, and the cast to the compute dtype."""
        width, size = self.model.n_embd, numel.times(numerics.weights)

        def summing(batch: int) -> list[int]:
            return [*kernels.sizes(kernels.embedding_backward(numel.at(batch) // width, rows, width))]

        x = r.run(
            Operation(
                name, (), (), (Value(size),), saves=saves, parameter=name, weight=rows * width, workspace_back=summing
            )
        )
        if numerics.weights != numerics.compute:
            x = r.new("cast", x, numel.times(numerics.compute), size, passing=True)
        return x


def rotary_table(model: ModelConfig) -> int:
    """Bytes of the table of rotary positions, fp32 [T, R], which all blocks share; 0 without rotary positions."""
    return FP32 * model.block_size * model.rotary_width if model.position == "rope" else 0


class Head(Part):
    """The final norm, and the matrix that turns hidden states into logits; the loss applies this matrix."""

    def __init__(self, model: ModelConfig) -> None:
        self.norm = norm_of(model, "ln_f", "final norm")
        self.layers = (self.norm,) if model.tie_head else (self.norm, matrix_of_head(model))


def matrix_of_head(model: ModelConfig) -> Linear:
    """The head as a linear layer [V, H]; its matrix is the head's own or the token embedding's."""
    return Linear("head", "head", False, (vocabulary_of(model), width_of(model)))
