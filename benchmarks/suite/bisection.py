"""The largest micro batch that runs, in few trials: by bisection, and by what other trials have shown."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

Key = tuple[Any, ...]


def largest(sizes: Sequence[int], start: int, *, ran: bool) -> Generator[int, bool, int]:
    """Find the largest size that runs, where all below one that runs do, too.

    It begins beside a size whose outcome is known, since a prediction is more often nearly right than half wrong.

    Args:
        sizes: in rising order.
        start: one of them, or one above them all that did not run.
        ran: whether it did.

    Yields:
        A size to try; wants to be sent whether it ran.

    Returns:
        The largest that ran; 0: none did.
    """
    place = sum(size < start for size in sizes)
    low, high = (place, len(sizes)) if ran else (-1, place)
    probe = low + 1 if ran else high - 1
    while high - low > 1:
        if (yield sizes[probe]):
            low = probe
        else:
            high = probe
        probe = (low + high) // 2
    return sizes[low] if low >= 0 else 0


@dataclass(frozen=True)
class _Trial:
    micro: int
    usable: int
    ran: bool
    where: str


@dataclass
class Facts:
    """What trials have shown, so that none is made whose outcome follows from another's.

    What ran runs with fewer sequences, too, and on a larger card; what ran out of memory does so with more, and on a smaller
    one. That is for configurations that are alike in all else.
    """

    _trials: dict[Key, list[_Trial]] = field(default_factory=dict)

    def add(self, key: Key, micro: int, usable: int, *, ran: bool, where: str) -> None:
        """Enter a trial.

        Args:
            key: all that sets the configuration apart, but its micro batch.
            micro: its micro batch.
            usable: bytes of the card.
            ran: whether it did.
            where: how to call the trial.
        """
        self._trials.setdefault(key, []).append(_Trial(micro, usable, ran, where))

    def outcome(self, key: Key, micro: int, usable: int) -> tuple[bool, str] | None:
        """Whether a configuration would run, and what shows it; None: only a trial can tell."""
        for each in self._trials.get(key, ()):
            if each.ran and each.micro >= micro and each.usable <= usable:
                return True, each.where
            if not each.ran and each.micro <= micro and each.usable >= usable:
                return False, each.where
        return None
