"""The tables of ``scalegpt plan``: every preset on one machine, one run on every card, or on more and more GPUs."""

from collections.abc import Iterable

from scalegpt.architecture.counting import count_parameters
from scalegpt.cli.output import aligned
from scalegpt.hardware.machine import Machine
from scalegpt.plan_page.wording import cards, duration, layout, money, nodes, sources, total_and_speed
from scalegpt.planner.cost import Cost
from scalegpt.planner.length import total_steps
from scalegpt.planner.query import Answer, host_notes, machine_notes
from scalegpt.planner.sweep import Point, Sweep
from scalegpt.planner.tables import Row, largest
from scalegpt.planner.time.rates import basis_of_all
from scalegpt.text import one_line
from scalegpt.units import gib


def presets_table(machine: Machine, rows: list[Row]) -> str:
    """A text table with the plan of every preset on one machine, and a line that names the largest preset that fits."""
    head = f"{cards(machine)}, {gib(machine.usable_bytes or 0)} usable each"
    firsts = [(row.name, f"{count_parameters(row.run.model).total:,}") for row in rows]
    planned = next((row.plan for row in rows if row.plan is not None), None)
    said = [*machine_notes(machine), *host_notes(*(row.plan for row in rows)), *(sources(planned) if planned else ())]
    notes = "\n".join(f"note: {note}" for note in said)
    return "\n\n".join([head, _table(("preset", "parameters"), firsts, rows), _largest(rows), notes])


def cards_table(given: Answer, rows: list[Row]) -> str:
    """A text table with the plan of one run on every card of the catalogue."""
    run, machine = given.choice.run, given.question.machine
    count = f"{machine.gpus} × each card" if machine.gpus > 1 else "each card"
    head = f"{run.name}, {count_parameters(run.model).total:,} parameters, on {count}{nodes(machine)} of the catalogue"
    firsts = [(row.name, gib(row.asked.machine.usable_bytes or 0)) for row in rows]
    more = " ".join(["scalegpt plan", *given.asked.source.words, "--gpu NAME shows one of them in full"])
    said = (*given.notes, *host_notes(*(row.plan for row in rows)), basis_of_all())
    notes = [f"note: {note}" for note in said if not note.startswith("warning")]
    return "\n\n".join([head, _table(("card", "memory"), firsts, rows), "\n".join([*notes, more])])


def _table(heads: tuple[str, str], firsts: list[tuple[str, str]], rows: list[Row]) -> str:
    """The plans of ``rows`` as a text table; ``firsts`` has the first two cells of each row, ``heads`` their headings."""
    priced = any(row.asked.machine.gpu_price is not None for row in rows)
    cells = [(*first, *_cells(row)[: None if priced else -1]) for first, row in zip(firsts, rows, strict=True)]
    table = aligned([(*heads, *_HEADING, *(("cost",) if priced else ())), *cells], right={1, 2, 5, 6, 7, 8})
    return "\n\n".join([table, *_reasons((row.name, row.why_not) for row in rows)])


def _reasons(rows: Iterable[tuple[str, str | None]]) -> list[str]:
    """The lines below a table that say why rows have no plan, for each name and reason, as one text; none: no text."""
    lines = [one_line(f"{name}: {why_not}") for name, why_not in rows if why_not]
    return ["\n".join(lines)] if lines else []


def sweep_table(found: Sweep) -> str:
    """A text table of one run on more and more GPUs, and where adding GPUs stops paying."""
    run, machine = found.asked.run, found.asked.machine
    head = (
        f"{run.name}, {count_parameters(run.model).total:,} parameters, on {machine.name}s, up to {machine.gpus} in a "
        f"machine\na step has {found.tokens:,} tokens on all of them (strong scaling)"
    )
    priced = machine.gpu_price is not None
    unit = "cost of 1M tokens" if priced else "GPU hours for 1M tokens"
    heads = (
        "GPUs", "machines", "tokens/s", "efficiency", "of this step", "whole run", *(("cost",) if priced else ()), unit,
        "micro batch", "layout",
    )  # fmt: skip
    table = aligned([heads, *(_point(point, priced=priced) for point in found.points)], right=set(range(9 + priced)))
    below = _reasons((f"{point.gpus} GPUs" if point.gpus > 1 else "1 GPU", point.row.why_not) for point in found.points)
    said = [found.stops, *([found.ended] if found.ended else [])]
    given = next((point.row.given for point in reversed(found.points) if point.row.given is not None), None)
    notes = [] if given is None else [note for note in given.notes if not note.startswith("warning")]
    notes += [
        "efficiency: tokens/s of each GPU, relative to the fewest GPUs; of this step: relative to the line above",
        *([_ABOVE] if any((point.efficiency or 0.0) >= 1.005 for point in found.points) else []),
        *(sources(given.choice) if given is not None else ()),
    ]
    return "\n\n".join([head, table, *below, "\n".join(said), "\n".join(f"note: {note}" for note in notes)])


def _point(point: Point, *, priced: bool) -> tuple[str, ...]:
    row, plan, cost = point.row, point.row.plan, point.cost
    counts = str(point.gpus), str(row.asked.machine.nodes)
    if plan is None or cost is None or point.efficiency is None:
        lacks = _BELOW if row.why_not else "too little host memory" if plan and plan.fits else "does not fit"
        return (*counts, *("",) * (6 + priced), lacks)
    amounts = (
        (money(cost.money or 0.0), money(cost.money_per_million or 0.0))
        if priced
        else (f"{cost.gpu_hours_per_million:.3g}",)
    )
    kept = "" if point.kept is None else f"{point.kept:.0%}"
    return (
        *counts, f"{plan.tokens_per_second:,.0f}", f"{point.efficiency:.0%}", kept, duration(3600 * cost.hours), *amounts,
        f"{plan.batch.micro_batch} × {plan.batch.grad_accum}", layout(plan.run.parallel, stage=""),
    )  # fmt: skip


_BELOW = "no plan"
_ABOVE = "efficiency above 100%: more GPUs each hold less of the model, and a plan fits that is faster for each of them"
_HEADING = ("micro batch", "recompute, loss", "layout", "total", "tokens/s", "whole run")


def _cells(row: Row) -> tuple[str, ...]:
    plan = row.plan
    if plan is None:
        return "", _BELOW, "", "", "", "", ""
    if not row.fits:
        lacks = f"does not fit: {gib(plan.missing_bytes)} too much" if plan.fits is False else "too little host memory"
        return "", lacks, "", gib(plan.total_bytes), "", "", ""
    train = plan.run.train
    total, speed = total_and_speed(plan)
    whole_run = duration(total_steps(train, plan.batch.tokens) * plan.seconds) if speed else ""
    settings = f"{train.recompute}, {train.loss}", layout(plan.run.parallel, stage="")
    cost = Cost.of(plan)
    amount = "" if cost is None or cost.money is None else money(cost.money)
    return str(plan.batch.micro_batch), *settings, total, speed, whole_run, amount


def _largest(rows: list[Row]) -> str:
    best, plain = largest(rows), largest(rows, without_offload=True)
    if best is None:
        return "no preset fits"
    if plain is not None and plain is not best:
        return f"the largest that fits: {best.name}; without offload: {plain.name}"
    return f"the largest that fits: {best.name}" + ("" if plain is best else "; without offload: none")
