"""``gpu_suite.py speed``: how fast the presets train, beside a plain loop, and what each setting costs or brings."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.suite import session, speed_report
from benchmarks.suite.children import LEFT_OUT, Values
from benchmarks.suite.frame import BAD_INPUT, Budget, describe_software, installed, write_results
from benchmarks.suite.session import Session, counts, exit_status, matches, say
from benchmarks.suite.speed_rows import LOSS, PROFILE, Subject, subjects
from benchmarks.suite.speed_trials import Trials, foreseen, need
from scalegpt.units import gib

MODULE = "benchmarks.suite.speed_child"

HANGS = 4
"""A row that takes so many times as long as usual hangs, and its process is ended."""

SLOW_SECONDS = 120.0
"""But compilers may be slow, and DeepSpeed may first build its optimizer for the processor."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's command line."""
    session.add_arguments(parser, "rows")
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="write the profile's whole trace there, for Chrome or Perfetto"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Time, report, write.

    Args:
        arguments: those of :func:`add_arguments`.

    Returns:
        The exit status.
    """
    budget = Budget(arguments.minutes)
    opened = Session.open("speed", MODULE, dry=arguments.dry)
    if isinstance(opened, int):
        return opened
    try:
        machine = opened.machine()
        wanted = partial(matches, arguments.only)
        found, unfit = subjects(machine)
        needs = list(map(need, foreseen(found, wanted)))
        if not any(needs):
            print(f"gpu_suite speed: error: {_why_none(found, arguments)}", file=sys.stderr)
            return BAD_INPUT
        count = sum(map(len, foreseen(found, wanted)))
        say(f"{count} rows, planned for {machine.name}; on {opened.where}")
        trace = None if arguments.trace is None else str(arguments.trace.resolve())
        trials = Trials(found, wanted, trace)
        interrupted = _collect(trials, needs, budget, opened)
    finally:
        opened.close()
    rows = unfit + trials.rows
    say(counts(rows))
    if opened.gpu is None:
        say("Nothing was measured: tiny models took real steps on the CPU, laid out as at full size.")
    else:
        _report(rows, opened, budget)
    return exit_status(rows, interrupted=interrupted)


def _why_none(found: Sequence[Subject], arguments: argparse.Namespace) -> str:
    if not found:
        return "no preset fits this card"
    named = next(iter(foreseen(found)[0]))["name"]
    return f"--only {arguments.only.pattern}: found in no name, such as {named!r}"


def _collect(trials: Trials, needs: list[float], budget: Budget, opened: Session) -> bool:
    """Have all rows answered; whether an interrupt left some out."""
    in_torch, in_deepspeed = trials.kinds()
    runs_deepspeed = installed("deepspeed") is not None
    kinds = list(zip(needs, (in_torch, in_deepspeed), strict=True))[: None if runs_deepspeed else 1]
    work = opened.work(
        kinds,
        budget,
        usual_seconds=lambda job: float(job["usual_seconds"] + job["reserve"]),
        most_seconds=lambda job: HANGS * float(job["usual_seconds"]) + SLOW_SECONDS,
    )
    told = 0
    try:
        for job, answer in work:
            trials.take(job, answer)
            for row in trials.rows[told:]:  # those that were not tried since they are not predicted to fit, too
                say(_line(row))
            told = len(trials.rows)
    except KeyboardInterrupt:
        for jobs in (in_torch, in_deepspeed):
            trials.give_up(jobs, {**LEFT_OUT, "reason": "interrupted"})
        return True
    if not runs_deepspeed:
        trials.give_up(in_deepspeed, {"outcome": "skipped", "reason": "DeepSpeed is not installed"})
    return False


def _line(row: Values) -> str:
    """What is said of a row when it is done."""
    words = f"{row['outcome']:<14} {row['name']}"
    measured = row.get("measured")
    if measured and row["kind"] == PROFILE:
        words += f": no kernel runs in {measured['idle_share']:.1%} of the time"
    elif measured and row["kind"] == LOSS:
        words += f": {1e3 * measured['step_seconds']:.2f} ms, {gib(measured.get('extra_bytes', 0))} extra"
    elif measured:
        share = "" if measured["mfu"] is None else f", MFU {measured['mfu']:.1%}"
        words += f": {measured['tokens_per_second']:,.0f} tokens/s{share}, {gib(measured['reserved_bytes'])} reserved"
    words += "".join(f"; {note}" for note in row.get("notes", []))
    return f"{words}: {row['reason']}" if row.get("reason") else words


def _report(rows: list[Values], opened: Session, budget: Budget) -> None:
    """Write the record and the report, and say how well the limits are kept."""
    assert opened.gpu is not None
    found = speed_report.findings(rows)
    record = {
        "suite": "speed",
        "format": 1,
        "software": {**describe_software(), "torch": opened.torch, "liger-kernel": installed("liger-kernel")},
        "gpu": opened.gpu,
        "seconds": round(budget.used, 1),
        "limits": speed_report.limits(),
        "findings": found,
        "rows": rows,
    }
    for line in speed_report.verdicts(found):
        say(line)
    for path in write_results("speed", opened.gpu["name"], record, speed_report.markdown(record)):
        say(str(path))
