"""The feasible region of a plan: with which layouts and micro batches its run fits the machine."""

import bisect
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from scalegpt.config.run import ParallelConfig
from scalegpt.config.train import RECOMPUTE
from scalegpt.errors import InputError
from scalegpt.planner.batches import divisors
from scalegpt.planner.plan import Estimator, Plan, host_needed
from scalegpt.planner.search.costs import RunCosts
from scalegpt.planner.search.layouts import layouts, without_other_sizes
from scalegpt.planner.search.question import Question, Scheme

_GROWING = 3
"""Memory grows with the micro batch while a step has at least this many micro steps; see
:mod:`scalegpt.planner.search.bracket`."""


class LayoutRegion(NamedTuple):
    """The micro batches that fit with one layout.

    Attributes:
        layout: backend, ZeRO stage and offload.
        lightest: micro batch → the lightest recompute policy with which it fits within the margin; None: it does not
            fit.
    """

    layout: ParallelConfig
    lightest: dict[int, str | None]


def feasible_region(question: Question, plan: Plan) -> Iterator[LayoutRegion]:
    """What fits with each layout on the plan's cards, the simplest layout first.

    Sequences per step and loss do not change.

    Offload is varied only on a single card, which has no sharding to vary.

    Args:
        question: the question. Layout, micro batch and recompute are varied even if the user fixed them.
        plan: the chosen plan.
    """
    open_ = question.open | {"backend", "zero_stage"}
    open_ = open_ | {"offload"} if plan.machine.ranks == 1 else open_ - {"offload"}
    found = layouts(replace(question, machine=plan.machine, run=plan.run, open=open_ | {"shard_size"}))
    for layout in without_other_sizes(found, plan.run.parallel.shard_size):
        yield LayoutRegion(layout, _Fitting(question, plan, layout).lightest())


class _Fitting:
    """Which micro batches of a plan's run fit with another layout."""

    def __init__(self, question: Question, plan: Plan, layout: ParallelConfig) -> None:
        estimator = Estimator(plan.machine, question.calibration)
        self.plan, self.layout, self.limit = plan, layout, question.limit
        self.costs = RunCosts.of(plan.run, plan.machine.ranks, estimator.kernel(plan.run), estimator.compiles(plan.run))
        self.overheads = estimator.overheads(replace(plan.run, parallel=layout), plan.machine.ranks)

    def lightest(self) -> dict[int, str | None]:
        """Micro batch → the lightest recompute policy with which it fits; None: it does not fit."""
        found: dict[int, str | None] = dict.fromkeys(divisors(self.costs.per_rank))
        for recompute in RECOMPUTE:
            left = [micro for micro, lightest in found.items() if lightest is None]
            found |= dict.fromkeys(self._fitting(left, recompute), recompute)
        return found

    def _fitting(self, sizes: list[int], recompute: str) -> list[int]:
        """Those micro batches that fit, found with few predictions. The micro batches are given in rising order."""
        growing = [micro for micro in sizes if self.costs.per_rank // micro >= _GROWING]
        most = bisect.bisect_left(growing, True, key=lambda micro: not self._fits(micro, recompute))
        return growing[:most] + [micro for micro in sizes[len(growing) :] if self._fits(micro, recompute)]

    def _fits(self, micro: int, recompute: str) -> bool:
        """Whether a micro batch fits the card and the host memory; false if the run's own DeepSpeed file forbids it."""
        scheme = Scheme(self.layout, recompute, self.plan.run.train.loss)
        try:
            memory = self.costs.schemes[scheme].predictions[micro]
        except InputError:
            return False
        there, needed = self.plan.machine.host_bytes, host_needed(self.plan.machine, memory.host_bytes)
        total = self.overheads.total_bytes(memory.peak_bytes, memory.host_bytes)
        return total <= self.limit and (there is None or needed <= there)
