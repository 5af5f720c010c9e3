"""The schemes and micro batches among which a search chooses.

They do not depend on the card, so all cards share them.
"""

import itertools
import math
from functools import cached_property, lru_cache
from operator import attrgetter
from typing import NamedTuple

from scalegpt.config import RunConfig
from scalegpt.config.run import ParallelConfig
from scalegpt.config.train import LOSSES, RECOMPUTE
from scalegpt.errors import InputError
from scalegpt.planner.attention import counted_as
from scalegpt.planner.batches import divisors
from scalegpt.planner.memory.deepspeed.settings import fixes_batch
from scalegpt.planner.plan import Estimator
from scalegpt.planner.search.costs import Memo, RunCosts, SchemeCosts
from scalegpt.planner.search.question import Question, Scheme
from scalegpt.planner.search.ranking import Key, Standing, time_class
from scalegpt.planner.time.rates import Rates
from scalegpt.planner.time.step_time import StepTotals

Layouts = tuple[ParallelConfig, ...]

_grad_accum = attrgetter("grad_accum")


class Start(NamedTuple):
    """A scheme before any of its micro batches is excluded.

    Attributes:
        costs: the work and the memory of the scheme.
        sizes: the micro batches to choose from, in rising order.
        standing: the figures that rank the scheme besides its time.
        fastest: the work of a step with each micro batch that may be the fastest.
    """

    costs: SchemeCosts
    sizes: tuple[int, ...]
    standing: Standing
    fastest: tuple[StepTotals, ...]

    def key(self, rates: Rates) -> Key:
        """The scheme's sort key with its fastest micro batch, on a card with these rates."""
        return self.standing.key(min(work.seconds(rates) for work in self.fastest))


class Space:
    """The schemes (layout, recompute, loss) and the micro batches among which a question lets the planner choose.

    Attributes:
        costs: the costs (work and memory) of the run over the question's ranks.
        recomputes: the recompute policies, the lightest first.
        starts: scheme → its start.
        lightest: the starts of all schemes with the lightest recompute.

    Args:
        run: the run as the user asked for it, with its tokens per step.
        costs: see the attribute.
        open_: names of the settings that may be chosen.
        over: the layouts to choose from.
        on_gpu: whether the ranks use GPUs.

    Raises:
        InputError: the step cannot be divided into the fixed micro batch, or the run's own DeepSpeed file forbids it.
    """

    def __init__(self, run: RunConfig, costs: RunCosts, open_: frozenset[str], over: Layouts, *, on_gpu: bool) -> None:
        self.costs, self._own = costs, Scheme.of(run)
        self.recomputes = RECOMPUTE if "recompute" in open_ else (run.train.recompute,)
        losses = LOSSES if "loss" in open_ else (run.train.loss,)
        micro_batches = _micro_batches(run, costs.per_rank, open_, on_gpu=on_gpu)
        schemes = [Scheme(layout, self.recomputes[0], loss) for layout, loss in itertools.product(over, losses)]
        self._sizes = {each.layout: _allowed(costs.schemes[each], micro_batches) for each in schemes[:: len(losses)]}
        if not any(self._sizes.values()):  # raises the InputError that says what the DeepSpeed file forbids
            costs.schemes[schemes[0]].predictions[micro_batches[0]]
        self.starts = Memo(self._start)
        self.lightest = tuple(self.starts[scheme] for scheme in schemes if self._sizes[scheme.layout])

    @classmethod
    def of(cls, question: Question, estimator: Estimator, over: Layouts) -> "Space":
        """The space of a question, cached for all cards with the same attention kernel.

        Args:
            question: the question.
            estimator: the estimator of the question's machine.
            over: the layouts to choose from.

        Raises:
            InputError: as for the class, or the step cannot be divided among the ranks.
        """
        run, ranks, on_gpu = question.run, question.machine.ranks, question.machine.is_gpu
        kernel, compiled = counted_as(estimator.kernel(run)), estimator.compiles(run)
        return _space(run, ranks, kernel, compiled, frozenset(question.open), over, on_gpu)

    @cached_property
    def _least(self) -> tuple[StepTotals, ...]:
        """For each number of micro steps, the least work of all schemes in ``lightest``, part by part."""
        works = sorted((work for start in self.lightest for work in start.fastest), key=_grad_accum)
        return tuple(StepTotals.least(each) for _, each in itertools.groupby(works, key=_grad_accum))

    def least_class(self, rates: Rates) -> int:
        """A lower bound on the time classes of all schemes and micro batches, on a card with these rates."""
        handicap = min(start.standing.handicap for start in self.lightest)
        return time_class(handicap * min(work.seconds(rates) for work in self._least))

    def heavier(self, start: Start) -> Start | None:
        """The same scheme with the next heavier recompute; None: there is none to choose."""
        scheme = start.costs.scheme
        place = self.recomputes.index(scheme.recompute) + 1
        if place == len(self.recomputes):
            return None
        return self.starts[scheme._replace(recompute=self.recomputes[place])]

    def _start(self, scheme: Scheme) -> Start:
        costs, sizes = self.costs.schemes[scheme], self._sizes[scheme.layout]
        fastest = tuple(costs.totals[micro] for micro in costs.contenders(sizes, len(sizes)))
        return Start(costs, sizes, Standing.of(scheme, self._own, self.costs.ranks), fastest)


@lru_cache(maxsize=1024)
def _space(
    run: RunConfig, ranks: int, kernel: str, compiled: bool, open_: frozenset[str], over: Layouts, on_gpu: bool
) -> Space:
    return Space(run, RunCosts.of(run, ranks, kernel, compiled), open_, over, on_gpu=on_gpu)


def _micro_batches(run: RunConfig, per_rank: int, open_: frozenset[str], *, on_gpu: bool) -> tuple[int, ...]:
    if "micro_batch" in open_:
        # On a CPU a micro batch above the run's own gains nothing.
        most = math.inf if on_gpu else run.train.micro_batch
        return tuple(size for size in divisors(per_rank) if size <= most)
    if per_rank % run.train.micro_batch:
        raise InputError(
            f"micro_batch {run.train.micro_batch} does not divide the {per_rank} sequences per rank of a step"
        )
    return (run.train.micro_batch,)


def _allowed(costs: SchemeCosts, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The micro batches that a scheme may use: all, or those that the run's own DeepSpeed file allows."""
    layout = costs.scheme.layout
    if layout.ds_config is None or not fixes_batch(layout):
        return sizes
    return tuple(size for size in sizes if _is_allowed(costs, size))


def _is_allowed(costs: SchemeCosts, micro: int) -> bool:
    try:
        return bool(costs.predictions[micro])
    except InputError:
        return False
