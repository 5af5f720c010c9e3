"""Finds which micro batches of a scheme fit a card, one at a time and only as far as the search needs."""

import bisect

from scalegpt.config.backends import FSDP
from scalegpt.planner.memory.overheads import Overheads
from scalegpt.planner.search.costs import SchemeCosts


class Bracket:
    """The micro batches of one scheme that may be the largest that fits; each prediction narrows them.

    Memory grows almost linearly with the micro batch, so interpolation shows which one to predict next. Predictions that
    exist already, made for other cards, are used first. The growth has two exceptions, near the largest micro batches. With
    a single micro step no accumulated gradients are held. With two micro steps FSDP2 has no middle micro step, in which whole
    gradients are held and none is reduced. Either case may take less memory than a smaller micro batch, so these micro
    batches are predicted one by one.

    Attributes:
        costs: the work and the memory of the scheme.
        sizes: the micro batches to choose from, in rising order.
        low: an index into ``sizes``; the micro batch just before it is known to fit. 0: none is known to fit.
        high: an index into ``sizes``; no micro batch from it on fits. Equal to ``low`` once the largest that fits is known.
        bounded: whether :meth:`bound` or :meth:`close` was called.

    Args:
        costs: see the attribute.
        sizes: see the attribute.
        overheads: the memory of such a run on the card outside the step's tensors.
        limit: bytes that a plan may take on each card.
    """

    __slots__ = ("_above", "_below", "bounded", "costs", "high", "limit", "low", "overheads", "sizes")

    def __init__(self, costs: SchemeCosts, sizes: tuple[int, ...], overheads: Overheads, limit: float) -> None:
        self.costs, self.sizes, self.overheads, self.limit = costs, sizes, overheads, limit
        self.low, self.high, self.bounded = 0, len(sizes), False
        self._below = self._above = (0, 0)  # (micro batch, bytes) of one that fits, and of one that does not

    @property
    def largest(self) -> int:
        """The largest micro batch that may still fit."""
        return self.sizes[self.high - 1]

    def fits(self, micro: int) -> bool:
        """Whether a micro batch fits."""
        return self._total(micro) <= self.limit

    def bound(self) -> None:
        """Exclude the micro batches whose lower bound on memory exceeds the limit."""
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
        """Exclude all micro batches."""
        self.bounded, self.high = True, 0

    def probe(self) -> None:
        """Narrow the range: test the micro batches that are predicted already, then one more."""
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
        """Whether the micro batch at this index fits; narrows the range by the result."""
        micro = self.sizes[place]
        total = self._total(micro)
        if total > self.limit:
            self.high, self._above = place, (micro, total)
            return False
        self.low, self._below = place + 1, (micro, total)
        return True

    def _between(self) -> int:
        """The index in [low, high) of the largest micro batch that fits if memory is linear between the known bounds."""
        (below, least), (above, most) = self._below, self._above
        slope = (most - least) / max(1, above - below)
        guess = below + (self.limit - least) / slope if slope > 0 else self.largest
        return min(self.high - 1, max(self.low, bisect.bisect_right(self.sizes, guess) - 1))

    def _total(self, micro: int) -> int:
        prediction = self.costs.predictions[micro]
        return self.overheads.total_bytes(prediction.peak_bytes, prediction.host_bytes)
