"""Follows every storage that a piece of code makes: how many bytes are live, of which kind, and when the most are live.

A :class:`Tracker` sees each operator's results below autograd and DTensor, where they are plain tensors. It logs
allocations, frees and changes of size, and finds the kind of each storage: weights, gradients, activations and so on.
:meth:`Tracker.replay` then goes through the log and returns, for every phase, the moment with the most live bytes. A
storage counts under its kind from its allocation on, even if the kind was found later.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import is_non_overlapping_and_dense_or_false as is_dense
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

BLOCK = 512
"""The caching allocator's smallest unit, in bytes (``kMinBlockSize`` in c10/cuda/CUDACachingAllocator.cpp)."""

SCALAR = 2.0
"""What ``.item()`` returns in a trace: finite, and above the usual clipping norm, so that gradients are clipped."""

TEMPORARY = "temporaries"
"""The kind of a storage that has not been marked with another kind."""

aten = torch.ops.aten


@dataclass(frozen=True)
class StorageGroup:
    """Storages that are live at one moment and differ only in their address.

    Attributes:
        kind: their kind of memory, for example ``weights``.
        made_by: the operator that made them.
        shape: the shape of the tensor for which each was made.
        dtype: the dtype of that tensor.
        count: the number of storages.
        size: bytes of all of them together.
    """

    kind: str
    made_by: str
    shape: tuple[int, ...]
    dtype: str
    count: int
    size: int


@dataclass(frozen=True)
class Snapshot:
    """The storages that live at one moment: ``size`` bytes in all, in groups."""

    size: int
    groups: tuple[StorageGroup, ...]

    @property
    def by_kind(self) -> dict[str, int]:
        """Kind of memory → its bytes, the largest first."""
        kinds: Counter[str] = Counter()
        for each in self.groups:
            kinds[each.kind] += each.size
        return dict(kinds.most_common())


@dataclass
class _Storage:
    size: int
    made_by: str
    shape: tuple[int, ...] = ()
    dtype: str = ""
    kind: str | None = None


Replacement = Callable[[Any, Any, Any], Any]
Extras = Callable[[Any, Any], Iterable[tuple[str, int]]]


class Tracker(TorchDispatchMode):
    """While active, follows every storage that an operator makes.

    ``.item()`` returns :data:`SCALAR`, so that code which reads a number from the device runs on tensors without data.

    Attributes:
        phase: the current phase of the step, set by the code that runs.
        paused: while true, new storages are not followed.
        on_host: while true, new storages count 0 bytes, since with a GPU they would be in host memory.

    Args:
        replace: called as (operator, args, kwargs) to run an operator; None: the operator runs as it is.
        extras: called as (operator, args); gives (label, bytes) of the temporary allocations that the operator's kernel makes
            besides its results and frees before it returns.
        block: sizes are rounded up to a multiple of this; the default is the unit of CUDA's caching allocator.
    """

    def __init__(self, replace: Replacement | None = None, extras: Extras | None = None, *, block: int = BLOCK) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._block = block
        self.phase = ""
        self.paused = self.on_host = False
        self._replace = replace or (lambda func, args, kwargs: func(*args, **kwargs))
        self._extras = extras or (lambda _func, _args: ())
        self._storages: list[_Storage] = []
        self._living: dict[int, int] = {}  # address of the storage → its number
        self._changes: list[tuple[int, int, str]] = []  # (number of a storage, change in bytes, phase)
        self._at_start: dict[int, int] = {}
        # Reference counts of a gradient, and of its storage, that only autograd's engine holds; see `calibrate`.
        self._unique: tuple[int, int] | None = None

    # --- allocations and frees ---------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor calls again, with its local tensors
        if self.paused:
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return SCALAR
        if func is aten.add.Tensor and self._engine_adds_in_place(*args[:2]):
            return args[0].add_(args[1])
        result = self._replace(func, args, kwargs)
        for leaf in tree_iter((result, kwargs.get("out"))):
            if isinstance(leaf, Tensor):
                self._follow(leaf, func)
        extra = [self._born(_Storage(self._rounded(size), label)) for label, size in self._extras(func, args)]
        for number in extra:
            self._change(number, -self._storages[number].size)
        self._learn(func, args, kwargs, result)
        return result

    def _engine_adds_in_place(self, old: Any, _new: Any) -> bool:
        """Whether this sum of two gradients would be made in place, in ``old``, if no dispatch mode were active.

        Autograd's engine adds in place to a tensor to which nothing else refers, but never while a dispatch mode is
        active (``can_accumulate_inplace`` in torch/csrc/autograd/input_buffer.cpp). In our backward passes only the
        engine adds tensors with gradients off.
        """
        if torch.is_grad_enabled() or torch._C._current_autograd_node() is None or not isinstance(old, Tensor):
            return False
        counts = old._use_count(), torch._C._storage_Use_Count(old.untyped_storage()._cdata)  # type: ignore[attr-defined]
        if self._unique is None:  # the first call comes from `calibrate`
            self._unique = counts
        return counts <= self._unique and counts[1] <= self._unique[1] and is_dense(old)

    def calibrate(self) -> None:
        """Measure the reference counts of a gradient that only autograd's engine holds.

        Call this while the tracker is active.
        """
        source = torch.ones(4, requires_grad=True)
        shared = source * 2.0
        (shared.sin() + shared.cos()).exp().sum().backward()  # type: ignore[no-untyped-call]
        assert self._unique is not None

    def _follow(self, tensor: Tensor, func: Any) -> None:
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._living:
            made = _Storage(self._rounded(storage.nbytes()), str(func), tuple(tensor.shape), str(tensor.dtype)[6:])
            self._living[key] = self._born(made)
            weakref.finalize(storage, self._died, key).atexit = False

    def _born(self, storage: _Storage) -> int:
        self._storages.append(storage)
        number = len(self._storages) - 1
        self._change(number, storage.size)
        return number

    def _died(self, key: int) -> None:
        number = self._living.pop(key)
        self._change(number, -self._storages[number].size)

    def _rounded(self, size: int) -> int:
        return 0 if self.on_host else -(-size // self._block) * self._block

    def _change(self, number: int, by: int) -> None:
        self._changes.append((number, by, self.phase))

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Log the new size of a resized storage. The tracker sees only operators, and a resize is not an operator."""
        number = self._living.get(storage._cdata)
        if number is not None:
            known = self._storages[number]
            size = self._rounded(storage.nbytes())
            self._change(number, size - known.size)
            known.size = size
            known.kind = "gathered weights"  # only FSDP2 resizes, and only gathered weights

    # --- what storages are for ---------------------------------------------------------------------------------------

    def mark(self, tensor: Tensor | None, kind: str) -> None:
        """Set the kind of a tensor's storage; follow the storage if it is new."""
        if tensor is None:
            return
        part = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        self._follow(part, "before")
        self._storages[self._living[part.untyped_storage()._cdata]].kind = kind

    def ignore(self, tensor: Tensor) -> None:
        """Stop counting a tensor's storage: with a GPU it would be in host memory."""
        number = self._living.get(tensor.untyped_storage()._cdata)
        if number is not None:
            self._change(number, -self._storages[number].size)
            self._storages[number].size = 0

    @contextmanager
    def keeping(self, kind: str) -> Iterator[None]:
        """Give this kind to storages that are made inside the ``with`` block and live at its end, unless they have a kind."""
        first = len(self._storages)
        try:
            yield
        finally:
            self.mark_since(first, kind)

    def mark_since(self, first: int, kind: str) -> None:
        """Give this kind to live storages with a number of at least ``first``, unless they have a kind."""
        for number in self._living.values():
            if number >= first and self._storages[number].kind is None:
                self._storages[number].kind = kind

    @property
    def made(self) -> int:
        """The number of storages made so far."""
        return len(self._storages)

    def _learn(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Recognise and mark weights that are cast to the compute dtype, gradients that are added up, and FSDP2's buffers."""
        if func is aten._to_copy.default and self._kind(args[0]) == "weights":
            self.mark(result, "cast weights")
        elif func is aten.add_.Tensor:
            if type(torch._C._current_autograd_node()).__name__ == "AccumulateGrad":
                self.mark(args[0], "gradients")
                self.mark(args[1], "gradients")
        elif func._schema.name == "fsdp::all_gather_copy_in":
            self.mark(args[1], "gather buffers")
        elif func._schema.name == "fsdp::chunk_cat":
            for gradient in args[0]:
                self.mark(gradient, "gradients")
            self.mark(kwargs.get("out", args[-1]), "reduce buffers")

    def _kind(self, tensor: Tensor) -> str | None:
        number = self._living.get(tensor.untyped_storage()._cdata)
        return None if number is None else self._storages[number].kind

    # --- the result --------------------------------------------------------------------------------------------------

    def restart(self) -> None:
        """Begin a new log, which starts with the storages that live now."""
        self._changes, self._at_start = [], {number: self._storages[number].size for number in self._living.values()}

    def replay(self) -> tuple[Snapshot, dict[str, Snapshot]]:
        """Go through the log since the last restart to find the moment of each phase with the most live bytes.

        Returns:
            The snapshot at the restart, and a map from each phase to the snapshot with the most live bytes.
        """
        now, largest, at = sum(self._at_start.values()), dict[str, int](), dict[str, int]()
        for i, (_, by, phase) in enumerate(self._changes):
            before, now = now, now + by
            if max(before, now) > largest.get(phase, -1):
                largest[phase], at[phase] = max(before, now), i if now >= before else i - 1
        alive = Counter(self._at_start)
        start = self._snapshot(alive)
        wanted = {i: [phase for phase in at if at[phase] == i] for i in at.values()}
        fullest = dict.fromkeys(wanted.get(-1, ()), start)
        for i, (number, by, _) in enumerate(self._changes):
            alive[number] += by
            for phase in wanted.get(i, ()):
                fullest[phase] = self._snapshot(alive)
        return start, {phase: fullest[phase] for phase in largest}

    def _snapshot(self, alive: Counter[int]) -> Snapshot:
        counts, sizes = (
            Counter[tuple[str, str, tuple[int, ...], str]](),
            Counter[tuple[str, str, tuple[int, ...], str]](),
        )
        for number, size in alive.items():
            if size:
                storage = self._storages[number]
                key = storage.kind or TEMPORARY, storage.made_by, storage.shape, storage.dtype
                counts[key] += 1
                sizes[key] += size
        groups = tuple(StorageGroup(*key, count=counts[key], size=size) for key, size in sizes.most_common())
        return Snapshot(sum(sizes.values()), groups)
