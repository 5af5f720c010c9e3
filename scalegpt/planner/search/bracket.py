"""Which micro batches of a scheme fit a card, found one at a time and only as far as the search asks."""

import bisect

from scalegpt.config.backends import FSDP
from scalegpt.planner.memory.overheads import Overheads
from scalegpt.planner.search.costs import SchemeCosts


class Bracket:
    """The micro batches of a scheme between the largest known to fit and the smallest known not to.

    Memory grows with the micro batch, and about evenly, which shows where to look; what was predicted for other cards
    narrows it first. There are two exceptions: with a single micro step no gradients wait, and with two FSDP2 has none in
    which whole gradients wait and none is reduced. Either may take less than a smaller micro batch, so that those are looked
    at one by one.

    Attributes:
        costs: what the scheme does and holds.
        sizes: the micro batches to choose among, in rising order.
        low: of the micro batches before this place the last fits.
        high: none from this place on fits; equal to ``low`` once all is known.
        bounded: whether :meth:`bound` was called.

    Args:
        costs: as above.
        sizes: as above.
        overheads: of this kind of run on the card.
        limit: bytes that a plan may take.
    """

    __slots__ = ("_above", "_below", "bounded", "costs", "high", "limit", "low", "overheads", "sizes")

    def __init__(self, costs: SchemeCosts, sizes: tuple[int, ...], overheads: Overheads, limit: float) -> None:
        self.costs, self.sizes, self.overheads, self.limit = costs, sizes, overheads, limit
        self.low, self.high, self.bounded = 0, len(sizes), False
        self._below = self._above = (0, 0)  # a micro batch that fits and one that does not, with their bytes

    @property
    def largest(self) -> int:
        """The largest micro batch that may still fit."""
        return self.sizes[self.high - 1]

    def fits(self, micro: int) -> bool:
        """Whether a micro batch fits."""
        return self._total(micro) <= self.limit

    def bound(self) -> None:
        """Exclude the micro batches that cannot fit, by what they hold at least."""
        self.bounded = True
        run_costs, scheme = self.costs.run_costs, self.costs.scheme
        self._below = 0, self.overheads.total_bytes(run_costs.state_bytes[scheme.layout])
        while self.high:
            least = self.overheads.total_bytes(run_costs.least_bytes(scheme, self.largest))
            if least <= self.limit:
                break
            self._above = self.largest, least
            self.high -= 1

    def close(self) -> None:
        """Exclude all."""
        self.bounded, self.high = True, 0

    def probe(self) -> None:
        """Find out whether one more micro batch fits."""
        run_costs, layout = self.costs.run_costs, self.costs.scheme.layout
        apart = 3 if layout.spec is FSDP and layout.stage != 3 else 2
        if self.high == len(self.sizes) or run_costs.per_rank // self.largest < apart:
            if self._settle(self.high - 1):
                self.low = self.high
            return
        for place in range(self.low, self.high):
            if self.sizes[place] in self.costs.predictions and not self._settle(place):
                break
        if self.low < self.high:
            self._settle(self._between())

    def _settle(self, place: int) -> bool:
        """Whether the micro batch at this place fits; recorded."""
        micro = self.sizes[place]
        total = self._total(micro)
        if total > self.limit:
            self.high, self._above = place, (micro, total)
            return False
        self.low, self._below = place + 1, (micro, total)
        return True

    def _between(self) -> int:
        """The place in [low, high) of the micro batch that fills the card if memory grows evenly between two of them."""
        (below, least), (above, most) = self._below, self._above
        slope = (most - least) / max(1, above - below)
        guess = below + (self.limit - least) / slope if slope > 0 else self.largest
        return min(self.high - 1, max(self.low, bisect.bisect_right(self.sizes, guess) - 1))

    def _total(self, micro: int) -> int:
        prediction = self.costs.predictions[micro]
        return self.overheads.total_bytes(prediction.peak_bytes, prediction.host_bytes)
