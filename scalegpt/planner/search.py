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

All of it is never predicted. Heavier recompute is never faster at the same micro batch, memory grows with the micro batch
(but see :mod:`scalegpt.planner.bracket`), and no more than the fastest is asked for. A queue holds lines of micro batches by
the least time that each can still take: that of the fastest one which is not known to exceed the card. The first is looked
at once more, which rules out some of its micro batches, or settles it; heavier recompute joins when a line cannot have the
micro batch that it was hoped to. So memory is found out only where it may decide. ``tests/planner/test_search.py`` holds all
this to brute force over the whole space.
"""

import heapq
import itertools
import math
from dataclasses import dataclass, field, replace

from scalegpt.config import RunConfig
from scalegpt.config.machine import MachineConfig
from scalegpt.config.run import BACKENDS, OFFLOADS, PLANNED, ParallelConfig
from scalegpt.config.train import LOSSES, RECOMPUTE
from scalegpt.errors import InputError
from scalegpt.planner.batches import divisors, sequences_per_rank
from scalegpt.planner.bracket import Bracket
from scalegpt.planner.calibration import Calibration
from scalegpt.planner.deepspeed_settings import fixes_batch
from scalegpt.planner.layouts import layouts
from scalegpt.planner.machine import Machine
from scalegpt.planner.plan import Estimator, Plan
from scalegpt.planner.space import Line, Setting, Space

MARGIN = MachineConfig().margin
"""Share of a card's memory that a chosen plan leaves free: what lies outside the step's tensors is known less exactly."""

TIE = 0.02
"""Relative width of a class of times that count as equal."""

ERROR = 0.071
"""The time model's mean absolute error where our trainer stands in for the published runs (docs/PLANNER.md, generated)."""

Simplicity = tuple[int, int, bool, int, int, bool]
Key = tuple[int, Simplicity, float]
"""What plans are sorted by: class of time, simplicity, seconds; times with the margins of their machinery."""


def time_class(seconds: float) -> int:
    """The class of times that count as equal.

    More memory, more cards or a faster card never raise the least time, margins included, of all plans that fit. The chosen
    plan is in the class of that least time, so that its class never rises either. Its time without the margins may, by less
    than a tie and the margins of the machinery that it no longer needs, where something simpler has come to fit. That does
    not add up, through however many improvements. Only to take the fastest always, by however little, would rule it out.
    """
    return math.floor(math.log(seconds) / math.log1p(TIE))


def machinery(layout: ParallelConfig, recompute: str, loss: str, run: RunConfig, ranks: int) -> int:
    """How many kinds of machinery a setting has that must pay for themselves.

    Args:
        layout: who holds what.
        recompute: its kind.
        loss: its kind.
        run: the run; the layout and the loss that it names are no machinery.
        ranks: data-parallel ranks; over one, the ZeRO stage divides nothing.
    """
    own = run.parallel
    named = (layout.backend, layout.stage) == (own.backend, own.stage)
    if named or layout.backend == "plain":
        sharding = 0
    elif layout.offload != "none" and ranks == 1:
        sharding = 0  # it is what offload takes there
    else:
        sharding = (layout.stage > 0 or layout.backend == "deepspeed") + (layout.stage == 3 and ranks > 1)
    return sharding + (layout.offload != "none") + RECOMPUTE.index(recompute) + (loss != run.train.loss)


def handicap(layout: ParallelConfig, recompute: str, loss: str, run: RunConfig, ranks: int) -> float:
    """What a setting's time is multiplied by before it is compared: a margin of :data:`ERROR` for each kind of machinery."""
    return (1 + ERROR) ** machinery(layout, recompute, loss, run, ranks)


def simplicity(layout: ParallelConfig, recompute: str, loss: str, run: RunConfig) -> Simplicity:
    """A key that sorts simpler settings first; ``run`` names the layout and the loss that count as simplest."""
    own = run.parallel
    return (
        OFFLOADS.index(layout.offload),
        RECOMPUTE.index(recompute),
        (layout.backend, layout.stage) != (own.backend, own.stage),
        BACKENDS.index(layout.backend),
        layout.stage,
        loss != run.train.loss,
    )


def plan_key(plan: Plan, run: RunConfig) -> Key:
    """What a plan is sorted by, among plans for the same run."""
    train, layout = plan.run.train, plan.run.parallel
    seconds = plan.seconds * handicap(layout, train.recompute, train.loss, run, plan.machine.ranks)
    return time_class(seconds), simplicity(layout, train.recompute, train.loss, run), seconds


@dataclass(frozen=True)
class Question:
    """What is to be chosen.

    Attributes:
        run: the run; of settings that are open it says which value is the simplest, since a preset names it.
        machine: what it runs on.
        open: which settings may be chosen.
        margin: share of the card's memory to leave free.
        calibration: measurements that correct the overheads.
        fewer: whether fewer cards than the machine has may be used.
    """

    run: RunConfig
    machine: Machine
    open: frozenset[str] = PLANNED
    margin: float = MARGIN
    calibration: Calibration = field(default_factory=Calibration)
    fewer: bool = True

    @property
    def limit(self) -> float:
        """Bytes that a plan may take on each card."""
        usable = self.machine.usable_bytes
        return float("inf") if usable is None else usable * (1 - self.margin)


@dataclass(frozen=True)
class Found:
    """The outcome of a search.

    Attributes:
        best: the fastest plan that fits; None: none does.
        closest: where none fits, the plan on all cards that lacks least.
    """

    best: Plan | None
    closest: Plan | None = None


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


# --- the search over one number of ranks -----------------------------------------------------------------------------


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
