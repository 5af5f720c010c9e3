"""The ledger of the memory prediction: a sum of live bytes, to which the simulated step adds allocations and frees.

Every allocation is rounded up to the CUDA caching allocator's unit of 512 bytes (``kMinBlockSize`` in torch's
``CUDACachingAllocator``), as ``torch.cuda.memory_allocated`` counts it.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

UNIT = 512

ACTIVATIONS, TEMPORARIES, COPIES = "activations", "temporaries", "weight copies"
WEIGHTS, GRADIENTS, OPTIMIZER, INPUTS, LOSS = "weights", "gradients", "optimizer state", "inputs", "loss"
GATHERED, GATHER_BUFFERS, REDUCE_BUFFERS, BUCKETS = "gathered weights", "gather buffers", "reduce buffers", "buckets"
"""The kinds of memory under which bytes are counted."""


def host_size(count: int, *, pin: bool) -> int:
    """Bytes of host memory for a tensor of ``count`` bytes: a power of two if pinned (torch's ``CachingHostAllocator``)."""
    return 1 << (count - 1).bit_length() if pin and count else count


def rounded(count: int) -> int:
    """The bytes that the allocator counts for an allocation of ``count`` bytes."""
    return -(-count // UNIT) * UNIT


@dataclass(frozen=True)
class Moment:
    """The moment of a phase with the most live bytes: their sum, and the bytes of each kind."""

    total: int
    kinds: dict[str, int]


class Course(NamedTuple):
    """How live bytes change over a series of allocations and frees. The change does not depend on what was live before.

    Attributes:
        top: the largest rise of the sum of live bytes during the series.
        rise: kind → the change in its bytes up to the first moment of ``top``.
        fall: kind → the change in its bytes from that moment to the end.
    """

    top: int
    rise: dict[str, int]
    fall: dict[str, int]

    @classmethod
    def of(cls, changes: Iterable[tuple[str, int]]) -> "Course":
        """The course of a list of changes.

        Each change is a kind and the bytes of it that are allocated, or freed if negative.
        """
        live, total, top, rise = Counter[str](), 0, 0, dict[str, int]()
        for kind, size in changes:
            live[kind] += size
            total += size
            if total > top:
                top, rise = total, dict(live)
        return cls(top, rise, {kind: size - rise.get(kind, 0) for kind, size in live.items()})


class Timeline:
    """A running sum of live bytes that remembers, for each phase, the moment with the most live bytes.

    A search fills thousands of timelines. To save time, a moment is recorded only when it is over: when bytes are freed, or
    the phase changes.

    Attributes:
        phase: the current phase.
        live: bytes live now, by kind.
        total: bytes live now, in all.
    """

    __slots__ = ("_at_peak", "_highest", "_peaks", "live", "phase", "total")

    def __init__(self) -> None:
        self.phase, self.live, self.total = "idle", Counter[str](), 0
        self._highest = 0  # the most live bytes of this phase so far, now included
        self._at_peak = False  # whether this moment is the phase's fullest and is not recorded yet
        self._peaks: dict[str, tuple[int, dict[str, int]]] = {}

    def enter(self, phase: str) -> None:
        """Begin a phase, or return to one. Bytes that are already live count in the phase."""
        self._note()
        self.phase = phase
        known = self._peaks.get(phase)
        if known is None or self.total > known[0]:
            self._highest, self._at_peak = self.total, True
        else:
            self._highest = known[0]

    def take(self, kind: str, *sizes: int) -> None:
        """Allocate tensors of these sizes in bytes, each rounded up, and keep them."""
        exact = 0
        for size in sizes:
            exact += (size + 511) & -512  # `rounded`, and below `hold` and `drop`, are inlined for speed
        self.live[kind] += exact
        self.total = total = self.total + exact
        if total > self._highest:
            self._highest, self._at_peak = total, True

    def give(self, kind: str, *sizes: int) -> None:
        """Free tensors of these sizes in bytes, each rounded up."""
        exact = 0
        for size in sizes:
            exact += (size + 511) & -512
        if self._at_peak and exact:
            self._note()
        live = self.live[kind] - exact
        assert live >= 0, f"more {kind} freed than held in {self.phase}"
        self.live[kind] = live
        self.total -= exact

    def hold(self, kind: str, exact: int) -> None:
        """Allocate bytes that are already rounded, for example a sum over many tensors."""
        self.live[kind] += exact
        self.total = total = self.total + exact
        if total > self._highest:
            self._highest, self._at_peak = total, True

    def drop(self, kind: str, exact: int) -> None:
        """Free bytes that are already rounded."""
        if self._at_peak and exact:
            self._note()
        live = self.live[kind] - exact
        assert live >= 0, f"more {kind} freed than held in {self.phase}"
        self.live[kind] = live
        self.total -= exact

    def touch(self, kind: str, *sizes: int) -> None:
        """Allocate temporaries of these sizes in bytes, all at once, and free them again."""
        exact = 0
        for size in sizes:
            exact += (size + 511) & -512
        if self.total + exact > self._highest:
            self.hold(kind, exact)
            self.drop(kind, exact)

    def follow(self, course: Course) -> None:
        """Apply the allocations and frees of a course."""
        is_peak = self.total + course.top > self._highest
        if not is_peak:
            self._note()
        self._change(course.rise)
        if is_peak:
            self._highest, self._at_peak = self.total, True
            self._note()
        self._change(course.fall)

    @property
    def peaks(self) -> dict[str, Moment]:
        """Phase → the moment with the most live bytes in the phase so far."""
        self._note()
        return {
            phase: Moment(total, {kind: size for kind, size in kinds.items() if size})
            for phase, (total, kinds) in self._peaks.items()
        }

    def peak(self) -> tuple[str, Moment]:
        """The phase with the most live bytes, and that moment; if several phases are equal, the earliest."""
        return max(self.peaks.items(), key=lambda item: item[1].total)

    def _change(self, sizes: dict[str, int]) -> None:
        for kind, size in sizes.items():
            live = self.live[kind] + size
            assert live >= 0, f"more {kind} freed than held in {self.phase}"
            self.live[kind] = live
            self.total += size

    def _note(self) -> None:
        if self._at_peak:
            self._peaks[self.phase] = self.total, dict(self.live)
            self._at_peak = False
