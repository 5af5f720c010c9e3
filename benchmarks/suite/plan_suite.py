"""``gpu_suite.py plan``: predicted memory against measured, and its dry run. See ``gpu_suite.py`` for what it is for."""

import argparse
import re
import sys
from collections.abc import Callable, Iterator

from benchmarks.suite import plan_report
from benchmarks.suite.children import Child, ChildGoneError, Values, work_through
from benchmarks.suite.frame import (
    BAD_INPUT,
    DONE,
    FAILED,
    INTERRUPTED,
    Budget,
    describe_software,
    installed,
    no_gpu,
    positive,
    regular_expression,
    write_results,
)
from benchmarks.suite.plan_rows import Configuration, deepspeed_rows, torch_rows
from scalegpt.planner.plan import gib

MODULE = "benchmarks.suite.plan_child"

MINUTES = 8.5
USUAL_SECONDS, COMPILED_SECONDS = 6.0, 60.0
"""What a configuration takes, generously; none is begun with less left."""

HANGS = 10
"""A configuration that takes so many times as long as usual hangs, and its process is ended."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's command line."""
    parser.add_argument(
        "--minutes",
        type=positive,
        default=MINUTES,
        help="leave out what does not fit in so many (default: %(default)s)",
    )
    parser.add_argument(
        "--only", type=regular_expression, help="only configurations in whose name this regular expression is found"
    )
    parser.add_argument(
        "--dry",
        action="store_true",
        help="take the same configurations through real steps, tiny and on the CPU; measure and write nothing",
    )
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
    mode = "dry" if arguments.dry else "cuda"
    try:
        child = Child(MODULE, [mode])
    except ChildGoneError as gone:
        print(f"gpu_suite plan: error: the measuring process does not start: {gone}", file=sys.stderr)
        return FAILED
    gpu, torch_version = child.greeting["gpu"], child.greeting["torch"]
    if gpu is None and not arguments.dry:
        child.close()
        return no_gpu("plan", torch_version)
    _say(f"{len(in_torch) + len(in_deepspeed)} configurations on {'the CPU, tiny' if gpu is None else gpu['name']}")
    rows, interrupted = _collect(in_torch, in_deepspeed, budget, child, mode)
    _say(_counts(rows))
    if arguments.dry:
        _say("Nothing was measured: tiny models took real steps on the CPU. The figures are predictions for full size.")
    else:
        _report(rows, gpu, torch_version, budget)
    failed = any(row["outcome"] == "failed" for row in rows)
    return INTERRUPTED if interrupted else FAILED if failed else DONE


def _collect(
    in_torch: list[Values], in_deepspeed: list[Values], budget: Budget, first: Child, mode: str
) -> tuple[list[Values], bool]:
    """All rows with their answers, and whether an interrupt left some out."""
    waiting = [first]

    def start(seconds: float) -> Child:
        return waiting.pop() if waiting else Child(MODULE, [mode], seconds)

    rows: list[Values] = []
    interrupted = False
    try:
        for row in _taken(in_torch, in_deepspeed, budget, start):
            rows.append(row)
            _say(_line(row))
    except KeyboardInterrupt:
        interrupted = True
        names = {row["name"] for row in rows}
        missing = (row for row in in_torch + in_deepspeed if row["name"] not in names)
        rows += ({**row, "outcome": "left out", "reason": "interrupted"} for row in missing)
    finally:
        for child in waiting:
            child.close()
    return rows, interrupted


def _chosen(rows: list[Configuration], only: re.Pattern[str] | None) -> list[Values]:
    return [row.as_dict() for row in rows if only is None or only.search(row.name)]


def _taken(
    in_torch: list[Values], in_deepspeed: list[Values], budget: Budget, start: Callable[[float], Child]
) -> Iterator[Values]:
    """Each row with its answer. DeepSpeed has a process of its own, since it replaces functions of torch for good."""
    runs_deepspeed = installed("deepspeed") is not None
    kinds = [in_torch, in_deepspeed] if runs_deepspeed else [in_torch]
    for number, rows in enumerate(kinds):
        needs = [sum(map(_usual_seconds, each)) for each in kinds[number:]]
        part = budget.share(needs[0] / max(1.0, sum(needs)))
        work = work_through(rows, start, part, usual_seconds=_usual_seconds, most_seconds=_most_seconds)
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


def _counts(rows: list[Values]) -> str:
    outcomes = [row["outcome"] for row in rows]
    return ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in dict.fromkeys(outcomes))


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
        _say(f"{figure}: mean error {found['mean_error']:.2%}, worst {found['worst_error']:+.2%}; {kept}")
    for path in write_results("plan", gpu["name"], record, plan_report.markdown(record)):
        _say(str(path))


def _say(text: str) -> None:
    print(text, flush=True)
