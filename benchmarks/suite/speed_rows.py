"""What ``gpu_suite.py speed`` times: presets as planned, then with one setting changed at a time; and other loops."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.suite.choice_rows import configuration
from benchmarks.suite.configuration import Configuration
from scalegpt.config.presets import resolve
from scalegpt.config.run import PLANNED, ParallelConfig
from scalegpt.hardware.machine import Machine
from scalegpt.planner.batches import BatchPlan
from scalegpt.planner.checks import resolve_precision
from scalegpt.planner.plan import Plan, make_plan
from scalegpt.planner.search.choose import choose
from scalegpt.planner.search.question import Question, Scheme
from scalegpt.units import gib

Values = dict[str, Any]

PRESETS = ("500M_1024", "350M_1024", "150M_1024")
"""Those that the limits speak of; the one whose figure says most comes first."""

STEP_SEQUENCES = (128, 64, 32, 16, 8)
STEP_SECONDS = 1.5
"""Sequences of a step: the first of these that is predicted to take no longer. All rows of a preset take the same."""

LARGEST_OF_LOOP = 32
"""Sequences that the plain loop starts from at most; with 1024 tokens each they keep any card busy."""

ROOM_FOR_ERROR = 1.1
"""What is predicted to fill the card so many times is not tried: it would only show that memory runs out."""

CHUNKS = (512, 1024, 2048, 4096)

TRAIN, LOOP, LOSS, PROFILE = "train", "plain loop", "loss alone", "profile"
"""Kinds of rows."""

BASE_SECONDS, COMPILE_SECONDS, DEEPSPEED_SECONDS = 2.0, 5.0, 6.0
"""~ what a row takes beside its steps: to build it and take it apart, to compile a block, to set DeepSpeed up."""

LOOP_SECONDS_OF_LAYER = 1.5
"""~ what each layer of a model that is compiled whole takes."""

LOSS_SECONDS, COMPILED_LOSS_SECONDS = 0.8, 1.5
PROFILE_SECONDS = 6.0
"""~ what collecting and reading the events of some steps takes."""

WARM_STEPS, LEAST_STEPS, MOST_STEPS, TIMED_SECONDS = 2, 3, 30, 1.5
"""Steps before those that count, the last of which tells how long one takes; then as many as take so long, within bounds."""

PROFILED_STEPS = 3


@dataclass(frozen=True)
class Subject:
    """A preset on the machine at hand.

    Attributes:
        preset: its name.
        plan: what the planner chooses for one process; a step has as many sequences as suit the machine.
        limit: bytes that a plan may take.
    """

    preset: str
    plan: Plan
    limit: float

    @property
    def sequences(self) -> int:
        """Sequences of a step."""
        return self.plan.batch.sequences

    def with_scheme(
        self, micro: int, scheme: Scheme | None = None, *, attention: str = "auto", compiled: bool | None = None
    ) -> Plan:
        """The plan with another scheme; the step has the same sequences."""
        run, batch = self.plan.run, self.plan.batch
        scheme = scheme or Scheme.of(run)
        changed = run.train.changed(attention=attention)
        if compiled is not None:
            changed = changed.changed(compile="auto" if compiled else "off")
        divided = BatchPlan(micro, self.sequences // micro, batch.ranks, batch.block_size)
        return make_plan(scheme.applied(replace(run, train=changed), divided), self.plan.machine, divided)


def subjects(machine: Machine) -> tuple[list[Subject], list[Values]]:
    """Each preset, and a row for each that does not fit this card without offload."""
    found = {preset: _subject(preset, machine) for preset in PRESETS}
    reason = "by the planner, with nothing offloaded"
    rows = [
        {"name": preset, "preset": preset, "kind": TRAIN, "outcome": "does not fit", "reason": reason, "notes": []}
        for preset, each in found.items()
        if each is None
    ]
    return [each for each in found.values() if each is not None], rows


def _subject(preset: str, machine: Machine) -> Subject | None:
    run = resolve(preset=preset, flags={"backend": "plain"})
    precision = resolve_precision(run.train.precision, machine.card, machine.capability)
    chosen: Subject | None = None
    for sequences in STEP_SEQUENCES:
        train = run.train.changed(precision=precision, tokens_per_step=sequences * run.model.block_size)
        layout = {"backend", "zero_stage", "offload"}
        question = Question(replace(run, train=train), machine, open=PLANNED - layout)
        plan = choose(question).best
        if plan is None:
            break
        chosen = Subject(preset, plan, question.limit)
        if plan.seconds <= STEP_SECONDS:
            break
    return chosen


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a row has otherwise than the planner's choice; None: as chosen.

    Attributes:
        backend: who holds what.
        zero_stage: its stage.
        recompute: what is computed again.
        loss: full, with as large a micro batch as is predicted to fit, or chunked.
        attention: the attention kernel.
        compiled: whether the blocks are.
        times: the micro batch, as a multiple of the chosen one.
        micro: the micro batch itself.
    """

    backend: str = "plain"
    zero_stage: int = 0
    recompute: str | None = None
    loss: str | None = None
    attention: str = "auto"
    compiled: bool | None = None
    times: float = 1.0
    micro: int | None = None


@dataclass(frozen=True)
class Round:
    """Changes that are timed for some presets.

    Attributes:
        presets: which.
        changes: each made alone.
        core: part of what is to be measured within the time on a large card; the rest is measured where time is left.
    """

    presets: tuple[str, ...]
    changes: tuple[Change, ...]
    core: bool = True


CHOSEN = Change()
SMALL = PRESETS[-1:]

BACKENDS_AND_RECOMPUTE = Round(
    PRESETS,
    (
        Change(backend="fsdp", zero_stage=2),
        *(Change(recompute=kind) for kind in ("none", "selective", "full")),
    ),
)
LOSS_AND_COMPILE = (
    Round((PRESETS[0], PRESETS[-1]), (Change(loss="full"), Change(loss="chunked"))),
    Round(PRESETS, (Change(compiled=False),)),
)
ATTENTION = Round(SMALL, tuple(Change(attention=kind) for kind in ("flash", "cudnn")))
MICRO_BATCHES = Round(PRESETS, (Change(times=0.5),))
WHERE_TIME_IS_LEFT = (
    Round(SMALL, (Change(times=2.0), Change(times=0.25), Change(attention="mem_efficient")), core=False),
    Round(PRESETS[1:2], (Change(loss="full"),), core=False),
    Round(SMALL, (Change(backend="fsdp", zero_stage=3), Change(backend="fsdp", zero_stage=0)), core=False),
    Round(PRESETS[:2], (Change(times=2.0), Change(times=0.25)), core=False),
    Round(PRESETS[:1], tuple(Change(attention=kind) for kind in ("cudnn", "flash")), core=False),
    Round(SMALL, (Change(micro=8), Change(micro=8, attention="math")), core=False),
)
DEEPSPEED = (
    Round(PRESETS, (Change(backend="deepspeed", zero_stage=1),)),
    Round(SMALL, tuple(Change(backend="deepspeed", zero_stage=stage) for stage in (2, 3, 0)), core=False),
)


def changed(subject: Subject, change: Change, micro: int) -> Plan | None:
    """The plan with a change made; None: the micro batch that it asks for does not divide the step, or none fits.

    Args:
        subject: the preset.
        change: what to make otherwise.
        micro: the micro batch that the change starts from.
    """
    train = subject.plan.run.train
    stage = change.zero_stage if change.backend != "plain" else None
    layout = ParallelConfig(backend=change.backend, zero_stage=stage)
    scheme = Scheme(layout, change.recompute or train.recompute, change.loss or train.loss)
    wanted = change.micro or micro * change.times
    if wanted < 1 or subject.sequences % wanted:
        return None

    def at(size: int) -> Plan:
        return subject.with_scheme(size, scheme, attention=change.attention, compiled=change.compiled)

    return _largest_fitting(at, int(wanted), subject.limit) if change.loss == "full" else at(int(wanted))


def _largest_fitting(at: Callable[[int], Plan], micro: int, limit: float) -> Plan | None:
    """The plan with the largest micro batch that is predicted to fit, halved from the one given; None: none does."""
    while micro:
        plan = at(micro)
        if plan.total_bytes <= limit:
            return plan
        micro //= 2
    return None


# --- rows as jobs ----------------------------------------------------------------------------------------------------


def training_job(plan: Plan) -> Values:
    """A plan to be timed, its prediction beside it."""
    known = plan.machine.card is not None
    predicted = {
        "tokens_per_second": plan.tokens_per_second if known else None,
        "mfu": plan.mfu if known else None,
        "peak_bytes": plan.peak_bytes + plan.overheads.workspaces,
        "reserved_bytes": plan.reserved_bytes,
        "total_bytes": plan.total_bytes,
    }
    seconds = BASE_SECONDS + _seconds_of_steps(plan.seconds)
    seconds += COMPILE_SECONDS if plan.run.train.compile != "off" else 0.0
    seconds += DEEPSPEED_SECONDS if plan.run.parallel.backend == "deepspeed" else 0.0
    return {"kind": TRAIN, **configuration(plan).as_dict(), "predicted": predicted, "usual_seconds": seconds}


def _seconds_of_steps(seconds: float) -> float:
    return WARM_STEPS * seconds + max(TIMED_SECONDS, LEAST_STEPS * seconds)


def does_not_fit(plan: Plan) -> str | None:
    """Why a plan is not worth a trial, if it is not."""
    usable = plan.machine.usable_bytes
    if usable is None or plan.total_bytes <= ROOM_FOR_ERROR * usable:
        return None
    return f"{gib(plan.total_bytes)} predicted, the card has {gib(usable)}"


def loop_plan(subject: Subject, micro: int | None = None) -> Plan | None:
    """What our trainer would do in the plain loop's place: full logits, nothing computed again.

    Args:
        subject: the preset.
        micro: sequences of a micro batch; None: as many as are predicted to fit.
    """
    scheme = Scheme(ParallelConfig(), "none", "full")
    if micro is not None:
        return subject.with_scheme(micro, scheme)
    most = min(LARGEST_OF_LOOP, subject.sequences)
    return _largest_fitting(lambda size: subject.with_scheme(size, scheme), most, subject.limit)


def loop_job(plan: Plan, *, compiled: bool) -> Values:
    """The plain loop with the shape and the batch of a plan."""
    batch = plan.batch
    words = f"{plan.run.preset} nanoGPT-style loop micro_batch={batch.micro_batch} grad_accum={batch.grad_accum}"
    seconds = BASE_SECONDS + _seconds_of_steps(plan.seconds)
    seconds += LOOP_SECONDS_OF_LAYER * plan.run.model.n_layer if compiled else 0.0
    return {
        "kind": LOOP,
        **replace(configuration(plan), compiled=compiled).as_dict(),
        "name": f"{words} compiled" if compiled else words,
        "usual_seconds": seconds,
    }


WAYS: tuple[Values, ...] = (
    {"way": "full", "compiled": False},
    {"way": "full", "compiled": True},
    *({"way": "chunked", "chunk": chunk, "compiled": compiled} for compiled in (True, False) for chunk in CHUNKS),
    {"way": "torch's linear_cross_entropy", "compiled": False},
    {"way": "Liger's fused linear cross entropy", "compiled": False},
)
"""Ways to compute the loss."""


def loss_jobs(subject: Subject, micro: int) -> Iterator[Values]:
    """The loss alone, in every way, over the tokens of a micro batch.

    Args:
        subject: the preset.
        micro: sequences of the chosen micro batch; fewer are taken where full logits of so many are not predicted to fit.
    """
    fitting = changed(subject, Change(loss="full"), micro)
    micro = micro if fitting is None else fitting.batch.micro_batch
    for way in WAYS:
        flags = {"micro_batch": micro}
        chunk = f" {way['chunk']}" if "chunk" in way else ""
        compiled = " compiled" if way["compiled"] else ""
        yield {
            "kind": LOSS,
            **Configuration(preset=subject.preset, compiled=way["compiled"], flags=flags).as_dict(),
            "name": f"{subject.preset} loss alone, {micro} sequences: {way['way']}{chunk}{compiled}",
            **way,
            "usual_seconds": COMPILED_LOSS_SECONDS if way["compiled"] else LOSS_SECONDS,
        }


def profile_job(row: Values, trace: str | None) -> Values:
    """The profile of a row that was timed.

    Args:
        row: what :func:`training_job` makes, and more.
        trace: a file for the whole trace; None: none.
    """
    keys = Configuration(preset="").as_dict()
    return {
        **{key: row[key] for key in keys},
        "kind": PROFILE,
        "name": f"profile of {row['name']}",
        "trace": trace,
        "usual_seconds": profile_seconds(row["usual_seconds"]),
    }


def profile_seconds(timed_seconds: float) -> float:
    """What the profile of a row takes that takes so long itself."""
    return PROFILE_SECONDS + timed_seconds
