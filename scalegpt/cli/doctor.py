"""``scalegpt doctor``: check this machine, one line a finding."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from scalegpt.cli.output import show, show_json
from scalegpt.cli.parser import Parser, add_json, path_argument
from scalegpt.system.ranks import ranks_or_alone

EXAMPLE = """\
scalegpt doctor
scalegpt doctor --runs_dir /data/runs --json
torchrun --nproc_per_node 8 -m scalegpt doctor"""

SUMMARY = """\
Find what would keep a run from starting on this machine, slow it down, or end it.

Each line says ok, warning or failure, and how to fix it. The exit status is 1 with a failure, else 0. On a machine without
GPUs the processor's rates are measured too, unless they are stored already; plans and runs use them. Under torchrun the ranks
of all machines meet, and an all-reduce over them is timed."""

SIGNS = {"ok": "ok      ", "warning": "warning ", "failure": "FAILURE "}


def main(argv: Sequence[str]) -> int:
    """Run the checks and print their findings as they come."""
    parser = Parser("doctor", SUMMARY, EXAMPLE)
    parser.add_argument(
        "--runs_dir",
        type=path_argument,
        default="runs",
        metavar="DIR",
        help="folder of all runs; its disk is checked [runs]",
    )
    parser.add_argument("--measure", action="store_true", help="measure the processor's rates again (some seconds)")
    add_json(parser)
    arguments = parser.parse(argv)

    from scalegpt.doctor.checks import FAILURE, Setting
    from scalegpt.doctor.every import CHECKS, run_checks

    is_first = ranks_or_alone().rank == 0
    results, width = [], max(map(len, CHECKS))
    for each in run_checks(Setting(Path(arguments.runs_dir), arguments.measure), None if is_first else ["ranks"]):
        if not is_first:
            continue  # the first rank reports
        results.append(each)
        if not arguments.json:
            fix = f"; fix: {each.finding.fix}" if each.finding.fix else ""
            show(f"{SIGNS[each.finding.state]}{each.check:<{width}}  {each.finding.what}{fix}")
    if not is_first:
        return 0
    failures = sum(each.finding.state == FAILURE for each in results)
    if arguments.json:
        findings = [
            {"check": each.check, **asdict(each.finding), "seconds": round(each.seconds, 3)} for each in results
        ]
        show_json({"failures": failures, "findings": findings})
    return 1 if failures else 0
