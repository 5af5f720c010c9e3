"""The layers that parts are made of: what parameters each has, and what operations it runs.

Symbols: T tokens of a sequence, H width of the residual stream; c bytes of the compute dtype, r of the residual stream's.
What a layer records follows the ``forward`` of the module of the same name in :mod:`scalegpt.model.gpt`, with Python's
scopes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from scalegpt.architecture.operations import MATMULS, PASSED_ON, Cost, Gradient, Operation, Recorder, Size, Value
from scalegpt.architecture.parameters import Dim, Parameter
from scalegpt.units import BYTES

FP32 = BYTES["fp32"]

STATISTICS = FP32
"""Bytes of a norm's mean and of its deviation, which are fp32 on a GPU (torch's ``layer_norm_kernel.cu``)."""


@dataclass(frozen=True)
class Numerics:
    """What decides the bytes of a step's tensors, besides the model.

    Attributes:
        compute: bytes of the compute dtype, c.
        residual: bytes of the residual stream's dtype, r.
        weights: bytes of the weights as modules find them: 4 where they are fp32 and cast where they are used, else c.
        kernel: of attention.
        one_sequence: whether the micro batch is 1.
    """

    compute: int
    residual: int
    weights: int
    kernel: str
    one_sequence: bool = False

    @property
    def mixed(self) -> bool:
        """Whether the residual stream has another dtype than the computation."""
        return self.residual != self.compute


@dataclass(frozen=True)
class Layer:
    """A weight, and a bias where the model has them.

    Attributes:
        name: the module's own, inside its part of the model.
        part: as the calculator calls it.
        bias: whether there is one.
        dims: of the weight, as torch stores it: outputs first.
    """

    name: str
    part: str
    bias: bool
    dims: tuple[Dim, ...]

    def parameters(self) -> Iterator[Parameter]:
        """The weight, then the bias."""
        yield Parameter(f"{self.name}.weight", self.dims, self.part)
        if self.bias:
            yield Parameter(f"{self.name}.bias", self.dims[:1], self.part)


class Linear(Layer):
    """A matrix [outputs, inputs], and a bias."""

    def record(self, r: Recorder, x: Value, tokens: int, numerics: Numerics, *, passing: bool = False) -> Value:
        """[T, inputs] → [T, outputs]. The input and the weight's copy are kept; the backward pass has two matmuls.

        Args:
            r: where.
            x: the input.
            tokens: T, of one sequence.
            numerics: the dtypes.
            passing: the input has no other name.
        """
        c, (outputs, inputs) = numerics.compute, (dim.size for dim in self.dims)
        numel = inputs * outputs
        copies = (Value(Size(fixed=c * numel)),) if numerics.weights != c else ()
        flops = 2.0 * tokens * numel
        operation = Operation(
            self.name,
            (x,),
            (Gradient(Size(c * tokens * inputs)),),
            (Value(Size(c * tokens * outputs)),),
            part=MATMULS,
            copies=copies,
            saves=(x, *copies),
            parameter=f"{self.name}.weight",
            weight=numel,
            is_expensive=True,
            forward=Cost(flops=flops, kernels=1, fused_kernels=1),
            backward=Cost(flops=2 * flops, kernels=2, fused_kernels=2),
        )
        return r.run(operation, passing=(x,) if passing else ())


class Norm(Layer):
    """LayerNorm over the residual stream."""

    def record(self, r: Recorder, x: Value, tokens: int, numerics: Numerics, *, follows_sum: bool = False) -> Value:
        """[T, H] in the stream's dtype → [T, H] in the compute dtype, statistics in fp32.

        A norm casts its weights to the input's dtype, and autograd keeps the copies. Compiled, one that follows a sum
        finds its input on the chip.
        """
        c, residual, width = numerics.compute, numerics.residual, self.dims[0].size
        numel = tokens * width
        stream, vectors = Size(residual * numel), 2 if self.bias else 1
        cast = residual != numerics.weights
        copies = tuple(Value(Size(fixed=residual * width)) for _ in range(vectors)) if cast else ()
        mean, deviation = Value(Size(STATISTICS * tokens)), Value(Size(STATISTICS * tokens))
        moved, casting = float((residual + c) * numel), 2 * residual * numel if numerics.mixed else 0
        read_again = residual * numel if follows_sum else 0
        back, fused_back = float((6 * residual + 2 * c) * numel), float((3 * residual + c) * numel)
        y = r.run(
            Operation(
                self.name,
                (x,),
                (Gradient(stream),),
                (Value(stream), mean, deviation),
                copies=copies,
                saves=(x, mean, deviation, *copies),
                forward=Cost(moved=moved + casting, fused=moved - read_again, kernels=1),
                backward=Cost(moved=back, fused=fused_back, kernels=4, fused_kernels=2),
            )
        )
        return r.new("cast", y, Size(c * numel), stream, passing=True) if numerics.mixed else y


def record_dropout(r: Recorder, x: Value, numel: int, width: int) -> Value:
    """Dropout of ``numel`` elements of ``width`` bytes a sequence; keeps a mask of one byte each."""
    size, mask = Size(width * numel), Value(Size(numel))
    cost = Cost(moved=float((2 * width + 1) * numel), fused=float(numel))
    operation = Operation(
        "dropout", (x,), (Gradient(size),), (Value(size), mask), saves=(mask,), forward=cost, backward=cost
    )
    return r.run(operation, passing=(x,))


def record_sum(r: Recorder, x: Value, branch: Value, numel: int, numerics: Numerics) -> Value:
    """The residual stream plus a branch, in the stream's dtype; the branch's gradient is cast to its own."""
    c, residual = numerics.compute, numerics.residual
    gradients = PASSED_ON, Gradient(Size(c * numel)) if numerics.mixed else PASSED_ON
    cost = Cost.moving(float((2 * residual + c) * numel))
    operation = Operation("residual sum", (x, branch), gradients, (Value(Size(residual * numel)),), forward=cost)
    return r.run(operation, passing=(branch,))


def record_gelu(r: Recorder, x: Value, numel: int, width: int) -> Value:
    """GELU of ``numel`` elements of ``width`` bytes a sequence; keeps its input."""
    size, once = Size(width * numel), float(width * numel)
    costs = Cost.moving(2 * once), Cost.moving(3 * once)
    gelu = Operation("gelu", (x,), (Gradient(size),), (Value(size),), saves=(x,), forward=costs[0], backward=costs[1])
    return r.run(gelu, passing=(x,))


def record_relu2(r: Recorder, x: Value, numel: int, width: int) -> Value:
    """ReLU, which keeps its result, and its square, which keeps the same.

    The square's gradient is ``grad * (2 * input.pow(1))``, with two temporaries (torch, ``FunctionsManual.cpp:
    pow_backward``). Compiled, both are one pass.
    """
    size, once = Size(width * numel), float(width * numel)
    gradients, positive = (Gradient(size),), Value(size)
    costs = Cost.moving(2 * once), Cost.moving(3 * once)
    r.run(Operation("relu", (x,), gradients, (positive,), saves=(positive,), forward=costs[0], backward=costs[1]))
    square = Operation(
        "square",
        (positive,),
        gradients,
        (Value(size),),
        saves=(positive,),
        workspace_back=lambda batch: [size.at(batch), size.at(batch)],
        forward=Cost(moved=2 * once, kernels=1),
        backward=Cost(moved=7 * once, kernels=3),
    )
    return r.run(square, passing=(positive, x))


ACTIVATIONS: dict[str, Callable[[Recorder, Value, int, int], Value]] = {
    "gelu": record_gelu,
    "gelu_tanh": record_gelu,
    "relu2": record_relu2,
}
"""What the feed-forward layer's activation records, by the setting of that name."""
