"""Operations on tensors, as PyTorch runs them eagerly: what each allocates, keeps for the backward pass, and computes.

A part of the model records its operations on a :class:`Recorder`, in the order and with the scopes of the Python code
that the module runs. The record is data: the planner simulates it forward and backward (:mod:`scalegpt.planner.memory.tape`),
and adds up its costs (:mod:`scalegpt.planner.time.work`).

Only the micro batch size B is open when a part records: a :class:`Size` is ``per_sequence``·B + ``fixed`` bytes. One
record therefore serves every B.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

Workspace = Callable[[int], Sequence[int]]
"""Micro batch size B → bytes of each temporary allocation of a kernel; all of them live at once."""

MATMULS, ATTENTION, ELEMENTWISE = "matmuls", "attention", "elementwise"


class Size(NamedTuple):
    """Bytes of a tensor for a micro batch of B sequences: ``per_sequence``·B + ``fixed``."""

    per_sequence: int = 0
    fixed: int = 0

    def at(self, batch: int) -> int:
        """The bytes at a micro batch of ``batch`` sequences."""
        return self.per_sequence * batch + self.fixed

    def times(self, factor: int) -> "Size":
        """This size times ``factor``."""
        return Size(self.per_sequence * factor, self.fixed * factor)


NOTHING = Size()


class Cost(NamedTuple):
    """The work of an operation's forward or backward pass, for one sequence.

    Attributes:
        flops: FLOPs of matrix products; a multiplication and an addition count as two.
        attention: FLOPs of fused attention kernels.
        moved: bytes that memory-bound kernels read and write in eager mode.
        fused: bytes that memory-bound kernels read and write in a compiled block.
        kernels: number of kernels started in eager mode.
        fused_kernels: number of kernels started in a compiled block.
        outputs: elements that matrix products write. Gradients of weights do not grow with the sequences and are
            counted elsewhere.
    """

    flops: float = 0.0
    attention: float = 0.0
    moved: float = 0.0
    fused: float = 0.0
    kernels: int = 0
    fused_kernels: int = 0
    outputs: float = 0.0

    @classmethod
    def moving(cls, moved: float, kernels: int = 1) -> "Cost":
        """The cost of moving ``moved`` bytes, whether or not the block is compiled."""
        return cls(moved=moved, fused=moved, kernels=kernels, fused_kernels=kernels)


FREE = Cost()


@dataclass(eq=False, slots=True)
class Value:
    """A tensor of the forward pass.

    Attributes:
        size: bytes of the tensor's own memory; 0 for a view.
        base: the tensor whose memory a view shares; None: the tensor is not a view.
    """

    size: Size = NOTHING
    base: "Value | None" = None

    @property
    def storage(self) -> "Value":
        """The tensor that owns the memory: this tensor, or the tensor behind it if it is a view."""
        value = self
        while value.base is not None:
            value = value.base
        return value


@dataclass(frozen=True, slots=True)
class Gradient:
    """The gradient that an operation's backward pass makes for one of its inputs.

    Attributes:
        size: bytes allocated for the gradient; None: nothing is allocated.
        reuses: if ``size`` is None, the saved result whose memory becomes the gradient; None: the incoming gradient is
            passed on unchanged.
    """

    size: Size | None = None
    reuses: Value | None = None


PASSED_ON = Gradient()


@dataclass(frozen=True, eq=False, slots=True)
class Operation:
    """One differentiable operation.

    Attributes:
        name: a label for people.
        inputs: the tensors to which gradients flow back.
        gradients: one for each input, in the order in which the backward pass allocates them.
        results: the result first, then the other tensors that the kernel returns (statistics, masks).
        part: :data:`MATMULS`, :data:`ATTENTION` or :data:`ELEMENTWISE`, under which the operation's time is counted.
        copies: weights cast to the compute dtype for this operation, alive while it runs.
        saves: inputs, results and copies that autograd keeps until the backward pass.
        parameter: the name, inside its part of the model, of the matrix with which the operation multiplies, or in
            which it looks up rows.
        weight: elements of this matrix; 0: the operation has no matrix. Its gradient is made before the gradients of
            the inputs.
        weight_gradient: a saved result whose memory becomes the matrix's gradient; None: the gradient is allocated.
        is_expensive: whether selective recompute keeps the results instead of computing them again.
        workspace: temporary allocations of the forward kernel.
        workspace_back: temporary allocations of the backward kernel, besides the gradients.
        forward: cost of the forward pass.
        backward: cost of the backward pass.
    """

    name: str
    inputs: tuple[Value, ...]
    gradients: tuple[Gradient, ...]
    results: tuple[Value, ...]
    _: KW_ONLY
    part: str = ELEMENTWISE
    copies: tuple[Value, ...] = ()
    saves: tuple[Value, ...] = ()
    parameter: str = ""
    weight: int = 0
    weight_gradient: Value | None = None
    is_expensive: bool = False
    workspace: Workspace | None = None
    workspace_back: Workspace | None = None
    forward: Cost = FREE
    backward: Cost = FREE


@dataclass(frozen=True, eq=False, slots=True)
class Release:
    """An entry of a :class:`Recorder`: one of a tensor's Python names goes out of scope."""

    value: Value


Entry = Operation | Release


class Recorder:
    """Records operations, and when the Python names of their tensors go out of scope.

    A result has a name until :meth:`release`, or until the scope that holds it ends. For example, a module's ``forward``
    holds its arguments and local names until it returns.
    """

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self._scopes: list[list[Value]] = []

    @property
    def operations(self) -> list[Operation]:
        """The recorded operations in order, without the releases."""
        return [entry for entry in self.entries if isinstance(entry, Operation)]

    def run(self, operation: Operation, *, passing: Sequence[Value] = ()) -> Value:
        """Record an operation and return its result.

        Args:
            operation: the operation.
            passing: inputs that Python frees after the call, since they are results of other calls and have no name.
        """
        self.entries.append(operation)
        for value in passing:
            self.release(value)
        return operation.results[0]

    def new(self, name: str, x: Value, size: Size, gradient: Size, *, passing: bool = False) -> Value:
        """Record an operation that saves nothing.

        Its result has ``size`` bytes, and the gradient of ``x`` has ``gradient`` bytes.
        """
        made = Operation(name, (x,), (Gradient(gradient),), (Value(size),))
        return self.run(made, passing=(x,) if passing else ())

    def release(self, value: Value) -> None:
        """Record that one of a tensor's Python names goes out of scope."""
        self.entries.append(Release(value))

    def hold(self, value: Value) -> Value:
        """Keep a tensor's name until the innermost scope ends; return the tensor."""
        self._scopes[-1].append(value)
        return value

    @contextmanager
    def scope(self) -> Iterator[None]:
        """A scope, which stands for a function body: the tensors held in the scope are released when it ends."""
        self._scopes.append([])
        yield
        for value in self._scopes.pop():
            self.release(value)
