"""Finds the largest micro batch of a scheme (layout, recompute, loss) that fits a card, with few memory predictions."""

import bisect

from scalegpt.config.backends import FSDP
from scalegpt.planner.memory.overheads import Overheads
from scalegpt.planner.search.costs import SchemeCosts


class Bracket:
    """The range of micro batches that contains the largest one that fits, for one scheme.

    Each prediction narrows the range.

    Memory grows almost linearly with the micro batch, so interpolation shows which one to predict next. Memory predictions
    that were cached for other cards are used first. At the largest micro batches there are two exceptions to the growth.
    If a step has a single micro step, no accumulated gradients are held. If it has two, FSDP2 has no middle micro step,
    in which whole gradients are held and none is reduced. In both cases a larger micro batch may take less memory than a
    smaller one, so these micro batches are predicted one by one, without interpolation.

    Attributes:
        costs: the work and the memory of the scheme.
        sizes: the micro batches to choose from, in rising order.
        low: an index into ``sizes``; ``sizes[low - 1]`` is known to fit. 0: no micro batch is known to fit.
        high: an index into ``sizes``; ``sizes[high]`` and larger ones do not fit. ``low == high``: the search is over.
        bounded: whether :meth:`bound` or :meth:`close` was called.

    Args:
        costs: see the attribute.
        sizes: see the attribute.
        overheads: the memory on the card outside the step's tensors, such as the CUDA context.
        limit: bytes that a plan may take on each card.
    """

    __slots__ = ("_above", "_below", "bounded", "costs", "high", "limit", "low", "overheads", "sizes")

    def __init__(self, costs: SchemeCosts, sizes: tuple[int, ...], overheads: Overheads, limit: float) -> None:
        self.costs, self.sizes, self.overheads, self.limit = costs, sizes, overheads, limit
        self.low, self.high, self.bounded = 0, len(sizes), False
        self._below = self._above = (0, 0)  # (micro batch, bytes) of one that fits, and of one that does not

    @property
    def largest(self) -> int:
        """The largest micro batch that is not excluded yet."""
        return self.sizes[self.high - 1]

    def fits(self, micro: int) -> bool:
        """Whether the predicted memory of a micro batch is within the limit."""
        return self._total(micro) <= self.limit

    def bound(self) -> None:
        """Exclude the largest micro batches as long as a lower bound on their memory exceeds the limit."""
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
        """Narrow the range: compare cached memory predictions with the limit, then predict one more micro batch."""
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
        """Predict the micro batch at index ``place``, narrow the range, and return whether the micro batch fits."""
        micro = self.sizes[place]
        total = self._total(micro)
        if total > self.limit:
            self.high, self._above = place, (micro, total)
            return False
        self.low, self._below = place + 1, (micro, total)
        return True

    def _between(self) -> int:
        """The index in [low, high) of the largest micro batch that fits if memory is linear between the known points."""
        (below, least), (above, most) = self._below, self._above
        slope = (most - least) / max(1, above - below)
        guess = below + (self.limit - least) / slope if slope > 0 else self.largest
        return min(self.high - 1, max(self.low, bisect.bisect_right(self.sizes, guess) - 1))

    def _total(self, micro: int) -> int:
        prediction = self.costs.predictions[micro]
        return self.overheads.total_bytes(prediction.peak_bytes, prediction.host_bytes)
