"""The tables of ``scalegpt plan``: every preset on a machine, a run on every card."""

from scalegpt.architecture.counting import count_parameters
from scalegpt.cli.output import aligned
from scalegpt.cli.plan.wording import cards, duration, layout, nodes, sources
from scalegpt.hardware.machine import Machine
from scalegpt.planner.length import total_steps
from scalegpt.planner.plan import Plan
from scalegpt.planner.query import Answer, host_notes, machine_notes
from scalegpt.planner.tables import Row, largest
from scalegpt.planner.time.rates import basis_of_all
from scalegpt.units import gib


def presets_table(machine: Machine, rows: list[Row]) -> str:
    """Every preset on a machine, and the largest that fits."""
    usable = machine.usable_bytes or 0
    head = f"{cards(machine)}, {gib(usable)} usable each"
    columns = ("preset", "parameters")
    table = aligned(
        [
            (*columns, *_HEADING),
            *((row.name, f"{count_parameters(row.run.model).total:,}", *_cells(row)) for row in rows),
        ],
        right={1, 2, 5, 6, 7},
    )
    planned = next((row.plan for row in rows if row.plan is not None), None)
    said = (
        *machine_notes(machine),
        *host_notes(*(row.plan for row in rows)),
        *(sources(planned) if planned is not None else ()),
    )
    return "\n\n".join([head, table, _largest(rows), "\n".join(f"note: {note}" for note in said)])


def cards_table(given: Answer, rows: list[Row]) -> str:
    """A run on every card of the catalogue."""
    run, machine = given.choice.run, given.question.machine
    count = f"{machine.gpus} × each card" if machine.gpus > 1 else "each card"
    head = f"{run.name}, {count_parameters(run.model).total:,} parameters, on {count}{nodes(machine)} of the catalogue"
    table = aligned(
        [("card", "memory", *_HEADING), *((row.name, _usable(row.asked.machine), *_cells(row)) for row in rows)],
        right={1, 2, 5, 6, 7},
    )
    more = f"scalegpt plan {' '.join(given.asked.source)} --gpu NAME shows one of them in full".replace("  ", " ")
    said = (*given.notes, *host_notes(*(row.plan for row in rows)), basis_of_all())
    notes = [f"note: {note}" for note in said if not note.startswith("warning")]
    return "\n\n".join([head, table, "\n".join([*notes, more])])


_HEADING = ("micro batch", "recompute, loss", "layout", "total", "tokens/s", "whole run")


def _cells(row: Row) -> tuple[str, ...]:
    plan = row.plan
    if plan is None:
        return "", row.why_not or "", "", "", "", ""
    if not row.fits:
        lacks = f"does not fit: {gib(plan.missing_bytes)} too much" if plan.fits is False else "too little host memory"
        return "", lacks, "", gib(plan.total_bytes), "", ""
    train = plan.run.train
    speed = f"{plan.tokens_per_second:,.0f}" if plan.machine.card is not None else ""
    return (
        str(plan.batch.micro_batch),
        f"{train.recompute}, {train.loss}",
        layout(plan.run.parallel, stage=""),
        gib(plan.total_bytes),
        speed,
        _whole_run(plan) if speed else "",
    )


def _whole_run(plan: Plan) -> str:
    return duration(total_steps(plan.run.train, plan.batch.tokens) * plan.seconds)


def _largest(rows: list[Row]) -> str:
    best, plain = largest(rows), largest(rows, without_offload=True)
    if best is None:
        return "no preset fits"
    if plain is not None and plain is not best:
        return f"the largest that fits: {best.name}; without offload: {plain.name}"
    return f"the largest that fits: {best.name}" + ("" if plain is best else ", with offload alone")


def _usable(machine: Machine) -> str:
    return gib(machine.usable_bytes or 0)
