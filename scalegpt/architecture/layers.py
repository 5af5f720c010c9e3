"""The layers of which parts consist, with their parameters and the operations that they run.

Symbols: T tokens of a sequence, H width of the residual stream, c bytes of an element in the compute dtype, r bytes of an
element in the residual stream. A layer records what the ``forward`` of the module of the same name in
:mod:`scalegpt.model` does, including how long its Python names keep tensors alive.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from scalegpt.architecture.operations import MATMULS, PASSED_ON, Cost, Gradient, Operation, Recorder, Size, Value
from scalegpt.architecture.parameters import Dim, Parameter
from scalegpt.units import BYTES

FP32 = BYTES["fp32"]

STATISTICS = FP32
"""Bytes of one statistic of a row: fp32 on a GPU. LayerNorm keeps mean and deviation, RMSNorm the root of the mean square
(torch's ``layer_norm_kernel.cu``)."""


@dataclass(frozen=True)
class Numerics:
    """The dtypes and settings that, with the model, decide the bytes of a step's tensors.

    Attributes:
        compute: c, bytes of an element in the compute dtype.
        residual: r, bytes of an element in the residual stream.
        weights: bytes of an element of a module's weights: 4 for fp32 weights that are cast where they are used, else c.
        kernel: the attention kernel.
        one_sequence: whether the micro batch is a single sequence.
        packed: whether documents are packed: each sequence then has its own positions, and a mask replaces the causal
            one.
    """

    compute: int
    residual: int
    weights: int
    kernel: str
    one_sequence: bool = False
    packed: bool = False

    @property
    def mixed(self) -> bool:
        """Whether the residual stream's dtype differs from the compute dtype."""
        return self.residual != self.compute


@dataclass(frozen=True)
class Layer:
    """A layer with a weight, and a bias if the model has biases.

    Attributes:
        name: the torch module's name inside its part of the model.
        part: the line of the parameter count under which the layer's parameters are counted.
        bias: whether the layer has a bias.
        dims: the weight's dimensions, as torch stores them: outputs first.
    """

    name: str
    part: str
    bias: bool
    dims: tuple[Dim, ...]

    def parameters(self) -> Iterator[Parameter]:
        """The layer's parameters: the weight, then the bias if it has one."""
        yield Parameter(f"{self.name}.weight", self.dims, self.part)
        if self.bias:
            yield Parameter(f"{self.name}.bias", self.dims[:1], self.part)


class Linear(Layer):
    """A linear layer: a matrix [outputs, inputs], and a bias if the model has biases."""

    def record(self, r: Recorder, x: Value, tokens: int, numerics: Numerics, *, passing: bool = False) -> Value:
        """Record the linear layer: [T, inputs] → [T, outputs].

        Autograd keeps the input and, if the weight is cast, the cast weight. The backward pass has two matmuls.

        Args:
            r: the recorder.
            x: the input.
            tokens: T, tokens of one sequence.
            numerics: the dtypes.
            passing: whether the caller keeps no reference to the input, so that it may be freed after the call.
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
            forward=Cost(flops=flops, kernels=1, fused_kernels=1, outputs=tokens * outputs),
            backward=Cost(flops=2 * flops, kernels=2, fused_kernels=2, outputs=tokens * inputs),
        )
        return r.run(operation, passing=(x,) if passing else ())


@dataclass(frozen=True)
class Norm(Layer):
    """LayerNorm over the residual stream, or RMSNorm, which keeps one number of each row instead of two.

    Attributes:
        is_rms: whether this is RMSNorm, which has no mean and no bias.
    """

    is_rms: bool = False

    def record(self, r: Recorder, x: Value, tokens: int, numerics: Numerics, *, follows_sum: bool = False) -> Value:
        """Record the norm: [T, H] in the residual stream's dtype → [T, H] in the compute dtype, with fp32 statistics.

        The weights are cast to the input's dtype, and autograd keeps the casts. ``follows_sum`` says that a residual
        sum comes directly before the norm. A compiled block fuses both, so the norm does not read its input from
        memory.
        """
        c, residual, width = numerics.compute, numerics.residual, self.dims[0].size
        numel = tokens * width
        stream, vectors = Size(residual * numel), 2 if self.bias else 1
        cast = residual != numerics.weights
        copies = tuple(Value(Size(fixed=residual * width)) for _ in range(vectors)) if cast else ()
        statistics = tuple(Value(Size(STATISTICS * tokens)) for _ in range(1 if self.is_rms else 2))
        moved, casting = float((residual + c) * numel), 2 * residual * numel if numerics.mixed else 0
        read_again = residual * numel if follows_sum else 0
        back, fused_back = float((6 * residual + 2 * c) * numel), float((3 * residual + c) * numel)
        y = r.run(
            Operation(
                self.name,
                (x,),
                (Gradient(stream),),
                (Value(stream), *statistics),
                copies=copies,
                saves=(x, *statistics, *copies),
                forward=Cost(moved=moved + casting, fused=moved - read_again, kernels=1),
                backward=Cost(moved=back, fused=fused_back, kernels=4, fused_kernels=2),
            )
        )
        return r.new("cast", y, Size(c * numel), stream, passing=True) if numerics.mixed else y


def record_dropout(r: Recorder, x: Value, numel: int, width: int) -> Value:
    """Record dropout of ``numel`` elements per sequence, ``width`` bytes each; autograd keeps a mask, 1 byte per element."""
    size, mask = Size(width * numel), Value(Size(numel))
    cost = Cost(moved=float((2 * width + 1) * numel), fused=float(numel))
    operation = Operation(
        "dropout", (x,), (Gradient(size),), (Value(size), mask), saves=(mask,), forward=cost, backward=cost
    )
    return r.run(operation, passing=(x,))


def record_sum(r: Recorder, x: Value, branch: Value, numel: int, numerics: Numerics) -> Value:
    """Record residual stream + branch, in the stream's dtype; the branch's gradient is cast to the compute dtype."""
    c, residual = numerics.compute, numerics.residual
    gradients = PASSED_ON, Gradient(Size(c * numel)) if numerics.mixed else PASSED_ON
    cost = Cost.moving(float((2 * residual + c) * numel))
    operation = Operation("residual sum", (x, branch), gradients, (Value(Size(residual * numel)),), forward=cost)
    return r.run(operation, passing=(branch,))


def record_gelu(r: Recorder, x: Value, numel: int, width: int) -> Value:
    """Record GELU of ``numel`` elements per sequence, ``width`` bytes each; autograd keeps the input."""
    size, once = Size(width * numel), float(width * numel)
    costs = Cost.moving(2 * once), Cost.moving(3 * once)
    gelu = Operation("gelu", (x,), (Gradient(size),), (Value(size),), saves=(x,), forward=costs[0], backward=costs[1])
    return r.run(gelu, passing=(x,))


def record_relu2(r: Recorder, x: Value, numel: int, width: int) -> Value:
    """Record ReLU, then a square, of ``numel`` elements per sequence, ``width`` bytes each; autograd keeps ReLU's result.

    The square's gradient, ``grad * (2 * input.pow(1))``, allocates two temporaries (torch, ``FunctionsManual.cpp:
    pow_backward``). A compiled block fuses ReLU and square into one pass over memory.
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


def record_gated(r: Recorder, x: Value, numel: int, width: int) -> Value:
    """Record the product of an activated gate and ``up``.

    Both have ``numel`` elements per sequence and are halves of ``x``.

    Autograd keeps ``x`` alone. Bytes moved per element of the product, in units of ``width``: forward, the activation reads
    and writes 1 each, and the product reads 2 and writes 1; backward, the activation again (2), its product with the
    gradient (3), the gradient's product with ``up`` (3), and the gate's gradient (3). A compiled block fuses each pass.
    """
    size, once = Size(width * numel), float(width * numel)
    product = Operation(
        "gated product",
        (x,),
        (Gradient(size.times(2)),),
        (Value(size),),
        saves=(x,),
        forward=Cost(moved=5 * once, fused=3 * once, kernels=2, fused_kernels=1),
        backward=Cost(moved=11 * once, fused=5 * once, kernels=4, fused_kernels=1),
    )
    return r.run(product, passing=(x,))


ACTIVATIONS: dict[str, Callable[[Recorder, Value, int, int], Value]] = {
    "gelu": record_gelu,
    "gelu_tanh": record_gelu,
    "relu2": record_relu2,
    "swiglu": record_gated,
    "geglu": record_gated,
}
"""Value of the setting ``activation`` → the function that records the operations between the feed-forward layer's
matmuls. Its arguments include the result's elements per sequence and the bytes of an element.
"""
