"""The rows of the suite, each a measurement, in four parts.

A part is a generator that yields rows and receives the answers.

A row has the trainer's own settings. Most rows are fixed. Some follow from earlier answers: variations of the planner's
choice, the configuration to profile, and the micro batches to try.
"""

from collections.abc import Generator, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from scalegpt.config.backends import BACKENDS
from scalegpt.config.optimizers import OPTIMIZERS
from scalegpt.config.presets import resolve
from scalegpt.config.run import PLANNED, RunConfig
from scalegpt.config.train import ATTENTION, RECOMPUTE
from scalegpt.hardware.gpus import find_card
from scalegpt.hardware.machine import Machine
from scalegpt.planner.batches import BatchPlan, divisors
from scalegpt.planner.checks import resolve_precision
from scalegpt.planner.plan import Plan, make_plan
from scalegpt.planner.search.choose import choose
from scalegpt.planner.search.question import Question
from scalegpt.units import gib

ROOT = Path(__file__).resolve().parents[2]

Values = dict[str, Any]

IMPORTS, TRAIN, RUN, LOOP, LOSS, PROFILE = "imports", "train", "run", "loop", "loss", "profile"
"""Kinds of rows. The class in :mod:`benchmarks.suite.measure` has a method for each."""

ROOM_FOR_ERROR = 1.1
"""A plan is not tried if its predicted memory is more than this many times the card's."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement.

    Attributes:
        name: a name that is unique within the part.
        kind: the kind of measurement, for example :data:`TRAIN`.
        preset: the preset from which the settings start; None: the defaults.
        flags: settings, as on the trainer's command line.
        grad_accum: micro batches of a step.
        ranks: data-parallel ranks W; more than one are emulated by a fake process group.
        seconds: how long steps are timed, in seconds; 0: steps are taken, but not timed.
        predicted: the planner's prediction of memory and speed.
        usable_bytes: memory of the card that is emulated; None: the whole card is used.
        more: further values that only this kind of row needs.
        skip: why the row is not measured; empty: it is measured.
    """

    name: str
    kind: str = TRAIN
    preset: str | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    grad_accum: int = 1
    ranks: int = 1
    seconds: float = 0.0
    predicted: Values = field(default_factory=dict)
    usable_bytes: int | None = None
    more: Values = field(default_factory=dict)
    skip: str = ""


Part = Generator[Row, Values, None]

LAYOUT = ("backend", "zero_stage")
USUAL = {("recompute", "none"), ("loss", "chunked"), ("attention", "auto"), ("compile", "off")}


def settings(preset: str | None, flags: Mapping[str, Any]) -> RunConfig:
    """The run with a row's settings. The backend is ``plain`` if the flags name none."""
    layout = {"backend": "plain", "zero_stage": None, "ds_config": None}
    return resolve(preset=preset, flags={**layout, **flags}, name=None if preset else "suite")


def named(flags: Mapping[str, Any]) -> str:
    """Settings in words, without the settings in :data:`USUAL`, which most rows have."""
    layout = [str(flags.get("backend", "plain")), *(str(value) for key, value in flags.items() if key == "zero_stage")]
    words = (f"{key}={value}" for key, value in flags.items() if (key, value) not in USUAL and key not in LAYOUT)
    return " ".join([*layout, *words])


# --- smoke -----------------------------------------------------------------------------------------------------------

SMALL_MODEL = {"n_layer": 2, "n_embd": 128, "n_head": 2, "block_size": 128, "vocab_size": 512}
SHORT_RUN = {"micro_batch": 8, "learning_rate": 3e-3, "warmup_steps": 2}

LLAMA = {"position": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "tie_head": False}
NEOX = {"position": "rope", "rotary_share": 0.25, "parallel_block": True, "tie_head": False}
"""The blocks of Llama, and of GPT-NeoX as in Pythia."""

SMOKE_IN_ONE_PROCESS: tuple[Values, ...] = (
    *({"recompute": kind} for kind in RECOMPUTE),
    *({"attention": kind} for kind in ATTENTION[1:]),
    {"loss": "full"},
    *({"compile": "on", "recompute": kind} for kind in RECOMPUTE),
    *({"compile": way, "n_kv_head": 1, "qk_norm": True, **LLAMA} for way in ("off", "on")),
    {"compile": "on", **NEOX},
    *({"optimizer": name} for name in OPTIMIZERS if name != "adamw"),
    *({"precision": precision} for precision in ("fp16", "fp32")),
)
SMOKE_SHARDED = tuple(
    {"backend": name, "zero_stage": each} for name in ("fsdp", "deepspeed") for each in BACKENDS[name].stages
)


def smoke(_machine: Machine) -> Part:
    """Rows that run every feature once, on a small model."""
    yield Row(name="imports", kind=IMPORTS)
    yield Row(name="train, save, resume, sample", kind=RUN, flags={**SMALL_MODEL, **SHORT_RUN})
    for flags in (*SMOKE_IN_ONE_PROCESS, *SMOKE_SHARDED):  # DeepSpeed comes last, since it keeps its process group
        yield Row(name=named(flags), flags={"compile": "off", "micro_batch": 2, **SMALL_MODEL, **flags})


# --- plan ------------------------------------------------------------------------------------------------------------

PRESETS_1024 = ("150M_1024", "200M_1024", "250M_1024", "350M_1024", "500M_1024")

PLAN_ROWS: tuple[tuple[str, int, Values], ...] = (
    *((preset, 1, {}) for preset in PRESETS_1024),
    *((preset, 1, {"compile": "on"}) for preset in PRESETS_1024),
    ("350M_1024", 1, {"recompute": "selective"}),
    ("500M_1024", 1, {"recompute": "full", "loss": "full"}),
    ("350M_1024", 1, {"compile": "on", "n_kv_head": 2, **LLAMA}),
    ("150M_1024", 1, {"compile": "on", **NEOX}),
    *(("150M_1024", 8, {"backend": "fsdp", "zero_stage": stage}) for stage in (2, 3)),
    *((preset, 1, {"backend": "fsdp"}) for preset in ("150M_1024", "500M_1024")),
    ("350M_1024", 1, {"compile": "on", "backend": "fsdp", "zero_stage": 2}),
    *((preset, 1, {"backend": "deepspeed"}) for preset in ("150M_1024", "350M_1024", "500M_1024")),
    *((preset, 1, {"compile": "on", "backend": "deepspeed"}) for preset in ("150M_1024", "500M_1024")),
)
"""(preset, ranks W, settings). Rows without a communicator come first, since libraries stay loaded in a process and
would count in the driver's figure of later rows."""


def plan(machine: Machine) -> Part:
    """Rows that compare predicted with measured memory."""
    for preset, ranks, flags in PLAN_ROWS:
        yield planned_row(planned(machine, preset, {"compile": "off", **flags}, ranks=ranks), seconds=0.2)


def planned(machine: Machine, preset: str, flags: Mapping[str, Any], *, grad_accum: int = 1, ranks: int = 1) -> Plan:
    """The plan for fixed settings, by the planner's tables, without measurements of earlier runs."""
    run = with_precision(settings(preset, flags), machine)
    batch = BatchPlan(run.train.micro_batch, grad_accum, ranks, run.model.block_size)
    found = make_plan(run, machine.with_cards(gpus=ranks, nodes=1), batch)
    # A fake process group has no communicator, so NCCL takes no memory.
    return found if ranks == 1 else replace(found, overheads=replace(found.overheads, nccl=0))


def with_precision(run: RunConfig, machine: Machine) -> RunConfig:
    """The run with its precision resolved for the machine's card."""
    precision = resolve_precision(run.train.precision, machine.card, machine.capability)
    return replace(run, train=run.train.changed(precision=precision))


def planned_row(found: Plan, *, seconds: float, usable_bytes: int | None = None, label: str = "") -> Row:
    """The row that trains with a plan's settings and contains its prediction."""
    train, parallel, batch, usable = found.run.train, found.run.parallel, found.batch, found.machine.usable_bytes
    flags = {
        "backend": parallel.backend, **({} if parallel.backend == "plain" else {"zero_stage": parallel.stage}),
        "micro_batch": batch.micro_batch, "recompute": train.recompute, "loss": train.loss,
        "compile": "off" if train.compile == "off" else "on", "attention": train.attention,
        **({} if parallel.offload == "none" else {"offload": parallel.offload}), **_reshaped(found.run),
    }  # fmt: skip
    words = f" grad_accum={batch.grad_accum}" * (batch.grad_accum > 1) + f" W={batch.ranks}" * (batch.ranks > 1)
    too_large = usable is not None and found.total_bytes > ROOM_FOR_ERROR * usable and usable_bytes is None
    return Row(
        name=f"{label}{found.run.preset} {named(flags)}{words}",
        preset=found.run.preset, flags=flags, grad_accum=batch.grad_accum, ranks=batch.ranks, seconds=seconds,
        predicted={**found.memory(), **found.speed(), "workspace_bytes": found.overheads.workspaces},
        usable_bytes=usable_bytes,
        skip=f"{gib(found.total_bytes)} predicted, the card has {gib(usable or 0)}" if too_large else "",
    )  # fmt: skip


def _reshaped(run: RunConfig) -> Values:
    """The settings of a run's model that differ from its preset's."""
    usual = asdict(settings(run.preset, {}).model)
    return {key: value for key, value in asdict(run.model).items() if value != usual[key]}


# --- speed -----------------------------------------------------------------------------------------------------------

SPEED_PRESETS = ("500M_1024", "350M_1024", "150M_1024")
"""Presets, the most important first, in case time runs out."""

STEP_SEQUENCES, LOOP_SEQUENCES, LOSS_SEQUENCES = 64, 32, 16
"""Numbers of sequences: of a step, of the plain loop's largest micro batch, and of a loss measured by itself. Sequences
of 1,024 tokens keep any card busy with these numbers."""

TIMED_SECONDS, LOSS_SECONDS, CHOICE_SECONDS = 1.5, 0.25, 1.0

CHANGES: tuple[Values, ...] = (
    *({"recompute": kind} for kind in RECOMPUTE),
    {"backend": "fsdp", "zero_stage": 2},
    {"backend": "deepspeed", "zero_stage": 1},
    {"compile": "off"},
    *({"attention": kind} for kind in ("flash", "cudnn")),
    {"loss": "full"},
)
"""Changes to the settings of the planner's choice. Each row makes one of them."""

LOSS_WAYS: tuple[Values, ...] = (
    {"way": "full", "compiled": True},
    *({"way": "chunked", "chunk": chunk, "compiled": True} for chunk in (1024, 4096)),
    *({"way": way} for way in ("chunked", "torch", "torch chunked", "liger")),
)
"""The losses to measure, as arguments of :func:`benchmarks.steps.losses.loss_of`."""


def speed(machine: Machine) -> Part:
    """Rows of speed: the presets; a plain loop, a profile and losses; changes of one setting; the slower plain loops.

    The most important rows come first, in case time runs out. The last loops take long to compile.
    """
    chosen: dict[str, Plan] = {}
    rows: dict[str, tuple[float, Row]] = {}
    for preset in SPEED_PRESETS:
        run = with_precision(settings(preset, {}), machine)
        train = run.train.changed(tokens_per_step=STEP_SEQUENCES * run.model.block_size)
        free = PLANNED - {"backend", "zero_stage", "offload"}
        found = choose(Question(replace(run, train=train), machine, open=free)).best
        if found is None:
            yield Row(name=preset, preset=preset, skip="the planner finds no plan without offload that fits")
            continue
        row = planned_row(found, seconds=TIMED_SECONDS)
        measured = (yield row).get("measured", {})
        chosen[preset], rows[row.name] = found, (measured.get("mfu") or 0.0, row)
    plans = list(chosen.values())
    yield from _loops(plans[-1:])
    if rows:
        best = max(rows.values(), key=lambda each: each[0])[1]
        yield replace(best, kind=PROFILE, name=f"profile of {best.name}")
    for preset in chosen:
        for way in LOSS_WAYS:
            words = f"{preset} loss alone: {' '.join(f'{key}={value}' for key, value in way.items())}"
            flags = {"micro_batch": LOSS_SEQUENCES}
            yield Row(name=words, kind=LOSS, preset=preset, flags=flags, seconds=LOSS_SECONDS, more=way)
    for change in CHANGES:
        for found in plans:
            flags = {**planned_row(found, seconds=0).flags, **change}
            changed = planned(machine, str(found.run.preset), flags, grad_accum=found.batch.grad_accum)
            row = planned_row(changed, seconds=TIMED_SECONDS)
            if row.name not in rows:
                yield row
    yield from _loops(plans[:-1])


def _loops(plans: Iterable[Plan]) -> Part:
    """Rows of the plain loop with as many tokens per step as each plan; its micro batch is halved until it fits."""
    for found in plans:
        sequences, outcome = found.batch.sequences, "out of memory"
        micro = min(LOOP_SEQUENCES, sequences)
        while outcome == "out of memory" and micro:
            answer = yield Row(
                name=f"{found.run.preset} nanoGPT-style loop micro_batch={micro} grad_accum={sequences // micro}",
                kind=LOOP, preset=found.run.preset, flags={"micro_batch": micro, "compile": "on"},
                grad_accum=sequences // micro, seconds=TIMED_SECONDS,
            )  # fmt: skip
            outcome, micro = answer["outcome"], micro // 2


# --- choice ----------------------------------------------------------------------------------------------------------

CHOICES = (
    ("RTX 3060", "150M_1024"), ("RTX 4090", "350M_1024"), ("A100 40GB", "500M_1024"),
    ("RTX 3060", "350M_1024"), ("RTX 4090", "500M_1024"), ("A100 40GB", "150M_1024"),
)  # fmt: skip
"""(card, preset): cards of 12, 24 and 40 GB, of which only the memory is emulated, and the presets for them."""


def choice(machine: Machine) -> Part:
    """Rows that train the planner's choices on emulated cards, and then search for the largest micro batch that runs."""
    rehearsal = planned(machine, "150M_1024", {"micro_batch": 1, "compile": "on"})
    yield planned_row(rehearsal, seconds=0, label="rehearsal: ")  # loads kernels, whose memory is outside the allocator
    for name, preset in CHOICES:
        card = find_card(name)
        emulated = replace(machine, usable_bytes=card.usable_bytes)
        found = choose(Question(with_precision(resolve(preset=preset), machine), emulated)).best
        if machine.usable_bytes is not None and machine.usable_bytes < card.usable_bytes:
            yield Row(name=f"{card.gb} GB: {preset}", skip=f"this card has less, {gib(machine.usable_bytes)}")
        elif found is None:
            yield Row(name=f"{card.gb} GB: {preset}", skip="the planner finds no plan that fits")
        else:
            yield from _choice_on(found, card.usable_bytes, f"{card.gb} GB: ")


def _choice_on(found: Plan, usable: int, where: str) -> Part:
    """The row of a chosen plan, then rows that search for the largest micro batch, starting next to the chosen one."""
    sequences, micro = found.batch.sequences, found.batch.micro_batch
    affordable = max(2, int(CHOICE_SECONDS / (found.seconds / found.batch.grad_accum)))
    short = _with_batch(found, micro, min(found.batch.grad_accum, affordable))
    row = planned_row(short, seconds=CHOICE_SECONDS, usable_bytes=usable, label=f"{where}chosen ")
    answer = yield replace(row, more={"sequences": sequences})
    search = largest(divisors(sequences), micro, ran=ran_within(answer, usable))
    size = next(search, None)
    while size is not None and answer["outcome"] in {"ran", "out of memory"}:
        tried = _with_batch(found, size, min(2, sequences // size))
        answer = yield planned_row(tried, seconds=0, usable_bytes=usable, label=f"{where}trial ")
        try:
            size = search.send(ran_within(answer, usable))
        except StopIteration:
            return


def _with_batch(found: Plan, micro: int, grad_accum: int) -> Plan:
    """The plan with another micro batch and accumulation. The memory is the same for any accumulation of two or more."""
    return make_plan(found.run, found.machine, BatchPlan(micro, grad_accum, 1, found.batch.block_size))


def ran_within(answer: Mapping[str, Any], usable: int) -> bool:
    """Whether a row ran within ``usable`` bytes, the emulated card's memory.

    Memory outside the allocator counts too.
    """
    measured = answer.get("measured", {})
    held = measured.get("reserved_bytes", 0) + measured.get("outside_bytes", 0)
    return bool(answer["outcome"] == "ran" and held <= usable)


def largest(sizes: Iterable[int], start: int, *, ran: bool) -> Generator[int, bool, None]:
    """Search for the largest size that runs. If a size runs, all smaller sizes run too.

    It tries the size next to ``start`` first, since the planner's choice is usually right or almost right. Then it bisects.

    Args:
        sizes: the sizes, in rising order.
        start: a size whose outcome is known.
        ran: whether ``start`` ran.

    Yields:
        A size to try; the caller sends back whether it ran.
    """
    sizes = list(sizes)
    place = sizes.index(start)
    low, high = (place, len(sizes)) if ran else (-1, place)
    probe = low + 1 if ran else high - 1
    while high - low > 1:
        low, high = (probe, high) if (yield sizes[probe]) else (low, probe)
        probe = (low + high) // 2


PARTS = {each.__name__: each for each in (smoke, plan, speed, choice)}
