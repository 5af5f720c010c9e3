"""What autograd allocates and frees in a block, forward and backward, under each recompute policy.

A record of operations (:mod:`scalegpt.architecture.operations`) is run without data, with the reference counts of eager
PyTorch. A tensor lives as long as a Python name, autograd, selective recompute's cache or a gradient refers to it.

- **Forward.** Each operation allocates its results; autograd keeps what the operation saves.
- **Backward.** Operations come in reverse. Each makes the gradients of its weight and its inputs, then frees what it saved
  and the incoming gradient. The second gradient of one tensor is added to the first: in place where nothing else refers
  to it (``InputBuffer::accumulate`` in torch).
- **Recompute.** *full* saves nothing but the block's input. The backward pass runs the forward pass again, up to the last
  tensor that it needs (``torch.utils.checkpoint`` stops early). *selective* also keeps the results of expensive operations.

The outcome is a :class:`Program`: allocations and frees, whose order does not depend on the micro batch size. It is made
once for a model and run at each micro batch size.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

from scalegpt.architecture.operations import Gradient, Operation, Recorder, Release, Size, Value, Workspace
from scalegpt.architecture.recompute import kept_by_selective, last_saving, recomputed, saves_its_own
from scalegpt.planner.memory.timeline import ACTIVATIONS, COPIES, TEMPORARIES, Course, Timeline, rounded

TAKE, GIVE, TOUCH, GRADIENT = range(4)
_SIGNS = {TAKE: (1,), GIVE: (-1,), TOUCH: (1, -1)}

Accumulate = Callable[[str, int], None]
"""Called with a matrix's name and number of elements when its gradient has been made, to move the gradient's bytes to their
kind of memory."""

Event = tuple[int, str, int]
"""(:data:`TAKE`, :data:`GIVE` or :data:`TOUCH`, kind of memory, index of the size in :attr:`Program.sizes`), or
(:data:`GRADIENT`, name of a matrix, its number of elements)."""


@dataclass(frozen=True)
class Program:
    """The allocations and frees of a part of the model, in order, for any micro batch size.

    Attributes:
        sizes: the sizes to which events refer by index.
        forward: the events of the forward pass.
        leave: the events between the passes, when the caller's Python name for the part's input goes out of scope.
        backward: the events of the backward pass. Before it, the gradient of the result is live; after it, that of the
            input.
        operations: all operations, in order.
        again: the operations of the recomputation. Those in ``kept`` are not run again.
        kept: the operations among ``again`` whose results selective recompute keeps.
    """

    sizes: tuple[Size | Workspace, ...]
    forward: tuple[Event, ...]
    leave: tuple[Event, ...]
    backward: tuple[Event, ...]
    operations: tuple[Operation, ...]
    again: tuple[Operation, ...]
    kept: frozenset[Operation]

    def at(self, batch: int) -> "Sized":
        """The program with its bytes at a micro batch of ``batch`` sequences."""
        return Sized(self, tuple(_bytes(size, batch) for size in self.sizes))


def _bytes(size: Size | Workspace, batch: int) -> int:
    if isinstance(size, Size):
        return rounded(size.at(batch))
    return sum(map(rounded, size(batch)))


Stretch = tuple[Course, str, int]
"""The events up to the next gradient, and the name and number of elements of that gradient's matrix.

After the last gradient the name is empty.
"""


@dataclass(frozen=True)
class Sized:
    """A program (allocations and frees) whose sizes are in bytes at one micro batch size.

    A model's blocks are alike, so each program is played many times. To save time, its events are summed up once.
    """

    program: Program
    sizes: tuple[int, ...]

    def forward(self, timeline: Timeline) -> None:
        """Simulate the forward pass; afterwards the result and the tensors that the backward pass needs are live."""
        timeline.follow(self._forward)

    def leave(self, timeline: Timeline) -> None:
        """Drop the caller's name for the input, after the forward pass and before the backward pass."""
        timeline.follow(self._leave)

    def backward(self, timeline: Timeline, accumulate: Accumulate) -> None:
        """Simulate the backward pass; call ``accumulate(name, elements)`` when a matrix's gradient has been made."""
        for course, name, elements in self._backward:
            timeline.follow(course)
            if name:
                accumulate(name, elements)

    @cached_property
    def _forward(self) -> Course:
        return self._course(self.program.forward)

    @cached_property
    def _leave(self) -> Course:
        return self._course(self.program.leave)

    @cached_property
    def _backward(self) -> tuple[Stretch, ...]:
        events, stretches, start = self.program.backward, list[Stretch](), 0
        for place, (action, name, elements) in enumerate(events):
            if action == GRADIENT:
                stretches.append((self._course(events[start:place]), name, elements))
                start = place + 1
        return (*stretches, (self._course(events[start:]), "", 0))

    def _course(self, events: Iterable[Event]) -> Course:
        return Course.of((kind, sign * self.sizes[index]) for action, kind, index in events for sign in _SIGNS[action])


@dataclass(eq=False, slots=True)
class _Memory:
    """One allocation: the index of its size, its kind of memory, and the number of references to it."""

    size: int
    kind: str
    references: int = 1


class _Script:
    """A program that is being built: its events so far, and the sizes to which these refer by index."""

    def __init__(self) -> None:
        self.sizes: dict[Size | Workspace, int] = {}
        self._events: list[Event] = []

    def index(self, size: Size | Workspace) -> int:
        """The index of a size; equal sizes share one index."""
        return self.sizes.setdefault(size, len(self.sizes))

    def take(self, size: Size, kind: str) -> _Memory:
        """Add an allocation to the events; return the allocation, with one reference."""
        memory = _Memory(self.index(size), kind)
        self._events.append((TAKE, kind, memory.size))
        return memory

    def drop(self, memory: _Memory) -> None:
        """Drop one reference to an allocation; if none is left, add its free to the events."""
        memory.references -= 1
        assert memory.references >= 0
        if not memory.references:
            self._events.append((GIVE, memory.kind, memory.size))

    def touch(self, workspace: Workspace | None, kind: str) -> None:
        """Add to the events that a kernel's workspace is allocated and freed again."""
        if workspace is not None:
            self._events.append((TOUCH, kind, self.index(workspace)))

    def gradient(self, op: Operation) -> None:
        """Add to the events that the gradient of an operation's matrix has been made."""
        self._events.append((GRADIENT, op.parameter, op.weight))

    def cut(self) -> tuple[Event, ...]:
        """Return the events that were added since the last call."""
        events, self._events = tuple(self._events), []
        return events


@dataclass(frozen=True)
class Kinds:
    """The kinds of memory, such as ``activations``, under which a record's tensors are counted, by the tensor's role.

    Attributes:
        lasting: tensors that outlive a pass.
        passing: tensors that do not outlive a pass.
        start: the part's input.
        result: the part's result.
        incoming: the gradient of the part's result.
        gradient: a matrix's gradient that has just been made.
    """

    lasting: str = ACTIVATIONS
    passing: str = TEMPORARIES
    start: str = ACTIVATIONS
    result: str = ACTIVATIONS
    incoming: str = TEMPORARIES
    gradient: str = TEMPORARIES


class Compiler:
    """Turns the record of a part into a program.

    Args:
        record: the record of the part's operations.
        start: the part's input, which was allocated before; None: there is none.
        end: the part's result.
        gradient_width: bytes of an element of a matrix's gradient as the backward pass makes it.
        recompute: ``none``, ``selective`` or ``full``.
        kinds: the kinds of memory under which tensors are counted.
    """

    def __init__(
        self,
        record: Recorder,
        start: Value | None,
        end: Value,
        gradient_width: int,
        *,
        recompute: str = "none",
        kinds: Kinds = Kinds(),
    ) -> None:
        self.entries, self.operations, self.start, self.end = record.entries, record.operations, start, end
        self.recompute, self.gradient_width, self.kinds = recompute, gradient_width, kinds
        self.last = last_saving(self.operations)
        self.again = () if recompute == "none" else recomputed(self.operations)
        self.kept = kept_by_selective(self.operations) if recompute == "selective" else frozenset[Operation]()
        self.script = _Script()
        self.memory: dict[Value, _Memory] = {}
        if start is not None:
            self.memory[start] = _Memory(self.script.index(start.size), kinds.start)
        self.gradients: dict[Value, _Memory] = {}

    def compile(self) -> Program:
        """Simulate the record's forward and backward pass and return their events as a program."""
        saves = self.recompute == "none"
        _Forward(self, saves=saves, again=False).run()
        forward = self.script.cut()
        if self.start is not None and saves:
            self.script.drop(self.memory[self.start])  # the caller's name goes; autograd may still refer to the input
        leave = self.script.cut()
        self._backward()
        if self.start is not None and not saves:
            self.script.drop(self.memory[self.start])  # the reference of torch.utils.checkpoint goes
        sizes, backward = tuple(self.script.sizes), self.script.cut()
        return Program(sizes, forward, leave, backward, tuple(self.operations), self.again, self.kept)

    def _backward(self) -> None:
        script, waiting = self.script, self.recompute != "none"
        self.gradients[self.end] = _Memory(script.index(self.end.size), self.kinds.incoming)
        for op in reversed(self.operations):
            incoming = [self.gradients.pop(value) for value in op.results if value in self.gradients]
            if waiting and op.saves:
                _Forward(self, saves=True, again=True).run()
                waiting = False
            if op.weight_gradient is not None:
                self.memory[op.weight_gradient].references += 1
            elif op.weight:
                script.take(Size(fixed=self.gradient_width * op.weight), self.kinds.gradient)
            made = [self._gradient(each, incoming[0]) for each in op.gradients]
            script.touch(op.workspace_back, self.kinds.passing)
            for value in op.saves:
                script.drop(self.memory[value.storage])
            for memory in incoming:
                script.drop(memory)
            for value, memory in zip(op.inputs, made, strict=True):
                self._deposit(value, memory)
            if op.weight:
                script.gradient(op)

    def _gradient(self, gradient: Gradient, incoming: _Memory) -> _Memory:
        if gradient.size is not None:
            return self.script.take(gradient.size, self.kinds.passing)
        memory = incoming if gradient.reuses is None else self.memory[gradient.reuses]
        memory.references += 1
        return memory

    def _deposit(self, value: Value, memory: _Memory) -> None:
        """Add a tensor's new gradient to its earlier one, if any: in place, unless that has other references."""
        known = self.gradients.get(value)
        if known is None:
            self.gradients[value] = memory
        elif known.references == 1:
            self.script.drop(memory)
        else:
            self.gradients[value] = self.script.take(value.size, self.kinds.passing)
            self.script.drop(known)
            self.script.drop(memory)


class _Forward:
    """One simulated forward pass through a part.

    Args:
        block: the compiler whose record is simulated.
        saves: whether autograd keeps the tensors that operations save.
        again: whether this is the recomputation, which uses kept results and stops early.
    """

    def __init__(self, block: Compiler, *, saves: bool, again: bool) -> None:
        self.block, self.script, self.memory, self.kinds = block, block.script, block.memory, block.kinds
        self.saves, self.again = saves, again
        self.names = Counter[Value]()
        saved = {value.storage for op in block.operations for value in op.saves} if saves else set()
        outliving = set() if again else {block.end.storage, *(v.storage for op in block.kept for v in op.results)}
        self.lasting = saved | outliving

    def run(self) -> None:
        """Simulate the entries of the record, operations and releases, in order."""
        for entry in self.block.entries:
            if isinstance(entry, Release):
                self._release(entry.value)
                continue
            self._execute(entry)
            if self.again and entry is self.block.last:
                break
        if self.again:  # an exception stops the recomputation: functions end, and their names go
            for value in list(self.names.elements()):
                self._release(value)

    def _execute(self, op: Operation) -> None:
        popped = self.again and op in self.block.kept
        for copy in op.copies:
            self.memory[copy] = self.script.take(copy.size, COPIES if copy in self.lasting else self.kinds.passing)
        stops = self.again and op is self.block.last and not saves_its_own(op)
        if not stops:
            self._make_results(op, popped=popped)
        for value in op.saves if self.saves else ():
            self.memory[value.storage].references += 1
        for copy in op.copies:
            self.script.drop(self.memory[copy])
        if not stops:
            for value in op.results[1:]:  # the kernel's other results have no Python name
                self._release(value)

    def _make_results(self, op: Operation, *, popped: bool) -> None:
        cached = op in self.block.kept and not self.again
        for value in op.results:
            self.names[value] += 1
            if value.base is not None:
                self.memory[value.storage].references += 1
            elif not popped:  # if popped, the name takes over the reference of the cache
                kind = self.kinds.lasting if value in self.lasting else self.kinds.passing
                kind = self.kinds.result if value is self.block.end else kind
                self.memory[value] = self.script.take(value.size, kind)
            if cached:
                self.memory[value.storage].references += 1
        if not popped:
            self.script.touch(op.workspace, self.kinds.passing)

    def _release(self, value: Value) -> None:
        if self.names[value]:
            self.names[value] -= 1
            self.script.drop(self.memory[value.storage])
