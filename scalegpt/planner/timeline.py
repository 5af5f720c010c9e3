"""Bytes that come and go in the order of a training step: the ledger that the memory model is written in.

Every allocation is rounded up to the CUDA caching allocator's unit of 512 bytes (``kMinBlockSize`` in torch's
``CUDACachingAllocator``), as ``torch.cuda.memory_allocated`` counts it.
"""

from collections import Counter
from dataclasses import dataclass, field

UNIT = 512


def rounded(count: int) -> int:
    """The bytes that the allocator counts for an allocation of ``count`` bytes."""
    return -(-count // UNIT) * UNIT


@dataclass(frozen=True)
class Moment:
    """The fullest moment of a phase: the bytes live in all, and of each kind."""

    total: int
    kinds: dict[str, int]


@dataclass
class Timeline:
    """A running sum of live bytes that remembers the fullest moment of each phase.

    Attributes:
        phase: the phase that moments are counted in now.
        live: bytes live now, by kind.
        peaks: phase → its fullest moment so far.
    """

    phase: str = "idle"
    live: Counter[str] = field(default_factory=Counter)
    peaks: dict[str, Moment] = field(default_factory=dict)
    total: int = 0

    def enter(self, phase: str) -> None:
        """Begin or return to a phase; what is live now counts in it."""
        self.phase = phase
        self._note()

    def take(self, kind: str, *sizes: int) -> None:
        """Allocate tensors of these sizes in bytes, one after another, and keep them."""
        for size in sizes:
            self.hold(kind, rounded(size))

    def give(self, kind: str, *sizes: int) -> None:
        """Free tensors of these sizes in bytes."""
        for size in sizes:
            self.drop(kind, rounded(size))

    def hold(self, kind: str, exact: int) -> None:
        """Add bytes that are rounded already, such as a sum over many tensors."""
        self.live[kind] += exact
        self.total += exact
        self._note()

    def drop(self, kind: str, exact: int) -> None:
        """Take away bytes that are rounded already."""
        self.live[kind] -= exact
        self.total -= exact
        assert self.live[kind] >= 0, f"more {kind} freed than held in {self.phase}"

    def touch(self, kind: str, *sizes: int) -> None:
        """Allocate tensors together and free them again: temporaries."""
        self.take(kind, *sizes)
        self.give(kind, *sizes)

    def peak(self) -> tuple[str, Moment]:
        """The fullest moment of all and the phase it falls in; of equal ones the earlier."""
        return max(self.peaks.items(), key=lambda item: item[1].total)

    def _note(self) -> None:
        known = self.peaks.get(self.phase)
        if known is None or self.total > known.total:
            self.peaks[self.phase] = Moment(self.total, {kind: size for kind, size in self.live.items() if size})
