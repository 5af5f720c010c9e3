"""``gpu_suite.py plan``: predicted memory against measured, and its dry run. See ``gpu_suite.py`` for what it is for."""

import argparse
import re
import sys
from collections.abc import Iterator

from benchmarks.suite import plan_report, session
from benchmarks.suite.children import Values
from benchmarks.suite.configuration import Configuration
from benchmarks.suite.frame import BAD_INPUT, Budget, describe_software, installed, write_results
from benchmarks.suite.plan_rows import deepspeed_rows, torch_rows
from benchmarks.suite.session import Session, counts, exit_status, matches, say
from scalegpt.units import gib

MODULE = "benchmarks.suite.plan_child"

USUAL_SECONDS, COMPILED_SECONDS = 6.0, 60.0
"""What a configuration takes, generously; none is begun with less left."""

HANGS = 10
"""A configuration that takes so many times as long as usual hangs, and its process is ended."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's command line."""
    session.add_arguments(parser, "configurations")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure, report, write.

    Args:
        arguments: those of :func:`add_arguments`.

    Returns:
        The exit status.
    """
    budget = Budget(arguments.minutes)
    in_torch, in_deepspeed = (_chosen(rows, arguments.only) for rows in (torch_rows(), deepspeed_rows()))
    if not in_torch and not in_deepspeed:
        print(f"gpu_suite plan: error: --only {arguments.only.pattern}: found in no name", file=sys.stderr)
        return BAD_INPUT
    opened = Session.open("plan", MODULE, dry=arguments.dry)
    if isinstance(opened, int):
        return opened
    say(f"{len(in_torch) + len(in_deepspeed)} configurations on {opened.where}")
    rows, interrupted = _collect(in_torch, in_deepspeed, budget, opened)
    say(counts(rows))
    if opened.gpu is None:
        say("Nothing was measured: tiny models took real steps on the CPU. The figures are predictions for full size.")
    else:
        _report(rows, opened.gpu, opened.torch, budget)
    return exit_status(rows, interrupted=interrupted)


def _collect(
    in_torch: list[Values], in_deepspeed: list[Values], budget: Budget, opened: Session
) -> tuple[list[Values], bool]:
    """All rows with their answers, and whether an interrupt left some out."""
    rows: list[Values] = []
    interrupted = False
    try:
        for row in _taken(in_torch, in_deepspeed, budget, opened):
            rows.append(row)
            say(_line(row))
    except KeyboardInterrupt:
        interrupted = True
        names = {row["name"] for row in rows}
        missing = (row for row in in_torch + in_deepspeed if row["name"] not in names)
        rows += ({**row, "outcome": "left out", "reason": "interrupted"} for row in missing)
    finally:
        opened.close()
    return rows, interrupted


def _chosen(rows: list[Configuration], only: re.Pattern[str] | None) -> list[Values]:
    return [row.as_dict() for row in rows if matches(only, row.name)]


def _taken(in_torch: list[Values], in_deepspeed: list[Values], budget: Budget, opened: Session) -> Iterator[Values]:
    """Each row with its answer. DeepSpeed has a process of its own, since it replaces functions of torch for good."""
    runs_deepspeed = installed("deepspeed") is not None
    kinds = [(sum(map(_usual_seconds, rows)), rows) for rows in (in_torch, in_deepspeed if runs_deepspeed else [])]
    work = opened.work(kinds, budget, usual_seconds=_usual_seconds, most_seconds=_most_seconds)
    for row, answer in work:
        answered = {**row, **answer}
        if answered["outcome"] == "measured":
            plan_report.add_errors(answered)
        yield answered
    if not runs_deepspeed:
        yield from ({**row, "outcome": "skipped", "reason": "DeepSpeed is not installed"} for row in in_deepspeed)


def _usual_seconds(row: Values) -> float:
    return COMPILED_SECONDS if row["compiled"] else USUAL_SECONDS


def _most_seconds(row: Values) -> float:
    return HANGS * USUAL_SECONDS + _usual_seconds(row)


def _line(row: Values) -> str:
    """What is said of a row when it is done."""
    words = f"{row['outcome']:<14} {row['name']}"
    if row["outcome"] == "measured":
        compared = row["compared"]
        words += ": " + ", ".join(
            f"{figure} {gib(found['measured_bytes'])} ({found['error']:+.2%})" for figure, found in compared.items()
        )
    elif row["outcome"] == "stepped":
        known = row["predicted"]
        words += f": {gib(known['peak_bytes'])} predicted peak ({known['binding_phase']}), {gib(known['total_bytes'])} in all"
    words += "".join(f"; {note}" for note in row.get("notes", []))
    return f"{words}: {row['reason']}" if row.get("reason") else words


def _report(rows: list[Values], gpu: Values, torch_version: str, budget: Budget) -> None:
    """Write the record and the report, and say how well the limits are kept."""
    counted = [row for row in rows if not row["apart"]]
    summary = plan_report.summarise(counted)
    record = {
        "suite": "plan",
        "format": 1,
        "software": {**describe_software(), "torch": torch_version},
        "gpu": gpu,
        "seconds": round(budget.used, 1),
        "limits": plan_report.limits(),
        "summary": summary,
        "verdicts": plan_report.verdicts(rows),
        "rows": plan_report.worst_first(rows) + [row for row in rows if row["outcome"] != "measured"],
    }
    for figure, found in summary.items():
        kept = "limits kept" if found["keeps_limits"] else "LIMITS NOT KEPT"
        say(f"{figure}: mean error {found['mean_error']:.2%}, worst {found['worst_error']:+.2%}; {kept}")
    for path in write_results("plan", gpu["name"], record, plan_report.markdown(record)):
        say(str(path))
