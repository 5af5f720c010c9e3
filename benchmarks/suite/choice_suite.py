"""``gpu_suite.py choice``: do the planner's choices run, is anything left on the table, and are they as fast as predicted?"""

import argparse
import sys

from benchmarks.suite import choice_report, session
from benchmarks.suite.children import Values
from benchmarks.suite.choice_rows import Cell, cells
from benchmarks.suite.choice_trials import Trials
from benchmarks.suite.frame import BAD_INPUT, Budget, describe_software, installed, write_results
from benchmarks.suite.session import Session, counts, exit_status, matches, say
from scalegpt.hardware.machine import Machine
from scalegpt.units import gib

MODULE = "benchmarks.suite.choice_child"

HANGS = 6
"""A trial that takes so many times as long as usual hangs, and its process is ended."""

SLOW_SECONDS = 120.0
"""But DeepSpeed may first build its optimizer for the processor."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's command line."""
    session.add_arguments(parser, "rows")
    parser.add_argument("--no_compile", action="store_true", help="train uncompiled, as with --compile off")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Plan, train, report, write.

    Args:
        arguments: those of :func:`add_arguments`.

    Returns:
        The exit status.
    """
    budget = Budget(arguments.minutes)
    opened = Session.open("choice", MODULE, dry=arguments.dry)
    if isinstance(opened, int):
        return opened
    try:
        machine = opened.machine()
        planned = cells(machine, compiled=not arguments.no_compile)
        kept = [cell for cell in planned if matches(arguments.only, cell.name)]
        if not kept:
            print(f"gpu_suite choice: error: {_why_none(planned, arguments, machine)}", file=sys.stderr)
            return BAD_INPUT
        say(f"{len(kept)} rows: presets on emulated cards, planned for {machine.name}; on {opened.where}")
        rows, interrupted = _collect(kept, budget, opened)
    finally:
        opened.close()
    say(counts(rows))
    if opened.gpu is None:
        say("Nothing was measured: tiny models took real steps on the CPU, set up as chosen for full size.")
    else:
        _report(rows, opened, machine, budget, compiled=not arguments.no_compile)
    return exit_status(_all_outcomes(rows), interrupted=interrupted)


def _why_none(planned: list[Cell], arguments: argparse.Namespace, machine: Machine) -> str:
    if planned:
        return f"--only {arguments.only.pattern}: found in no name, such as {planned[0].name!r}"
    return f"{machine.name} has {gib(machine.usable_bytes or 0)}, less than the smallest card to be emulated"


def _collect(kept: list[Cell], budget: Budget, opened: Session) -> tuple[list[Values], bool]:
    """All rows, and whether an interrupt ended them."""
    trials = Trials(kept, dry=opened.gpu is None)
    for row in trials.rows:
        if row["chosen"] is None:
            say(f"does not fit   {row['name']}, by the planner")
    kinds = trials.kinds()
    runs_deepspeed = installed("deepspeed") is not None
    work = opened.work(
        kinds if runs_deepspeed else kinds[:1],
        budget,
        usual_seconds=lambda job: float(job["usual_seconds"]),
        most_seconds=lambda job: HANGS * float(job["usual_seconds"]) + SLOW_SECONDS,
    )
    interrupted = False
    try:
        for job, answer in work:
            trials.take(job, answer)
            say(_line(job, answer))
    except KeyboardInterrupt:
        interrupted = True
    for row in trials.rows:
        for each in (row, *row["alternatives"]):
            is_deepspeed = (each.get("chosen") or each).get("backend") == "deepspeed"
            if each["outcome"] == "left out" and is_deepspeed and not runs_deepspeed:
                each |= {"outcome": "skipped", "reason": "DeepSpeed is not installed"}
    return trials.rows, interrupted


def _all_outcomes(rows: list[Values]) -> list[Values]:
    """Everything that was tried, for the exit status."""
    tried = [*rows]
    for row in rows:
        tried += row["alternatives"]
        tried += row.get("largest", {}).get("trials", [])
        tried += row.get("single_sequences", {}).get("trials", [])
    return tried


def _line(job: Values, answer: Values) -> str:
    """What is said of a trial when it is done."""
    words = f"{answer['outcome']:<14} {job['cell']}, {job['what']}: {job['name']}"
    measured = answer.get("measured", {})
    if "reserved_bytes" in measured:
        words += f"; {gib(measured['reserved_bytes'])} reserved of {gib(answer['cap_bytes'])}"
        words += f", {measured['step_seconds']:.3f} s a step"
    words += "".join(f"; {note}" for note in answer.get("notes", []))
    return f"{words}: {answer['reason']}" if answer.get("reason") else words


def _report(rows: list[Values], opened: Session, machine: Machine, budget: Budget, *, compiled: bool) -> None:
    """Write the record and the report, and say how well the limits are kept."""
    assert opened.gpu is not None
    summary = choice_report.summarise(rows)
    record = {
        "suite": "choice",
        "format": 1,
        "software": {**describe_software(), "torch": opened.torch},
        "gpu": opened.gpu,
        "rates_of": machine.card.name if machine.card else None,
        "compiled": compiled,
        "seconds": round(budget.used, 1),
        "limits": choice_report.limits(),
        "summary": summary,
        "rows": rows,
    }
    for line in choice_report.verdicts(summary):
        say(line)
    for path in write_results("choice", opened.gpu["name"], record, choice_report.markdown(record)):
        say(str(path))
