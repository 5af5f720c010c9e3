"""Operations on tensors, as PyTorch runs them eagerly: what each allocates, keeps for the backward pass, and computes.

A part of the model records its operations on a :class:`Recorder`, in the order and with the scopes of the Python code
that the module runs. The record is data: the planner plays it forward and backward
(:mod:`scalegpt.planner.memory.tape`), and adds up its costs (:mod:`scalegpt.planner.time.work`).

Sizes depend on the micro batch B alone, since everything else is fixed when a part records: a :class:`Size` is
``per_sequence``·B + ``fixed`` bytes. So a record is made once and evaluated for each B.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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


FREE = Cost()


@dataclass(eq=False, slots=True)
class Value:
    """A tensor of the forward pass.

    Attributes:
        size: of its memory; of a view, none of its own.
        base: the tensor whose memory a view shares.
    """

    size: Size
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
        reuses: a result that was saved and becomes the gradient in place.
    """

    size: Size | None = None
    reuses: "Value | None" = None


PASSED_ON = Gradient()


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Operation:
    """One differentiable operation.

    Attributes:
        name: for readers.
        part: :data:`MATMULS`, :data:`ATTENTION` or :data:`ELEMENTWISE`: where its time is counted.
        inputs: the tensors that gradients flow back to.
        gradients: one for each input, in the order in which the backward pass allocates them.
        results: the result first, then what the kernel returns beside it (statistics, masks).
        copies: weights cast to the compute dtype for this operation, alive while it runs.
        saves: inputs, results and copies that autograd keeps until the backward pass.
        parameter: the name of the matrix that it multiplies by or looks up, inside its part of the model.
        weight: elements of that matrix; its gradient is made before the inputs'. 0: none.
        weight_gradient: a result that was saved and becomes that gradient in place; None: it is made anew.
        is_dear: its results are worth keeping under selective recompute.
        workspace: of the forward kernel.
        workspace_back: of the backward kernel, beside the gradients.
        forward: cost of the forward pass.
        backward: cost of the backward pass.
    """

    name: str
    part: str = ELEMENTWISE
    inputs: tuple[Value, ...]
    gradients: tuple[Gradient, ...]
    results: tuple[Value, ...]
    copies: tuple[Value, ...] = ()
    saves: tuple[Value, ...] = ()
    parameter: str = ""
    weight: int = 0
    weight_gradient: Value | None = None
    is_dear: bool = False
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
    arguments and local names until it returns. :meth:`run` releases those of its inputs that are named ``passing``:
    expressions without a name, which Python drops when the call is over.
    """

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self._scopes: list[list[Value]] = []

    def run(self, operation: Operation, *, passing: Sequence[Value] = ()) -> Value:
        """Record an operation and return its result; ``passing`` are released after it."""
        self.entries.append(operation)
        for value in passing:
            self.release(value)
        return operation.results[0]

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
