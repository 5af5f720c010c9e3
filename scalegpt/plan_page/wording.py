"""The words that all outputs of a plan share: for model, layout, step, speed, memory, time, and sources."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from scalegpt.architecture.counting import count_parameters
from scalegpt.config import ParallelConfig, RunConfig
from scalegpt.hardware.machine import Machine
from scalegpt.planner.cost import Cost, cost_as_dict
from scalegpt.planner.length import total_steps
from scalegpt.planner.plan import Plan
from scalegpt.planner.time.rates import basis
from scalegpt.units import gib, human_time

NOTHING_LIGHTER = "nothing lighter fits on this machine: use a smaller model, more GPUs, or a larger card"

_LARGE = ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"))


def model(run: RunConfig) -> str:
    """The run's name, number of parameters and model shape, in words."""
    shape = run.model
    return (
        f"{run.name}: {count_parameters(shape).total:,} parameters, {shape.n_layer} layers, {shape.n_embd} wide, "
        f"{shape.heads_in_words()}, block {shape.block_size}, vocabulary {shape.vocab_size:,}"
    )


def cards(machine: Machine) -> str:
    """The number and name of the cards, for example ``8 × RTX 4090 in each of 2 machines``."""
    return f"{machine.gpus} × {machine.name or 'GPU'}{nodes(machine)}"


def nodes(machine: Machine) -> str:
    """The number of machines, to append to :func:`cards`: for example `` in each of 2 machines``; empty for one machine."""
    return f" in each of {machine.nodes} machines" if machine.nodes > 1 else ""


def layout(parallel: ParallelConfig, stage: str = "stage ") -> str:
    """The backend, its ZeRO stage, and what is offloaded.

    The argument ``stage`` is the text before the stage's number.
    """
    offload = "" if parallel.offload == "none" else f", {parallel.offload} offloaded"
    return f"{parallel.label(stage)}{offload}"


def step(plan: Plan) -> str:
    """The tokens of an optimizer step, as a product: ranks × micro batch × accumulation × block."""
    batch, ranks = plan.batch, plan.machine.ranks
    return (
        f"{batch.tokens:,} tokens = {ranks} rank{'s' if ranks > 1 else ''} × micro batch {batch.micro_batch} × "
        f"accumulation {batch.grad_accum} × block {batch.block_size}"
    )


def speed(plan: Plan) -> str:
    """Tokens per second, MFU, the range of the tokens per second, and the time and cost of the whole run, in words."""
    share = f" on all GPUs, {plan.mfu:.0%} MFU" if plan.machine.is_gpu else ""
    tokens, time = whole_run(plan)
    return f"{plan.tokens_per_second:,.0f} tokens/s{share}, likely {likely(plan)}; {tokens} in {time}{costs(plan)}"


def costs(plan: Plan) -> str:
    """What the whole run costs, with the range that follows from that of its speed; empty without a price."""
    cost, values = Cost.of(plan), cost_as_dict(plan)
    if cost is None or cost.money is None:
        return ""
    low, high = money(values["cost_low"]), money(values["cost_high"])
    return f", {money(cost.money)} for {cost.gpu_hours:,.3g} GPU hours at {cost.price:g}, likely {low} to {high}"


def money(amount: float) -> str:
    """An amount of money, in whatever currency its price has: with two decimals, small ones to three digits.

    >>> [money(each) for each in (1234.5, 0.0123)]
    ['1,234.50', '0.0123']
    """
    return f"{amount:,.2f}" if amount >= 1 else f"{amount:.3g}"


def likely(plan: Plan) -> str:
    """The range of the tokens per second, for example ``38,000 to 51,000``."""
    low, high = (f"{float(f'{each:.2g}'):,.0f}" for each in plan.tokens_per_second_range)
    return f"{low} to {high}"


def whole_run(plan: Plan) -> tuple[str, str]:
    """The number of tokens of the whole run, and the time that it takes, in words."""
    tokens = total_steps(plan.run.train, plan.batch.tokens) * plan.batch.tokens
    amount = next((f"{tokens / size:.3g} {word}" for size, word in _LARGE if tokens >= size), str(tokens))
    return f"{amount} tokens", duration(tokens / plan.tokens_per_second)


def total_and_speed(plan: Plan) -> tuple[str, str]:
    """A plan's total memory and its tokens per second, as text.

    The tokens per second are empty if the card is not known or the plan does not fit.
    """
    is_known = plan.machine.card is not None and plan.fits
    return gib(plan.total_bytes), f"{plan.tokens_per_second:,.0f}" if is_known else ""


def duration(seconds: float) -> str:
    """A time in seconds as text: to three significant digits below two minutes, in hours, days or years above.

    >>> [duration(each) for each in (0.0123, 1.5, 7200, 273600, 1e9)]
    ['12.3 ms', '1.5 s', '2 h 00 min', '3 d 4 h', '31.7 years']
    """
    if seconds >= 120:
        return human_time(seconds)
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1000:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


class Phase(NamedTuple):
    """The peak memory of one phase of a step.

    Attributes:
        name: the phase's name in words.
        figures: the peak with its unit; with a trace, the traced peak and the relative error too.
        size: the peak in bytes.
        binds: whether this phase has the highest peak, and so decides how much memory the step needs.
    """

    name: str
    figures: tuple[str, ...]
    size: int
    binds: bool


def phases(plan: Plan, trace: dict[str, int] | None) -> tuple[tuple[str, ...], list[Phase]]:
    """The headings and rows of a table of the phases' peaks; a trace adds columns for the traced peak and the error."""
    rows = []
    for phase, size in plan.prediction.phases.items():
        figures: tuple[str, ...] = (gib(size),)
        if trace:
            traced = trace.get(phase, 0)
            figures += (gib(traced), f"{size / traced - 1:+.2%}" if traced else "?")
        rows.append(Phase(phase.replace("_", " "), figures, size, phase == plan.prediction.phase))
    return ("phase", "peak", *(("traced", "error") if trace else ())), rows


class Sum(NamedTuple):
    """A cumulative sum in bytes or seconds, with the parts that it adds to the sum before it."""

    name: str
    size: float
    parts: Sequence[tuple[str, float]]


def memory(plan: Plan) -> Iterator[Sum]:
    """The cumulative sums of a GPU's memory in bytes: the allocator's peak, reserved memory, the total.

    The parts of the allocator's peak are kinds of tensors, for example gradients, the largest first.
    """
    inside = sorted(plan.prediction.breakdown.items(), key=lambda item: -item[1])
    outside = [(name, size) for name, size in plan.overheads.parts(plan.peak_bytes).items() if size]
    waste = [part for part in outside if part[0] in plan.overheads.reserved_parts]
    yield Sum("the allocator's peak", plan.peak_bytes, [part for part in inside if part[1]])
    yield Sum("reserved", plan.reserved_bytes, waste)
    yield Sum("total", plan.total_bytes, [part for part in outside if part not in waste])


def times(plan: Plan) -> list[tuple[str, float]]:
    """The parts of a step's time as pairs of name and seconds, the largest first."""
    return sorted(((name, time) for name, time in plan.time.parts.items() if time), key=lambda item: -item[1])


def sources(plan: Plan) -> tuple[str, ...]:
    """Notes on where the plan's figures come from: measured runs, published figures, or estimates."""
    if not plan.machine.is_gpu:
        times = () if plan.machine.card is None else (basis(plan.machine.card, measured=plan.is_measured),)
        return ("memory is that of the whole process", *times)
    runs = plan.overheads.measured
    memory = "memory beyond the allocator's peak is estimated from published figures, not measured"
    if runs:
        these = f"{runs} measured run{'s' if runs > 1 else ''} like this one"
        memory = f"memory beyond the allocator's peak is corrected by {these}"
    if plan.machine.card is None:
        return (
            memory,
            "no card is named, so no times are printed; plans are ranked by an A100's rates",
        )
    return memory, basis(plan.machine.card)
