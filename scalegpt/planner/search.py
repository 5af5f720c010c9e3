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

import heapq
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache

from scalegpt.config import RunConfig
from scalegpt.config.machine import MachineConfig
from scalegpt.config.run import BACKENDS, OFFLOADS, PLANNED, STAGES, ParallelConfig
from scalegpt.config.train import LOSSES, RECOMPUTE
from scalegpt.errors import InputError
from scalegpt.planner.batches import BatchPlan, divisors, sequences_per_rank
from scalegpt.planner.calibration import Calibration
from scalegpt.planner.machine import Machine
from scalegpt.planner.plan import Estimator, Plan
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
    for machine in _smaller_machines(question) if question.fewer else ():
        limit = time_class(found.best.seconds) if found.best else math.inf
        if time_class(_least_seconds(question, machine)) >= limit:
            continue
        smaller = replace(question, machine=machine)
        try:
            other = _Search(smaller, layouts(smaller)).run(limit)
        except InputError:  # what is fixed does not go with so many cards
            continue
        if other.best is not None:
            found = other
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


@dataclass(frozen=True)
class _Line:
    """All micro batches of one layout, recompute and loss."""

    layout: ParallelConfig
    recompute: str
    loss: str


@dataclass(order=True)
class _Entry:
    """A line in the queue: with the least that its key can be, or with its plan and that one's key."""

    key: Key
    order: int
    line: _Line = field(compare=False)
    plan: Plan | None = field(compare=False, default=None)


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
        self.estimator = Estimator(question.machine, question.calibration)
        run, open_ = question.run, question.open
        per_rank = sequences_per_rank(run, question.machine.ranks)
        self.micro_batches = divisors(per_rank) if "micro_batch" in open_ else (run.train.micro_batch,)
        if per_rank % self.micro_batches[0]:
            raise InputError(
                f"micro_batch {run.train.micro_batch} does not divide the {per_rank} sequences per rank of a step"
            )
        if not question.machine.is_gpu:  # a processor gains nothing from more than the run itself asks for
            self.micro_batches = tuple(size for size in self.micro_batches if size <= run.train.micro_batch)
        self.per_rank = per_rank
        self.recomputes = RECOMPUTE if "recompute" in open_ else (run.train.recompute,)
        losses = (
            tuple(sorted(LOSSES, key=lambda loss: loss != run.train.loss)) if "loss" in open_ else (run.train.loss,)
        )
        self.queue: list[_Entry] = []
        self.order = itertools.count()
        self.lines = [_Line(*each) for each in itertools.product(over, self.recomputes[:1], losses)]
        for line in self.lines:
            self._push(line)

    def run(self, limit: float = math.inf) -> Found:
        """The best plan whose class of time is below the limit."""
        while self.queue:
            entry = heapq.heappop(self.queue)
            if entry.key[0] >= limit:
                return Found(None)
            if entry.plan is not None:
                return Found(entry.plan)
            plan = self._fastest_that_fits(entry.line)
            if plan is not None:
                self._push(entry.line, plan)
            if plan is None or plan.batch.micro_batch != self._fastest(entry.line, self.micro_batches):
                heavier = self.recomputes.index(entry.line.recompute) + 1
                if heavier < len(self.recomputes):
                    self._push(replace(entry.line, recompute=self.recomputes[heavier]))
        return Found(None)

    def _push(self, line: _Line, plan: Plan | None = None) -> None:
        seconds = plan.seconds if plan else self._seconds(line, self._fastest(line, self.micro_batches))
        simple = simplicity(line.layout, line.recompute, line.loss, self.question.run)
        heapq.heappush(self.queue, _Entry((time_class(seconds), simple, seconds), next(self.order), line, plan))

    def _fastest(self, line: _Line, sizes: tuple[int, ...]) -> int:
        """The fastest of some micro batches: the largest, unless its tokens fill the chunks of the loss badly."""
        train = self.question.run.train
        if line.loss == "full" or self.question.run.model.block_size % train.loss_chunk == 0:
            return sizes[-1]
        return min(sizes, key=lambda size: (self._seconds(line, size), -size))

    def _fastest_that_fits(self, line: _Line) -> Plan | None:
        """The fastest plan that fits; None: not even one sequence does."""
        plan = self._largest_that_fits(line)
        if plan is None:
            return None
        largest = plan.batch.micro_batch
        size = self._fastest(line, tuple(size for size in self.micro_batches if size <= largest))
        return plan if size == largest else self._plan(line, size)

    def _largest_that_fits(self, line: _Line) -> Plan | None:
        """The plan with the largest micro batch that fits; None: not even one sequence does.

        Memory grows with the micro batch as long as there are three micro steps or more. With two none lies between the first
        and the last, and with one no gradients wait, so that either may take less than a smaller micro batch.
        """
        if self._states(line.layout) > self.question.limit:
            return None
        alike = len(self.micro_batches)
        while alike and self.per_rank // self.micro_batches[alike - 1] < 3:
            alike -= 1
            plan = self._plan(line, self.micro_batches[alike])
            if self._fits(plan):
                return plan
        fitting, low, high = None, 0, alike
        while low < high:
            middle = (low + high) // 2
            plan = self._plan(line, self.micro_batches[middle])
            if self._fits(plan):
                fitting, low = plan, middle + 1
            else:
                high = middle
        return fitting

    def _states(self, layout: ParallelConfig) -> float:
        """Bytes that any plan with this layout holds at least: the model states, unless they are offloaded."""
        if layout.offload != "none":
            return 0.0
        run = replace(self.question.run, parallel=layout)
        return sum(rank_states(run, self.question.machine.ranks).values())

    def _fits(self, plan: Plan) -> bool:
        return plan.total_bytes <= self.question.limit and plan.fits_host

    def closest(self) -> Plan:
        """The plan that lacks least: the smallest micro batch, with all recomputed that may be."""
        plans = (self._plan(replace(line, recompute=self.recomputes[-1]), self.micro_batches[0]) for line in self.lines)
        return min(plans, key=lambda plan: (not plan.fits_host, plan.total_bytes))

    def _batch(self, micro: int) -> BatchPlan:
        return BatchPlan(micro, self.per_rank // micro, self.question.machine.ranks, self.question.run.model.block_size)

    def _plan(self, line: _Line, micro: int) -> Plan:
        batch = self._batch(micro)
        return self.estimator.plan(candidate(self.question.run, line.layout, line.recompute, line.loss, batch), batch)

    def _seconds(self, line: _Line, micro: int) -> float:
        batch = self._batch(micro)
        run = candidate(self.question.run, line.layout, line.recompute, line.loss, batch)
        return self.estimator.time(run, batch).seconds


@lru_cache(maxsize=65_536)
def candidate(run: RunConfig, layout: ParallelConfig, recompute: str, loss: str, batch: BatchPlan) -> RunConfig:
    """The run with these settings. Remembered: every card that is asked about meets the same ones."""
    train = run.train.changed(
        recompute=recompute, loss=loss, micro_batch=batch.micro_batch, tokens_per_step=batch.tokens
    )
    return replace(run, train=train, parallel=layout)


# --- fewer cards -----------------------------------------------------------------------------------------------------


def _smaller_machines(question: Question) -> Iterator[Machine]:
    """The machine with fewer machines, or fewer cards in each, that divide the step; the most cards first."""
    machine, run = question.machine, question.run
    tokens, block = run.train.tokens_per_step or 0, run.model.block_size
    sizes = itertools.product(range(1, machine.nodes + 1), range(1, machine.gpus + 1))
    fewer = [
        (nodes, gpus) for nodes, gpus in sizes if nodes * gpus < machine.ranks and tokens % (nodes * gpus * block) == 0
    ]
    for nodes, gpus in sorted(fewer, key=lambda size: (-size[0] * size[1], size[0])):
        yield machine.with_cards(gpus=gpus, nodes=nodes)


def _least_seconds(question: Question, machine: Machine) -> float:
    """What a step takes at least on so many cards, however it is laid out: see :meth:`Estimator.least_seconds`."""
    run = question.run
    sequences = sequences_per_rank(run, machine.ranks)
    return Estimator(machine, question.calibration).least_seconds(run) * sequences
