"""Finds the fastest plan that fits.

Settings that the user fixed are kept. All combinations of the others are considered: backend, ZeRO stage, offload,
recompute, loss, and every micro batch that divides the step. Fewer cards than the machine has are considered too, since
communication may cost more time than further cards save. Tokens per step stay as they are.

Extra machinery (offload, each heavier kind of recompute, and sharding, DeepSpeed or a loss that the run does not name) must
pay for itself: each kind must save more than :data:`ERROR`, the error of the time model. So each kind multiplies a plan's
time by 1 + ERROR before plans are compared (:func:`handicap`). These times are sorted into classes of the relative width
:data:`TIE` (:func:`time_class`). Within a class times count as equal, and the simpler scheme (layout, recompute, loss) wins:
nothing offloaded before offload, then less recompute, the layout that the preset names, ``plain`` before ``fsdp`` before
``deepspeed``, a lower stage, the preset's loss (:func:`simplicity`).

The search predicts memory only where the result may decide. Three facts make that possible: heavier recompute is never faster
at the same micro batch; memory grows with the micro batch (with the exceptions in :mod:`scalegpt.planner.search.bracket`);
and only the fastest plan is wanted. A queue orders schemes by a lower bound on their time: the time with the fastest micro
batch that has not been excluded for its memory. Each round takes the first scheme from the queue. It either excludes some of
the scheme's micro batches or finds the fastest one that fits. If the scheme's fastest micro batch turns out not to fit, the
same scheme with heavier recompute joins the queue. ``tests/planner/test_search.py`` compares the results with brute force
over the whole space.
"""

import heapq
import itertools
import math
from dataclasses import replace
from typing import NamedTuple

from scalegpt.config.run import ParallelConfig
from scalegpt.config.train import LOSSES, RECOMPUTE
from scalegpt.errors import InputError
from scalegpt.hardware.machine import Machine
from scalegpt.planner.batches import divisors
from scalegpt.planner.memory.deepspeed.settings import fixes_batch
from scalegpt.planner.plan import Estimator, Plan, host_needed
from scalegpt.planner.search.bracket import Bracket
from scalegpt.planner.search.costs import RunCosts, SchemeCosts
from scalegpt.planner.search.layouts import layouts
from scalegpt.planner.search.question import Found, Question, Scheme
from scalegpt.planner.search.ranking import Key, key_of, plan_key, time_class


def choose(question: Question) -> Found:
    """Find the fastest plan that fits; of plans in one time class the simplest.

    Raises:
        InputError: the tokens per step do not divide among the ranks, or the fixed settings do not work together.
    """
    question = with_tokens(question)
    search = _Search(question, layouts(question))
    best = search.run()
    if question.fewer:
        best = _on_fewer_cards(search, best)
    return Found(best) if best is not None else Found(None, search.closest())


def with_tokens(question: Question) -> Question:
    """Set ``tokens_per_step``, if it is None, to the tokens of a step on all cards; searches on fewer cards then keep it."""
    run = question.run
    if run.train.tokens_per_step is not None:
        return question
    tokens = run.train.micro_batch * question.machine.ranks * run.model.block_size
    return replace(question, run=replace(run, train=run.train.changed(tokens_per_step=tokens)))


def best_of_layout(question: Question, layout: ParallelConfig) -> Found:
    """Find the fastest plan with this layout that fits."""
    search = _Search(with_tokens(question), (layout,))
    best = search.run()
    return Found(best) if best is not None else Found(None, search.closest())


class _Entry(NamedTuple):
    """A scheme in the queue.

    Attributes:
        key: the sort key; without ``micro`` it is a lower bound.
        order: the number of the entry, which decides between equal keys.
        bracket: the scheme and its range of micro batches.
        micro: the fastest micro batch that fits, if it is known; else None.
    """

    key: Key
    order: int
    bracket: Bracket
    micro: int | None


class _Search:
    """The search for the best plan on all cards of the question's machine.

    Args:
        question: the question, with its tokens per step set.
        over: the layouts to choose from.

    Raises:
        InputError: the step does not divide among the ranks, or not into the fixed micro batch.
    """

    def __init__(self, question: Question, over: tuple[ParallelConfig, ...]) -> None:
        self.question = question
        run, machine, open_ = question.run, question.machine, question.open
        self.own, self.limit = Scheme.of(run), question.limit
        self.estimator = Estimator(machine, question.calibration)
        self.rates = self.estimator.rates(run)
        self.costs = RunCosts.of(run, machine.ranks, self.estimator.kernel(run), self.estimator.compiles(run))
        self.micro_batches = self._micro_batches()
        self.recomputes = RECOMPUTE if "recompute" in open_ else (run.train.recompute,)
        self.queue: list[_Entry] = []
        self.order = itertools.count()
        self.made_heavier: set[Scheme] = set()
        self.opened: list[Bracket] = []
        losses = LOSSES if "loss" in open_ else (run.train.loss,)
        for layout in over:
            schemes = [Scheme(layout, self.recomputes[0], loss) for loss in losses]
            sizes = self._sizes(schemes[0])
            self.opened += [self._bracket(scheme, sizes) for scheme in schemes if sizes]
        if not self.opened:  # raises the InputError that says what the DeepSpeed file forbids
            self.costs.schemes[Scheme(over[0], self.recomputes[0], losses[0])].predictions[self.micro_batches[0]]
        for each in self.opened:
            self._push(each)

    def _bracket(self, scheme: Scheme, sizes: tuple[int, ...]) -> Bracket:
        costs = self.costs.schemes[scheme]
        return Bracket(costs, sizes, self.estimator.overheads(costs.runs[sizes[0]], self.costs.ranks), self.limit)

    def _micro_batches(self) -> tuple[int, ...]:
        run, per_rank = self.question.run, self.costs.per_rank
        if "micro_batch" in self.question.open:
            # On a CPU a micro batch above the run's own gains nothing.
            most = math.inf if self.question.machine.is_gpu else run.train.micro_batch
            return tuple(size for size in divisors(per_rank) if size <= most)
        if per_rank % run.train.micro_batch:
            raise InputError(
                f"micro_batch {run.train.micro_batch} does not divide the {per_rank} sequences per rank of a step"
            )
        return (run.train.micro_batch,)

    def _sizes(self, scheme: Scheme) -> tuple[int, ...]:
        """The micro batches that a scheme may choose from: all, or those that the run's own DeepSpeed file allows."""
        if scheme.layout.ds_config is None or not fixes_batch(scheme.layout):
            return self.micro_batches
        return tuple(size for size in self.micro_batches if _is_allowed(self.costs.schemes[scheme], size))

    def run(self, limit: float = math.inf) -> Plan | None:
        """Search for the best plan that fits and whose time class is below ``limit``; None: there is no such plan."""
        while self.queue:
            entry = heapq.heappop(self.queue)
            if entry.key[0] >= limit:
                return None
            if entry.micro is not None:
                return self._plan(entry.bracket.costs, entry.micro)
            self._examine(entry.bracket)
        return None

    def closest(self) -> Plan:
        """The plan nearest to fitting: each layout and kind of loss at its smallest micro batch and heaviest recompute."""
        plans = (self._plan(self._with(each, self.recomputes[-1]), each.sizes[0]) for each in self.opened)
        return min(plans, key=lambda plan: (plan.shortage, plan.total_bytes))

    def _with(self, each: Bracket, recompute: str) -> SchemeCosts:
        return self.costs.schemes[each.costs.scheme._replace(recompute=recompute)]

    def _push(self, each: Bracket, micro: int | None = None) -> None:
        costs = each.costs
        seconds = costs.totals[micro or self._by_speed(each)[0]].seconds(self.rates)
        key = key_of(seconds, costs.scheme, self.own, self.costs.ranks)
        heapq.heappush(self.queue, _Entry(key, next(self.order), each, micro))

    # --- the micro batches of a scheme ---------------------------------------------------------------------------------

    def _by_speed(self, each: Bracket) -> list[int]:
        """The largest micro batch that may still fit, and the smaller ones that may be faster, the fastest first.

        A smaller micro batch can be faster only with the chunked loss, if the loss then runs in fewer chunks per step.
        """
        costs, largest = each.costs, each.largest
        rivals = self.costs.fewer_chunks[each.sizes, each.high] if costs.scheme.loss == "chunked" else ()
        if not rivals:
            return [largest]
        return sorted((largest, *rivals), key=lambda size: costs.totals[size].seconds(self.rates))

    def _examine(self, each: Bracket) -> None:
        """Exclude micro batches of a scheme that do not fit, and queue the scheme again if at least one is left."""
        hoped, now = self._by_speed(each)[0], None
        if each.bounded:
            each.probe()
        elif self._fits_host(each):
            each.bound()
        else:
            each.close()
        if each.low < each.high:
            now = self._by_speed(each)[0]
            self._push(each)
        elif each.high:
            now = next(filter(each.fits, self._by_speed(each)))
            self._push(each, now)
        if now != hoped and each.costs.scheme not in self.made_heavier:
            self._push_heavier(each)

    def _push_heavier(self, each: Bracket) -> None:
        """Queue the same scheme with the next heavier recompute, so that a larger, faster micro batch may fit."""
        scheme = each.costs.scheme
        self.made_heavier.add(scheme)
        heavier = self.recomputes.index(scheme.recompute) + 1
        if heavier < len(self.recomputes):
            self._push(self._bracket(scheme._replace(recompute=self.recomputes[heavier]), each.sizes))

    def _fits_host(self, each: Bracket) -> bool:
        """Whether host memory can hold the scheme's offloaded tensors, whose size does not depend on the micro batch."""
        machine = self.question.machine
        if machine.host_bytes is None or each.costs.scheme.layout.offload == "none":
            return True
        return host_needed(machine, each.costs.predictions[each.sizes[0]].host_bytes) <= machine.host_bytes

    def _plan(self, costs: SchemeCosts, micro: int) -> Plan:
        return self.estimator.plan(
            costs.runs[micro], self.costs.batch(micro), costs.predictions[micro], costs.work[micro]
        )


def _is_allowed(costs: SchemeCosts, micro: int) -> bool:
    try:
        return bool(costs.predictions[micro])
    except InputError:
        return False


# --- fewer cards -----------------------------------------------------------------------------------------------------


def _on_fewer_cards(whole: _Search, best: Plan | None) -> Plan | None:
    """The best plan on fewer cards if its time class is lower than that of ``best``, the plan on all cards; else ``best``."""
    question, machine = whole.question, whole.question.machine
    sequences = whole.costs.per_rank * machine.ranks
    least = whole.estimator.least_seconds(question.run) * sequences
    for nodes, gpus in _fewer_cards(machine, sequences):
        limit = plan_key(best, question.run)[0] if best else math.inf
        if time_class(least / (nodes * gpus)) >= limit:
            break  # the lower bound only rises with fewer cards
        smaller = replace(question, machine=machine.with_cards(gpus=gpus, nodes=nodes))
        try:
            best = _Search(smaller, layouts(smaller)).run(limit) or best
        except InputError:  # the fixed settings do not work on this number of cards
            continue
    return best


def _fewer_cards(machine: Machine, sequences: int) -> list[tuple[int, int]]:
    """Pairs (machines, cards in each) with fewer cards than the machine has, among which a step's sequences divide evenly.

    Pairs with the most cards come first.
    """
    sizes = itertools.product(range(1, machine.nodes + 1), range(1, machine.gpus + 1))
    fewer = [size for size in sizes if size[0] * size[1] < machine.ranks and sequences % (size[0] * size[1]) == 0]
    return sorted(fewer, key=lambda size: (-size[0] * size[1], size[0]))
