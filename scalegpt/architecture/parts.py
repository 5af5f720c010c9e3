"""The parts of a decoder: embeddings, block, head; what parameters each has, and what operations it runs.

Symbols: T tokens of a sequence, H width of the residual stream, F width of the feed-forward layer. What a part records
follows the ``forward`` of the module of the same name in :mod:`scalegpt.model.gpt`, with Python's scopes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from scalegpt.architecture import kernels
from scalegpt.architecture.attention import AttentionShape, record_attention, record_heads
from scalegpt.architecture.layers import ACTIVATIONS, Linear, Norm, Numerics, record_dropout, record_sum
from scalegpt.architecture.operations import PASSED_ON, Gradient, Operation, Recorder, Size, Value
from scalegpt.architecture.parameters import Dim, Parameter
from scalegpt.config import ModelConfig

TOKENS, POSITIONS, HEAD = "wte.weight", "wpe.weight", "head.weight"
"""Parameters outside the blocks: the token embedding, which the head may share, position embedding, and an untied head."""


def width_of(model: ModelConfig) -> Dim:
    """H, the width of the residual stream."""
    return Dim(model.n_embd, 1, "H")


def vocabulary_of(model: ModelConfig) -> Dim:
    """V."""
    return Dim(model.vocab_size, 1, "V")


@dataclass(frozen=True)
class Attention:
    """Causal multi-head self-attention: one matmul for queries, keys and values, attention, and a projection."""

    model: ModelConfig

    @property
    def qkv(self) -> Linear:
        """H → 3H."""
        width = width_of(self.model)
        return Linear("attn.qkv", "attention, qkv", width, width.times(3), self.model.bias)

    @property
    def proj(self) -> Linear:
        """H → H."""
        width = width_of(self.model)
        return Linear("attn.proj", "attention, proj", width, width, self.model.bias)

    def parameters(self) -> Iterator[Parameter]:
        """Those of both projections."""
        yield from self.qkv.parameters()
        yield from self.proj.parameters()

    def record(self, r: Recorder, x: Value, tokens: int, numerics: Numerics) -> Value:
        """[T, H] → [T, H]."""
        model, c = self.model, numerics.compute
        shape = AttentionShape(tokens, model.n_head, model.head_size, c, model.dropout > 0, numerics.one_sequence)
        with r.scope():
            r.hold(x)
            qkv = r.hold(self.qkv.record(r, x, tokens, numerics))
            q, k, v = record_heads(r, numerics.kernel, shape, qkv)
            y = record_attention(r, numerics.kernel, shape, q, k, v)
            return self.proj.record(r, y, tokens, numerics)


@dataclass(frozen=True)
class FeedForward:
    """H → 4H → activation → H."""

    model: ModelConfig

    @property
    def fc(self) -> Linear:
        """H → F."""
        width = width_of(self.model)
        return Linear("mlp.fc", "feed-forward, fc", width, width.times(4), self.model.bias)

    @property
    def proj(self) -> Linear:
        """F → H."""
        width = width_of(self.model)
        return Linear("mlp.proj", "feed-forward, proj", width.times(4), width, self.model.bias)

    def parameters(self) -> Iterator[Parameter]:
        """Those of both projections."""
        yield from self.fc.parameters()
        yield from self.proj.parameters()

    def record(self, r: Recorder, x: Value, tokens: int, numerics: Numerics) -> Value:
        """[T, H] → [T, H]."""
        with r.scope():
            r.hold(x)
            wide = self.fc.record(r, x, tokens, numerics)
            numel = tokens * self.fc.outputs.size
            active = ACTIVATIONS[self.model.activation](r, wide, numel, numerics.compute)
            return self.proj.record(r, active, tokens, numerics, passing=True)


@dataclass(frozen=True)
class Block:
    """One transformer block: attention, then feed-forward, each on a normed copy of the residual stream.

    In a parallel block both read the block's input. Compiled, the second norm finds that on the chip too.
    """

    model: ModelConfig

    def parameters(self) -> Iterator[Parameter]:
        """In the module's order."""
        yield from self._norm("ln1").parameters()
        yield from Attention(self.model).parameters()
        yield from self._norm("ln2").parameters()
        yield from FeedForward(self.model).parameters()

    def record(self, r: Recorder, x: Value, tokens: int, numerics: Numerics) -> Value:
        """The residual stream [T, H] → the residual stream."""
        numel = tokens * self.model.n_embd
        branch = Attention(self.model).record(r, self._norm("ln1").record(r, x, tokens, numerics), tokens, numerics)
        middle = record_sum(r, x, self._drop(r, branch, numel, numerics), numel, numerics)
        read = x if self.model.parallel_block else middle
        normed = self._norm("ln2").record(r, read, tokens, numerics, follows_sum=True)
        branch = FeedForward(self.model).record(r, normed, tokens, numerics)
        result = record_sum(r, middle, self._drop(r, branch, numel, numerics), numel, numerics)
        r.release(middle)
        return result

    def _norm(self, name: str) -> Norm:
        return Norm(name, "norms", width_of(self.model), self.model.bias)

    def _drop(self, r: Recorder, x: Value, numel: int, numerics: Numerics) -> Value:
        return record_dropout(r, x, numel, numerics.compute) if self.model.dropout else x


@dataclass(frozen=True)
class Embedding:
    """Token and position embeddings, and their sum."""

    model: ModelConfig

    def parameters(self) -> Iterator[Parameter]:
        """The two tables."""
        width = width_of(self.model)
        yield Parameter(TOKENS, (vocabulary_of(self.model), width), "token embedding")
        yield Parameter(POSITIONS, (Dim(self.model.block_size, 1, "T"), width), "position embedding")

    def record(self, r: Recorder, tokens: int, numerics: Numerics) -> Value:
        """Ids → the residual stream [T, H]. The lookups are in the weights' dtype, and their gradients dense."""
        model, c, residual = self.model, numerics.compute, numerics.residual
        numel = tokens * model.n_embd
        with r.scope():
            positions = Value(Size(fixed=8 * tokens))
            r.hold(r.run(Operation("positions", (), (), (positions,))))
            token = self._look_up(r, TOKENS, model.vocab_size, Size(numel), numerics)
            table = self._look_up(r, POSITIONS, model.block_size, Size(fixed=numel), numerics, saves=(positions,))
            gradients = PASSED_ON, Gradient(Size(fixed=c * numel))
            x = r.run(Operation("sum", (token, table), gradients, (Value(Size(c * numel)),)))
            if numerics.mixed:
                x = r.new("cast", x, Size(residual * numel), Size(c * numel), passing=True)
            return record_dropout(r, x, numel, residual) if model.dropout else x

    def _look_up(
        self, r: Recorder, name: str, rows: int, numel: Size, numerics: Numerics, saves: tuple[Value, ...] = ()
    ) -> Value:
        """Rows of a table, cast to the compute dtype; ``numel`` elements."""
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
        return r.hold(x)


@dataclass(frozen=True)
class Head:
    """The final norm, and the matrix that turns hidden states into logits, which the loss applies."""

    model: ModelConfig

    @property
    def norm(self) -> Norm:
        """The norm before the head."""
        return Norm("ln_f", "final norm", width_of(self.model), self.model.bias)

    def parameters(self) -> Iterator[Parameter]:
        """A head that shares the token embedding's matrix has none of its own."""
        yield from self.norm.parameters()
        if not self.model.tie_head:
            yield Parameter(HEAD, (vocabulary_of(self.model), width_of(self.model)), "head")
