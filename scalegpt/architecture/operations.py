"""Operations on tensors, as PyTorch runs them eagerly: what each allocates, keeps for the backward pass, and computes.

A part of the model records its operations on a :class:`Recorder`, in the order and with the scopes of the Python code
that the module runs. The record is data: the planner plays it forward and backward (:mod:`scalegpt.planner.memory.tape`),
and adds up its costs (:mod:`scalegpt.planner.time.work`).

Everything but the micro batch B is fixed when a part records: a :class:`Size` is ``per_sequence``·B + ``fixed`` bytes, so
that one record serves each B.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

Workspace = Callable[[int], Sequence[int]]
"""Micro batch → bytes of the allocations that a kernel makes for itself, all live together."""

MATMULS, ATTENTION, ELEMENTWISE = "matmuls", "attention", "elementwise"


class Size(NamedTuple):
    """Bytes of a tensor for a micro batch of B sequences: ``per_sequence``·B + ``fixed``."""

    per_sequence: int = 0
    fixed: int = 0

    def at(self, batch: int) -> int:
        """The bytes for a micro batch."""
        return self.per_sequence * batch + self.fixed

    def times(self, factor: int) -> "Size":
        """A multiple."""
        return Size(self.per_sequence * factor, self.fixed * factor)


NOTHING = Size()


class Cost(NamedTuple):
    """The work of one pass through an operation, for one sequence.

    Attributes:
        flops: in matrix products, a multiplication and an addition being two.
        attention: the same in fused attention kernels.
        moved: bytes that kernels which only move data read and write.
        fused: the same in a compiled block.
        kernels: started in eager mode.
        fused_kernels: started in a compiled block.
    """

    flops: float = 0.0
    attention: float = 0.0
    moved: float = 0.0
    fused: float = 0.0
    kernels: int = 0
    fused_kernels: int = 0

    @classmethod
    def moving(cls, moved: float, kernels: int = 1) -> "Cost":
        """Bytes that are moved whether or not the block is compiled."""
        return cls(moved=moved, fused=moved, kernels=kernels, fused_kernels=kernels)


FREE = Cost()


@dataclass(eq=False, slots=True)
class Value:
    """A tensor of the forward pass.

    Attributes:
        size: of its memory; a view has none of its own.
        base: the tensor whose memory a view shares.
    """

    size: Size = NOTHING
    base: "Value | None" = None

    @property
    def storage(self) -> "Value":
        """The tensor that owns the memory."""
        value = self
        while value.base is not None:
            value = value.base
        return value


@dataclass(frozen=True, slots=True)
class Gradient:
    """The gradient that an operation's backward pass makes for one of its inputs.

    Attributes:
        size: of new memory; None: the incoming gradient itself is passed on.
        reuses: a saved result that becomes the gradient in place.
    """

    size: Size | None = None
    reuses: Value | None = None


PASSED_ON = Gradient()


@dataclass(frozen=True, eq=False, slots=True)
class Operation:
    """One differentiable operation.

    Attributes:
        name: for readers.
        inputs: the tensors that gradients flow back to.
        gradients: one for each input, in the order in which the backward pass allocates them.
        results: the result first, then what the kernel returns beside it (statistics, masks).
        part: :data:`MATMULS`, :data:`ATTENTION` or :data:`ELEMENTWISE`: where its time is counted.
        copies: weights cast to the compute dtype for this operation, alive while it runs.
        saves: inputs, results and copies that autograd keeps until the backward pass.
        parameter: the name of the matrix that it multiplies by or looks up, inside its part of the model.
        weight: elements of that matrix, whose gradient is made before the inputs'; 0: none.
        weight_gradient: a saved result that becomes that gradient in place; None: it is made anew.
        is_expensive: selective recompute keeps its results.
        workspace: of the forward kernel.
        workspace_back: of the backward kernel, beside the gradients.
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
    """The last Python name of a tensor is gone."""

    value: Value


Entry = Operation | Release


class Recorder:
    """Records operations and the lifetimes of Python's names.

    A result is alive until :meth:`release`, or until the scope that holds it ends: a module's ``forward`` holds its
    arguments and local names until it returns.
    """

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self._scopes: list[list[Value]] = []

    @property
    def operations(self) -> list[Operation]:
        """Without the releases."""
        return [entry for entry in self.entries if isinstance(entry, Operation)]

    def run(self, operation: Operation, *, passing: Sequence[Value] = ()) -> Value:
        """Record an operation and return its result.

        Args:
            operation: the operation.
            passing: inputs without a name, such as another call's result, which Python drops when the call is over.
        """
        self.entries.append(operation)
        for value in passing:
            self.release(value)
        return operation.results[0]

    def new(self, name: str, x: Value, size: Size, gradient: Size, *, passing: bool = False) -> Value:
        """Record an operation that makes one tensor of another, each pass a new one, and saves nothing."""
        made = Operation(name, (x,), (Gradient(gradient),), (Value(size),))
        return self.run(made, passing=(x,) if passing else ())

    def release(self, value: Value) -> None:
        """Drop the last name of a tensor."""
        self.entries.append(Release(value))

    def hold(self, value: Value) -> Value:
        """Keep a tensor until the innermost scope ends."""
        self._scopes[-1].append(value)
        return value

    @contextmanager
    def scope(self) -> Iterator[None]:
        """A function body: what it holds is released when it returns."""
        self._scopes.append([])
        yield
        for value in self._scopes.pop():
            self.release(value)
