"""Measures on a CUDA card what the planner predicts, within a given number of minutes.

python benchmarks/gpu_suite.py all --minutes 8     all four parts, in this order
python benchmarks/gpu_suite.py smoke               every backend, recompute, attention, loss, optimizer; save, resume, sample
python benchmarks/gpu_suite.py plan                predicted memory against the allocator's and the driver's figures
python benchmarks/gpu_suite.py speed               tokens/s and MFU beside a nanoGPT-style loop; losses alone; a profile
python benchmarks/gpu_suite.py choice              the planner's choices on emulated cards of 12, 24 and 40 GB
python benchmarks/gpu_suite.py all --dry           the same rows with tiny models on the CPU, to see that every row runs

A child process measures the rows. If it crashes, hangs, or reports a fatal error, a new process takes the next row. A
part that ends early leaves its remaining minutes to later parts. The results are written after every row, as JSON and
as Markdown, to files in benchmarks/results/ that are named by date and card. Files of earlier runs are never replaced.
A dry run writes to a temporary folder.

Exit status: 0 done, 1 a row failed, 2 bad arguments, 3 there is no CUDA device, 130 interrupted.
"""

import argparse
import json
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

# The script is run by its path, on machines where the packages are not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.arguments import above_zero, pattern
from benchmarks.suite.child import ChildGoneError, Runner
from benchmarks.suite.report import markdown, said, verdicts
from benchmarks.suite.rows import PARTS, PROFILE, ROOT, Part, Row, Values
from scalegpt.storage import write_atomic

DONE, FAILED, BAD_INPUT, NO_GPU, INTERRUPTED = 0, 1, 2, 3, 130

SHARES = {"smoke": 0.125, "plan": 0.35, "speed": 0.65, "choice": 1.0}
"""Part → the share of the remaining time that it may use: of 8 minutes, smoke may use one."""


def device_bench(mode: str) -> Any:
    """The object with which a child process measures rows; only the child imports torch."""
    from benchmarks.suite.measure import make_bench

    return make_bench(mode)


def rows_within(part: Part, take: Callable[[Row], Values], seconds: float) -> Iterator[tuple[Row, Values]]:
    """The rows of a part and their answers. No row begins after ``seconds``."""
    end = time.monotonic() + seconds
    try:
        row = next(part)
        while time.monotonic() < end:
            answer = take(row)
            yield row, answer
            row = part.send(answer)
    except StopIteration:
        return
    except Exception as error:  # an error of the planner, after which the other parts must still be measured
        text = traceback.format_exc()
        yield Row(name="planning"), {"outcome": "failed", "reason": repr(error), "traceback": text, "seconds": 0.0}


def software() -> Values:
    """Date, command, commit, system and versions of libraries, for the record."""
    words = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"]
    commit = ""
    with suppress(OSError):  # no git
        commit = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    versions = {each.name: each.version for each in distributions()}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "commit": commit or "not known",
        "system": f"Python {platform.python_version()}, {platform.platform()}",
        **{name: versions.get(name, "not installed") for name in ("torch", "deepspeed", "liger-kernel")},
    }


def free_path(folder: Path, suite: str, card: str) -> Path:
    """The path of a new JSON file, for example ``all_2026-11-25_NVIDIA-H200_1.json``. Creates the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = "_".join([suite, datetime.now(UTC).date().isoformat(), "-".join(re.findall("[A-Za-z0-9.]+", card))])
    number = 1
    while (folder / f"{stem}_{number}.json").exists():
        number += 1
    return folder / f"{stem}_{number}.json"


def main(arguments: list[str] | None = None) -> int:
    """Run the parts that the arguments name, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=("all", *PARTS))
    parser.add_argument("--minutes", type=above_zero, default=8.0, help="how long all rows together may take [8]")
    parser.add_argument("--only", type=pattern, help="only rows whose name matches this regular expression")
    parser.add_argument("--dry", action="store_true", help="tiny models on the CPU: does every row run?")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="where to write [benchmarks/results]")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write the profile's trace there, for Perfetto")
    given = parser.parse_args(arguments)
    try:
        runner = Runner(device_bench, "dry" if given.dry else "cuda", 60 * given.minutes)
    except ChildGoneError as gone:
        print(f"gpu_suite: error: the measuring process does not start: {gone}", file=sys.stderr)
        return FAILED
    try:
        if runner.greeting["machine"] is None:
            print("gpu_suite: torch finds no CUDA device here; --dry runs every row on this CPU", file=sys.stderr)
            return NO_GPU
        return run(given, runner)
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        runner.close()


def run(given: argparse.Namespace, runner: Runner) -> int:
    """Measure the rows of each part, write the results after each row, and return the exit status."""
    machine, card = runner.greeting.pop("machine"), runner.greeting["card"]
    folder = given.results or (Path(tempfile.mkdtemp()) if given.dry else ROOT / "benchmarks" / "results")
    path = free_path(folder, given.suite, card)
    rows: list[Values] = []
    record = {"suite": given.suite, "format": 2, "dry": given.dry, **software(), **runner.greeting, "rows": rows}

    def take(row: Row) -> Values:
        if given.only and not given.only.search(row.name):
            return {"outcome": "not wanted"}
        trace = {"trace": str(given.trace.resolve())} if given.trace and row.kind == PROFILE else {}
        return runner.take(replace(row, more={**row.more, **trace}))

    for name in PARTS if given.suite == "all" else [given.suite]:
        share = SHARES[name] if given.suite == "all" else 1.0
        for row, answer in rows_within(PARTS[name](machine), take, share * runner.left):
            if answer["outcome"] == "not wanted":
                continue
            rows.append({"part": name, **asdict(row), **answer})
            write_atomic(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
            write_atomic(path.with_suffix(".md"), markdown(record))
            reason = f": {answer['reason'].splitlines()[0]}" if answer.get("reason") else ""
            print(f"{name} {answer['seconds']:5.1f} s {answer['outcome']:13} {row.name}{reason}", flush=True)
        runner.close()  # the next part is measured in a new process
    if not rows:
        print("gpu_suite: error: no row was measured; see --only and --minutes", file=sys.stderr)
        return BAD_INPUT
    print(*([] if given.dry else map(said, verdicts(rows))), path, path.with_suffix(".md"), sep="\n")
    return FAILED if any(row["outcome"] == "failed" for row in rows) else DONE


if __name__ == "__main__":
    sys.exit(main())
