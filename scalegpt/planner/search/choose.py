"""Finds the fastest plan that fits.

Settings that the user fixed are kept. All combinations of the others are considered: backend, ZeRO stage, offload,
recompute, loss, and every micro batch that divides the step. Fewer cards than the machine has are considered too, since
communication may cost more time than further cards save. The tokens per step are not changed.

Extra machinery must pay for itself: offload, each heavier kind of recompute, and sharding, DeepSpeed or a loss that the
run does not name. Each kind must save more than :data:`ERROR`, the error of the time model, so it multiplies a plan's
time by 1 + ERROR before plans are compared (:func:`handicap`). These times are sorted into classes of the relative
width :data:`TIE` (:func:`time_class`). Within a class times count as equal, and the simpler scheme (layout, recompute,
loss) wins: nothing offloaded before offload, then less recompute, the layout that the preset names, ``plain`` before
``fsdp`` before ``deepspeed``, a lower stage, the preset's loss (:func:`simplicity`).

The search predicts memory only where the result may change the choice. Three facts make that possible: heavier
recompute is never faster at the same micro batch; memory grows with the micro batch (with the exceptions in
:mod:`scalegpt.planner.search.bracket`); and only the fastest plan is wanted. A queue orders schemes by a lower bound on
their time: the time with the fastest micro batch that has not been excluded for its memory. Each round takes the first
scheme from the queue. It either excludes some of the scheme's micro batches or finds the fastest one that fits. If the
scheme's fastest micro batch turns out not to fit, the same scheme with heavier recompute joins the queue.
``tests/planner/test_search.py`` compares the results with brute force over the whole space.
"""

import heapq
import itertools
import math
from dataclasses import replace
from typing import NamedTuple

from scalegpt.config.run import ParallelConfig
from scalegpt.errors import InputError
from scalegpt.hardware.machine import Machine
from scalegpt.planner.plan import Estimator, Plan, host_needed
from scalegpt.planner.search.bracket import Bracket
from scalegpt.planner.search.costs import SchemeCosts
from scalegpt.planner.search.layouts import layouts
from scalegpt.planner.search.question import Found, Question, Scheme
from scalegpt.planner.search.ranking import Key, plan_key, time_class
from scalegpt.planner.search.space import Space, Start


def choose(question: Question) -> Found:
    """Find the fastest plan that fits, or among plans in one time class the simplest.

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
    """Set ``tokens_per_step``, if None, to the tokens of a step on all cards, so that searches on fewer cards keep it."""
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
        key: the sort key, a lower bound unless ``micro`` is known.
        order: the number of the entry, which decides between equal keys.
        start: the scheme.
        bracket: its range of micro batches; None: the scheme was not examined yet.
        micro: the fastest micro batch that fits, if it is known; else None.
    """

    key: Key
    order: int
    start: Start
    bracket: Bracket | None = None
    micro: int | None = None


class _Search:
    """The search for the best plan on all cards of the question's machine.

    Args:
        question: the question, with its tokens per step set.
        over: the layouts to choose from.

    Raises:
        InputError: the step cannot be divided among the ranks, or into the fixed micro batch.
    """

    def __init__(self, question: Question, over: tuple[ParallelConfig, ...]) -> None:
        self.question = question
        self.estimator = Estimator(question.machine, question.calibration)
        self.rates = self.estimator.rates(question.run)
        self.space = Space.of(question, self.estimator, over)
        self.queue: list[_Entry] = []
        self.order = itertools.count()
        self.made_heavier: set[Scheme] = set()

    def run(self, limit: float = math.inf) -> Plan | None:
        """Search for the best plan that fits and whose time class is below ``limit``; None: there is no such plan."""
        if self.space.least_class(self.rates) >= limit:
            return None
        for start in self.space.lightest:
            self._open(start)
        while self.queue:
            entry = heapq.heappop(self.queue)
            if entry.key[0] >= limit:
                return None
            if entry.micro is not None:
                return self._plan(entry.start.costs, entry.micro)
            self._examine(entry.start, entry.bracket or self._bracket(entry.start))
        return None

    def closest(self) -> Plan:
        """The plan nearest to fitting: each layout and kind of loss at its smallest micro batch and heaviest recompute."""
        plans = (self._plan(self._with(each, self.space.recomputes[-1]), each.sizes[0]) for each in self.space.lightest)
        return min(plans, key=lambda plan: (plan.shortage, plan.total_bytes))

    def _with(self, start: Start, recompute: str) -> SchemeCosts:
        return self.space.costs.schemes[start.costs.scheme._replace(recompute=recompute)]

    def _open(self, start: Start) -> None:
        """Queue a scheme for the first time."""
        heapq.heappush(self.queue, _Entry(start.key(self.rates), next(self.order), start))

    def _push(self, start: Start, each: Bracket, micro: int, *, fits: bool = False) -> None:
        """Queue a scheme again, with its time at ``micro``. ``fits`` says whether this micro batch is known to fit."""
        key = start.standing.key(each.costs.totals[micro].seconds(self.rates))
        heapq.heappush(self.queue, _Entry(key, next(self.order), start, each, micro if fits else None))

    # --- the micro batches of a scheme ---------------------------------------------------------------------------------

    def _bracket(self, start: Start) -> Bracket:
        overheads = self.estimator.overheads(start.costs.runs[start.sizes[0]], self.space.costs.ranks)
        return Bracket(start.costs, start.sizes, overheads, self.question.limit)

    def _by_speed(self, each: Bracket) -> list[int]:
        """The micro batches that are not excluded and may be the fastest, the fastest first."""
        contenders, totals = each.costs.contenders(each.sizes, each.high), each.costs.totals
        return sorted(contenders, key=lambda micro: totals[micro].seconds(self.rates))

    def _examine(self, start: Start, each: Bracket) -> None:
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
            self._push(start, each, now)
        elif each.high:
            now = next(filter(each.fits, self._by_speed(each)))
            self._push(start, each, now, fits=True)
        if now != hoped and start.costs.scheme not in self.made_heavier:
            self._open_heavier(start)

    def _open_heavier(self, start: Start) -> None:
        """Queue the same scheme with the next heavier recompute, so that a larger, faster micro batch may fit."""
        self.made_heavier.add(start.costs.scheme)
        heavier = self.space.heavier(start)
        if heavier is not None:
            self._open(heavier)

    def _fits_host(self, each: Bracket) -> bool:
        """Whether host memory can hold the scheme's offloaded tensors, whose size does not depend on the micro batch."""
        machine = self.question.machine
        if machine.host_bytes is None or each.costs.scheme.layout.offload == "none":
            return True
        return host_needed(machine, each.costs.host_bytes[each.sizes[0]]) <= machine.host_bytes

    def _plan(self, costs: SchemeCosts, micro: int) -> Plan:
        return self.estimator.plan(
            costs.runs[micro], self.space.costs.batch(micro), costs.predictions[micro], costs.work[micro]
        )


# --- fewer cards -----------------------------------------------------------------------------------------------------


def _on_fewer_cards(whole: _Search, best: Plan | None) -> Plan | None:
    """The best plan on fewer cards if its time class is lower than that of ``best``, the plan on all cards; else ``best``."""
    question, machine = whole.question, whole.question.machine
    sequences = whole.space.costs.per_rank * machine.ranks
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
