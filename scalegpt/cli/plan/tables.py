"""The tables of ``scalegpt plan``: every preset on one machine, or one run on every card."""

from scalegpt.architecture.counting import count_parameters
from scalegpt.cli.output import aligned
from scalegpt.hardware.machine import Machine
from scalegpt.plan_page.wording import cards, duration, layout, nodes, sources, total_and_speed
from scalegpt.planner.length import total_steps
from scalegpt.planner.query import Answer, host_notes, machine_notes
from scalegpt.planner.tables import Row, largest
from scalegpt.planner.time.rates import basis_of_all
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
    cells = [(*first, *_cells(row)) for first, row in zip(firsts, rows, strict=True)]
    return aligned([(*heads, *_HEADING), *cells], right={1, 2, 5, 6, 7})


_HEADING = ("micro batch", "recompute, loss", "layout", "total", "tokens/s", "whole run")


def _cells(row: Row) -> tuple[str, ...]:
    plan = row.plan
    if plan is None:
        return "", row.why_not or "", "", "", "", ""
    if not row.fits:
        lacks = f"does not fit: {gib(plan.missing_bytes)} too much" if plan.fits is False else "too little host memory"
        return "", lacks, "", gib(plan.total_bytes), "", ""
    train = plan.run.train
    total, speed = total_and_speed(plan)
    whole_run = duration(total_steps(train, plan.batch.tokens) * plan.seconds) if speed else ""
    settings = f"{train.recompute}, {train.loss}", layout(plan.run.parallel, stage="")
    return str(plan.batch.micro_batch), *settings, total, speed, whole_run


def _largest(rows: list[Row]) -> str:
    best, plain = largest(rows), largest(rows, without_offload=True)
    if best is None:
        return "no preset fits"
    if plain is not None and plain is not best:
        return f"the largest that fits: {best.name}; without offload: {plain.name}"
    return f"the largest that fits: {best.name}" + ("" if plain is best else "; without offload: none")
