"""The fastest configuration that fits.

What a user has fixed is kept; of everything else all combinations are considered: backend, ZeRO stage, offload, recompute,
loss, every micro batch that divides the step, and fewer cards than there are, where sending would cost more than they bring.
Tokens per step stay as they are.

Machinery must pay: offload, each heavier kind of recompute, sharding or DeepSpeed where the run does not name them, and a
loss that the run does not name must each win by more than :data:`ERROR`, the time model's own error. Times are therefore
compared with that margin added for each kind (:func:`handicap`). What is then within :data:`TIE` is a tie: the simpler
setting wins, in this order: nothing offloaded, less recompute, the layout that the preset names, ``plain`` before ``fsdp``
before ``deepspeed``, a lower stage, the preset's loss. To that end times are sorted into classes, each a tie wider than the
one before.

All of it is never predicted. Heavier recompute is never faster at the same micro batch, memory grows with the micro
batch (but see :mod:`scalegpt.planner.search.bracket`), and no more than the fastest is asked for. A queue holds lines
of micro batches by the least time that each can still take: that of the fastest one which is not known to exceed the
card. The first is looked at once more, which rules out some of its micro batches, or settles it; heavier recompute
joins when a line cannot have the micro batch that it was hoped to. So memory is found out only where it may decide.
``tests/planner/test_search.py`` holds all this to brute force over the whole space.
"""

import heapq
import itertools
import math
from dataclasses import dataclass, field, replace

from scalegpt.config.run import ParallelConfig
from scalegpt.config.train import LOSSES, RECOMPUTE
from scalegpt.errors import InputError
from scalegpt.hardware.machine import Machine
from scalegpt.planner.batches import divisors, sequences_per_rank
from scalegpt.planner.memory.deepspeed.settings import fixes_batch
from scalegpt.planner.plan import Estimator, Plan
from scalegpt.planner.search.bracket import Bracket
from scalegpt.planner.search.layouts import layouts
from scalegpt.planner.search.question import Found, Question
from scalegpt.planner.search.ranking import Key, handicap, plan_key, simplicity, time_class
from scalegpt.planner.search.space import Line, Setting, Space


def choose(question: Question) -> Found:
    """The fastest plan that fits; of equally fast ones the simplest.

    Raises:
        InputError: the tokens of a step cannot be divided among the ranks, or what is fixed does not go together.
    """
    question = with_tokens(question)
    whole = _Search(question, layouts(question))
    found = whole.run()
    found = _on_fewer_cards(question, found) if question.fewer else found
    return found if found.best is not None else Found(None, whole.closest())


def with_tokens(question: Question) -> Question:
    """The question with the tokens of its step written down: they stay, however many cards are used."""
    run = question.run
    if run.train.tokens_per_step is not None:
        return question
    tokens = run.train.micro_batch * question.machine.ranks * run.model.block_size
    return replace(question, run=replace(run, train=run.train.changed(tokens_per_step=tokens)))


def best_of_layout(question: Question, layout: ParallelConfig) -> Found:
    """The fastest plan that fits and is laid out so."""
    search = _Search(with_tokens(question), (layout,))
    found = search.run()
    return found if found.best is not None else Found(None, search.closest())


@dataclass(order=True, slots=True)
class _Entry:
    """A line in the queue: with the least that its key can be, or with the micro batch that it gets and its key then."""

    key: Key
    bracket: Bracket = field(compare=False)
    micro: int | None = field(compare=False, default=None)


class _Search:
    """The search over the ranks of one machine.

    Args:
        question: what is to be chosen, with its tokens per step.
        over: the layouts to choose among.

    Raises:
        InputError: the step cannot be divided so.
    """

    def __init__(self, question: Question, over: tuple[ParallelConfig, ...]) -> None:
        self.question = question
        run, machine, open_ = question.run, question.machine, question.open
        self.estimator = Estimator(machine, question.calibration)
        self.rates, self.limit = self.estimator.rates(run), question.limit
        self.space = Space.of(run, machine.ranks, self.estimator.kernel(run), self.estimator.compiles(run))
        self.micro_batches = self._micro_batches()
        self.recomputes = RECOMPUTE if "recompute" in open_ else (run.train.recompute,)
        self.queue: list[_Entry] = []
        losses = LOSSES if "loss" in open_ else (run.train.loss,)
        self.made_heavier: set[Setting] = set()
        self.opened: list[Bracket] = []
        for layout in over:
            sizes = self._sizes(Setting(layout, self.recomputes[0], losses[0]))
            settings = (Setting(layout, self.recomputes[0], loss) for loss in losses)
            self.opened += [self._bracket(self.space.line(each), sizes) for each in settings if sizes]
        if not self.opened:  # let it say what its DeepSpeed file forbids
            self.space.line(Setting(over[0], self.recomputes[0], losses[0])).prediction(self.micro_batches[0])
        for each in self.opened:
            self._push(each)

    def _bracket(self, line: Line, sizes: tuple[int, ...]) -> Bracket:
        run = self.space.candidate(line.setting, sizes[0])
        return Bracket(line, sizes, self.estimator.overheads(run, self.question.machine.ranks), self.limit)

    def _micro_batches(self) -> tuple[int, ...]:
        run, per_rank = self.question.run, self.space.per_rank
        if "micro_batch" in self.question.open:
            # A processor gains nothing from more than the run itself asks for.
            most = math.inf if self.question.machine.is_gpu else run.train.micro_batch
            return tuple(size for size in divisors(per_rank) if size <= most)
        if per_rank % run.train.micro_batch:
            raise InputError(
                f"micro_batch {run.train.micro_batch} does not divide the {per_rank} sequences per rank of a step"
            )
        return (run.train.micro_batch,)

    def _sizes(self, setting: Setting) -> tuple[int, ...]:
        """The micro batches to choose among: all, unless the run's own DeepSpeed file says which."""
        if setting.layout.ds_config is None or not fixes_batch(setting.layout):
            return self.micro_batches
        return tuple(size for size in self.micro_batches if _is_allowed(self.space.line(setting), size))

    def run(self, limit: float = math.inf) -> Found:
        """The best plan whose class of time is below the limit."""
        while self.queue:
            entry = heapq.heappop(self.queue)
            if entry.key[0] >= limit:
                return Found(None)
            if entry.micro is not None:
                return Found(self._plan(entry.bracket.line, entry.micro))
            self._look(entry.bracket)
        return Found(None)

    def closest(self) -> Plan:
        """The plan that lacks least: the smallest micro batch, with all recomputed that may be."""
        plans = (self._plan(self._with(each, self.recomputes[-1]), each.sizes[0]) for each in self.opened)
        return min(plans, key=lambda plan: (plan.shortage, plan.total_bytes))

    def _with(self, each: Bracket, recompute: str) -> Line:
        return self.space.line(each.line.setting._replace(recompute=recompute))

    def _push(self, each: Bracket, micro: int | None = None) -> None:
        line, setting = each.line, each.line.setting
        run, ranks = self.question.run, self.question.machine.ranks
        seconds = line.step(micro or self._fastest(each)).seconds(self.rates)
        seconds *= handicap(setting.layout, setting.recompute, setting.loss, run, ranks)
        simple = simplicity(setting.layout, setting.recompute, setting.loss, run)
        heapq.heappush(self.queue, _Entry((time_class(seconds), simple, seconds), each, micro))

    # --- the micro batches of a line -----------------------------------------------------------------------------------

    def _fastest(self, each: Bracket) -> int:
        """The fastest micro batch that may still fit."""
        return self._by_speed(each)[0]

    def _by_speed(self, each: Bracket) -> list[int]:
        """The largest micro batch that may still fit and those that may be faster; the fastest first.

        Faster than the largest are only those with which the tokens fill the chunks of the loss better.
        """
        line, largest = each.line, each.largest
        rivals = self.space.fewer_chunks(each.sizes, each.high) if line.setting.loss == "chunked" else ()
        if not rivals:
            return [largest]
        return sorted((largest, *rivals), key=lambda size: line.step(size).seconds(self.rates))

    def _look(self, each: Bracket) -> None:
        """Find out about one more micro batch of a line, and put the line back where it belongs now."""
        hoped = self._fastest(each)
        if each.bounded:
            each.probe()
        elif self._fits_host(each):
            each.bound()
        else:
            each.close()
        now = None
        if each.low < each.high:
            now = self._fastest(each)
            self._push(each)
        elif each.high:
            now = next(filter(each.fits, self._by_speed(each)))
            self._push(each, now)
        if now != hoped and each.line.setting not in self.made_heavier:
            self._push_heavier(each)

    def _push_heavier(self, each: Bracket) -> None:
        """Put the line with more recompute beside this one, which is not as fast as it could be."""
        self.made_heavier.add(each.line.setting)
        heavier = self.recomputes.index(each.line.setting.recompute) + 1
        if heavier < len(self.recomputes):
            self._push(self._bracket(self._with(each, self.recomputes[heavier]), each.sizes))

    def _fits_host(self, each: Bracket) -> bool:
        """Whether what is offloaded has room, whatever the micro batch."""
        known = self.question.machine.host_bytes is not None
        layout = each.line.setting.layout
        return not known or layout.offload == "none" or self._plan(each.line, each.sizes[0]).fits_host

    def _plan(self, line: Line, micro: int) -> Plan:
        space, prediction = self.space, line.prediction(micro)
        return self.estimator.plan(space.candidate(line.setting, micro), space.batch(micro), prediction)


def _is_allowed(line: Line, micro: int) -> bool:
    try:
        return bool(line.prediction(micro))
    except InputError:
        return False


# --- fewer cards -----------------------------------------------------------------------------------------------------


def _on_fewer_cards(question: Question, found: Found) -> Found:
    """What is found, or a plan on fewer cards that is faster."""
    machine = question.machine
    sequences = sequences_per_rank(question.run, machine.ranks) * machine.ranks
    least = Estimator(machine, question.calibration).least_seconds(question.run) * sequences
    for nodes, gpus in _fewer_cards(machine, sequences):
        limit = plan_key(found.best, question.run)[0] if found.best else math.inf
        if time_class(least / (nodes * gpus)) >= limit:
            break  # and so with fewer still
        smaller = replace(question, machine=machine.with_cards(gpus=gpus, nodes=nodes))
        try:
            other = _Search(smaller, layouts(smaller)).run(limit)
        except InputError:  # what is fixed does not go with so many cards
            continue
        found = other if other.best is not None else found
    return found


def _fewer_cards(machine: Machine, sequences: int) -> list[tuple[int, int]]:
    """Fewer machines, or fewer cards in each, among which the sequences of a step can be divided; the most cards first."""
    sizes = itertools.product(range(1, machine.nodes + 1), range(1, machine.gpus + 1))
    fewer = [size for size in sizes if size[0] * size[1] < machine.ranks and sequences % (size[0] * size[1]) == 0]
    return sorted(fewer, key=lambda size: (-size[0] * size[1], size[0]))
