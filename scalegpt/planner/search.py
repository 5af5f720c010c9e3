"""The fastest configuration that fits.

What a user has fixed is kept; of everything else all combinations are considered: backend, ZeRO stage, offload, recompute,
loss, every micro batch that divides the step, and fewer cards than there are, where sending would cost more than they bring.
Tokens per step stay as they are.

Times within :data:`TIE` of each other are a tie, since the time model cannot tell them apart: the simpler setting wins, in
this order: nothing offloaded, less recompute, the layout that the preset names, ``plain`` before ``fsdp`` before
``deepspeed``, a lower stage, the preset's loss. To that end times are sorted into classes, each so much wider than the
one before.

All of it is never predicted. Heavier recompute is never faster at the same micro batch, memory grows with the micro batch
(but see :meth:`_Search._largest_that_fits`), and no more than the fastest is asked for. So the search takes what would be
fastest if memory were endless, finds its fastest micro batch that fits, and tries heavier recompute only where that was not
the fastest of all. ``tests/planner/test_search.py`` holds it to brute force over the whole space.
"""

import bisect
import heapq
import itertools
import math
from dataclasses import dataclass, field, replace
from functools import lru_cache

from scalegpt.config import RunConfig
from scalegpt.config.machine import MachineConfig
from scalegpt.config.run import BACKENDS, OFFLOADS, PLANNED, STAGES, ParallelConfig
from scalegpt.config.train import LOSSES, RECOMPUTE
from scalegpt.errors import InputError
from scalegpt.planner.batches import divisors, sequences_per_rank
from scalegpt.planner.calibration import Calibration
from scalegpt.planner.deepspeed_settings import fixes_batch
from scalegpt.planner.machine import Machine
from scalegpt.planner.plan import Estimator, Plan
from scalegpt.planner.space import Setting, Space
from scalegpt.planner.states import rank_states

MARGIN = MachineConfig().margin
"""Share of a card's memory that a chosen plan leaves free: what lies outside the step's tensors is known less exactly."""

TIE = 0.02
"""Relative width of a class of times that count as equal."""

Simplicity = tuple[int, int, bool, int, int, bool]
Key = tuple[int, Simplicity, float]
"""What plans are sorted by: class of time, simplicity, seconds."""


def time_class(seconds: float) -> int:
    """The class of times that count as equal."""
    return math.floor(math.log(seconds) / math.log1p(TIE))


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
    train = plan.run.train
    return time_class(plan.seconds), simplicity(plan.run.parallel, train.recompute, train.loss, run), plan.seconds


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
    question = _with_tokens(question)
    whole = _Search(question, layouts(question))
    found = whole.run()
    found = _on_fewer_cards(question, found) if question.fewer else found
    return found if found.best is not None else Found(None, whole.closest())


def _with_tokens(question: Question) -> Question:
    """The question with the tokens of its step written down: they stay, however many cards are used."""
    run = question.run
    if run.train.tokens_per_step is not None:
        return question
    tokens = run.train.micro_batch * question.machine.ranks * run.model.block_size
    return replace(question, run=replace(run, train=run.train.changed(tokens_per_step=tokens)))


def best_of_layout(question: Question, layout: ParallelConfig) -> Found:
    """The fastest plan that fits and is laid out so."""
    search = _Search(_with_tokens(question), (layout,))
    found = search.run()
    return found if found.best is not None else Found(None, search.closest())


def layouts(question: Question) -> tuple[ParallelConfig, ...]:
    """Who may hold what: the run's own layout where nothing is open, else all that work; the simplest first.

    Over one rank sharding divides nothing: it is considered only with offload, or where it is fixed. A processor has
    nothing to gain from offload, since its memory is the host's.

    Raises:
        InputError: nothing that is fixed together works.
    """
    own, open_, ranks = question.run.parallel, question.open, question.machine.ranks
    backends = BACKENDS if "backend" in open_ else (own.backend,)
    found = []
    for backend in backends:
        if backend == "plain" and ranks > 1:
            continue
        stages = (
            STAGES[backend] if "zero_stage" in open_ else (own.zero_stage if own.zero_stage is not None else own.stage,)
        )
        offloads = (own.offload,) if "offload" not in open_ else OFFLOADS if question.machine.is_gpu else ("none",)
        for stage, offload in itertools.product(stages, offloads):
            layout = _layout(own, backend, stage, offload)
            if layout is not None and (ranks > 1 or _makes_sense_alone(layout, open_)):
                found.append(layout)
    if not found:
        raise InputError(
            f"no backend does this over {ranks} rank{'s' if ranks > 1 else ''}: zero_stage {own.zero_stage}, "
            f"offload {own.offload}, backend {own.backend if 'backend' not in open_ else 'auto'}; leave one of them open"
        )
    return tuple(found)


def _layout(own: ParallelConfig, backend: str, stage: int, offload: str) -> ParallelConfig | None:
    """A layout, with the run's own DeepSpeed file where it is of the same kind; None where no library runs it."""
    same = backend == own.backend and stage == own.stage and offload == own.offload
    return _made(backend, stage, offload, own.ds_config if same else None)


@lru_cache(maxsize=256)
def _made(backend: str, stage: int, offload: str, ds_config: str | None) -> ParallelConfig | None:
    try:
        return ParallelConfig(backend=backend, zero_stage=stage, offload=offload, ds_config=ds_config)
    except InputError:  # the configuration knows what does not go together
        return None


def _makes_sense_alone(layout: ParallelConfig, open_: frozenset[str]) -> bool:
    if layout.offload != "none" or "zero_stage" not in open_:
        return True
    return layout.stage == 0 and (layout.backend == "plain" or "backend" not in open_)


# --- the search over one number of ranks -----------------------------------------------------------------------------


@dataclass(order=True)
class _Entry:
    """A setting in the queue: with the least that its key can be, or with the micro batch that it gets and its key then."""

    key: Key
    order: int
    setting: Setting = field(compare=False)
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
        self.sizes: dict[ParallelConfig, tuple[int, ...]] = {}
        self.recomputes = RECOMPUTE if "recompute" in open_ else (run.train.recompute,)
        self.queue: list[_Entry] = []
        self.order = itertools.count()
        losses = LOSSES if "loss" in open_ else (run.train.loss,)
        settings = [Setting(*each) for each in itertools.product(over, self.recomputes[:1], losses)]
        self.settings = [each for each in settings if self._sizes(each)]
        if not self.settings:
            self.space.prediction(settings[0], self.micro_batches[0])  # says what its DeepSpeed file forbids
        for each in self.settings:
            self._push(each)

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
        layout = setting.layout
        if layout not in self.sizes:
            free = layout.ds_config is None or not fixes_batch(layout)
            allowed = (size for size in self.micro_batches if free or self._is_allowed(setting, size))
            self.sizes[layout] = tuple(allowed)
        return self.sizes[layout]

    def _is_allowed(self, setting: Setting, micro: int) -> bool:
        try:
            return bool(self.space.prediction(setting, micro))
        except InputError:
            return False

    def run(self, limit: float = math.inf) -> Found:
        """The best plan whose class of time is below the limit."""
        while self.queue:
            entry = heapq.heappop(self.queue)
            if entry.key[0] >= limit:
                return Found(None)
            if entry.micro is not None:
                return Found(self._plan(entry.setting, entry.micro))
            micro = self._fastest_that_fits(entry.setting)
            if micro is not None:
                self._push(entry.setting, micro)
            if micro != self._fastest(entry.setting):
                heavier = self.recomputes.index(entry.setting.recompute) + 1
                if heavier < len(self.recomputes):
                    self._push(entry.setting._replace(recompute=self.recomputes[heavier]))
        return Found(None)

    def closest(self) -> Plan:
        """The plan that lacks least: the smallest micro batch, with all recomputed that may be."""
        lightest = [each._replace(recompute=self.recomputes[-1]) for each in self.settings]
        plans = (self._plan(each, self._sizes(each)[0]) for each in lightest)
        return min(plans, key=lambda plan: (not plan.fits_host, plan.total_bytes))

    def _push(self, setting: Setting, micro: int | None = None) -> None:
        seconds = self._seconds(setting, micro or self._fastest(setting))
        simple = simplicity(setting.layout, setting.recompute, setting.loss, self.question.run)
        heapq.heappush(self.queue, _Entry((time_class(seconds), simple, seconds), next(self.order), setting, micro))

    def _fastest(self, setting: Setting, most: float = math.inf) -> int:
        """The fastest micro batch up to one: the largest, unless its tokens fill the chunks of the loss badly."""
        sizes = [size for size in self._sizes(setting) if size <= most]
        if setting.loss == "full":
            return sizes[-1]
        chunks = self._chunks(sizes[-1])
        rivals = [size for size in sizes if self._chunks(size) < chunks]
        return min((sizes[-1], *rivals), key=lambda size: self._seconds(setting, size)) if rivals else sizes[-1]

    def _chunks(self, micro: int) -> int:
        """Chunks of the loss in a step."""
        run = self.question.run
        return self.space.per_rank // micro * -(-micro * run.model.block_size // run.train.loss_chunk)

    def _fastest_that_fits(self, setting: Setting) -> int | None:
        """The fastest micro batch that fits; None: not even one sequence does."""
        largest = self._largest_that_fits(setting)
        return None if largest is None else self._fastest(setting, largest)

    def _largest_that_fits(self, setting: Setting) -> int | None:
        """The largest micro batch that fits; None: not even one sequence does.

        Memory grows with the micro batch, and about evenly, which tells where to look. But with a single micro step no
        gradients wait, and with two FSDP2 has none in which whole gradients wait and none is reduced, so that either may take
        less than a smaller micro batch.
        """
        sizes, least = self._sizes(setting), self._least_bytes(setting.layout)
        if least > self.limit:
            return None
        if not self._fits_host(setting, sizes[0]):
            return None
        high = len(sizes)
        below, above = (0, least), (0, least)  # what a micro batch takes that fits, and one that does not
        apart = 3 if setting.layout.backend == "fsdp" and setting.layout.stage != 3 else 2
        while high and (high == len(sizes) or self.space.per_rank // sizes[high - 1] < apart):
            high -= 1
            above = sizes[high], self._total(setting, sizes[high])
            if above[1] <= self.limit:
                return sizes[high]
        low = 0
        while low < high:
            place = self._between(sizes, below, above, low, high)
            total = self._total(setting, sizes[place])
            if total <= self.limit:
                low, below = place + 1, (sizes[place], total)
            else:
                high, above = place, (sizes[place], total)
        return sizes[low - 1] if low else None

    def _between(
        self, sizes: tuple[int, ...], below: tuple[int, float], above: tuple[int, float], low: int, high: int
    ) -> int:
        """The place in [low, high) of the micro batch that fills the card if memory grows evenly between two of them."""
        slope = (above[1] - below[1]) / max(1, above[0] - below[0])
        guess = below[0] + (self.limit - below[1]) / slope if slope > 0 else sizes[high - 1]
        return min(high - 1, max(low, bisect.bisect_right(sizes, guess) - 1))

    def _least_bytes(self, layout: ParallelConfig) -> float:
        """Bytes that any plan with this layout holds at least: weights and optimizer state, unless they are offloaded."""
        if layout.offload != "none":
            return 0.0
        states = rank_states(replace(self.question.run, parallel=layout), self.question.machine.ranks)
        return states["weights"] + states["optimizer"]

    def _total(self, setting: Setting, micro: int) -> int:
        overheads = self.estimator.overheads(replace(self.question.run, parallel=setting.layout), self.space.ranks)
        return overheads.total_bytes(self.space.prediction(setting, micro).peak_bytes)

    def _fits_host(self, setting: Setting, micro: int) -> bool:
        """Whether what is offloaded has room, whatever the micro batch."""
        known = self.question.machine.host_bytes is not None
        return not known or setting.layout.offload == "none" or self._plan(setting, micro).fits_host

    def _plan(self, setting: Setting, micro: int) -> Plan:
        space = self.space
        prediction = space.prediction(setting, micro)
        return self.estimator.plan(space.candidate(setting, micro), space.batch(micro), prediction)

    def _seconds(self, setting: Setting, micro: int) -> float:
        return self.space.step(setting, micro).time(self.rates).seconds


# --- fewer cards -----------------------------------------------------------------------------------------------------


def _on_fewer_cards(question: Question, found: Found) -> Found:
    """What is found, or a plan on fewer cards that is faster."""
    machine = question.machine
    sequences = sequences_per_rank(question.run, machine.ranks) * machine.ranks
    least = Estimator(machine, question.calibration).least_seconds(question.run) * sequences
    for nodes, gpus in _fewer_cards(machine, sequences):
        limit = time_class(found.best.seconds) if found.best else math.inf
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
