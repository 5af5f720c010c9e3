"""Compares the tokens per second that a plan predicts for this processor with those that the trainer reaches.

python benchmarks/cpu_speed.py                                                          (from the repository's root)
python benchmarks/cpu_speed.py --presets demo,tiny --precisions fp32 --measure --rounds 3
OMP_NUM_THREADS=1 python benchmarks/cpu_speed.py

The steps are the trainer's own, with data loading, guards, logging and metrics, but with few micro batches. The median
time of several steps counts. With one thread it is processor time, which other processes hardly affect. With more
threads, the benchmark first waits until the machine is idle. The rates are those that are stored for this processor. They
are measured if none are stored, or with --measure at the start of each round. A machine whose speed changes from minute
to minute needs several rounds. The last rows are medians over them.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.arguments import at_least, names_of
from benchmarks.steps.ours import OurSteps
from scalegpt.api import plan
from scalegpt.backends import World
from scalegpt.config.presets import resolve
from scalegpt.hardware.processor import MEASURED
from scalegpt.speed.probes import clock
from scalegpt.speed.rates import is_busy, measure_and_keep, measure_if_needed

PRESETS = {"demo": 4, "shakespeare_char": 8, "tiny": 1, "small": 1}
"""Preset → micro batches of a step, chosen so that a step takes long enough to be timed, but not minutes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print a row for each preset and precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", type=names_of(PRESETS), default=list(PRESETS), metavar="NAMES")
    parser.add_argument("--precisions", type=names_of(dict.fromkeys(MEASURED)), default=list(MEASURED), metavar="NAMES")
    parser.add_argument("--steps", type=at_least(2), default=5, help="steps of each; the first does not count [5]")
    parser.add_argument("--rounds", type=at_least(1), default=1, help="how often all are timed [1]")
    parser.add_argument("--patience", type=at_least(0), default=60, help="seconds to wait for an idle machine [60]")
    parser.add_argument("--measure", action="store_true", help="measure the processor's rates again")
    parser.add_argument("--json", action="store_true", help="print one object a line instead of the table")
    arguments = parser.parse_args(argv)
    world = World.join("cpu")
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for number in range(arguments.rounds):
        _wait(arguments.patience)
        done = measure_and_keep() if arguments.measure else measure_if_needed()
        if not arguments.json:
            print(
                f"{torch.get_num_threads()} threads, torch {torch.__version__}" + (f"; {done.line()}" if done else "")
            )
            print(_LINE.format("preset", "precision", "planned", "measured", "tokens/s off"), flush=True)
        for case in itertools.product(arguments.presets, arguments.precisions):
            _wait(arguments.patience)
            rows.setdefault(case, []).append({"round": number, **compare(*case, arguments.steps, world)})
            _show(rows[case][-1], as_json=arguments.json)
    if arguments.rounds > 1 and not arguments.json:
        print(f"medians over {arguments.rounds} rounds")
        for (preset, precision), found in rows.items():
            off = statistics.median(each["planned"] / each["measured"] - 1 for each in found)
            planned, measured = (statistics.median(each[key] for each in found) for key in ("planned", "measured"))
            print(_LINE.format(preset, precision, f"{planned:,.0f}", f"{measured:,.0f}", f"{off:+.1%}"))
    return 0


_LINE = "{:<18}" + "{:>14}" * 4


def _show(row: dict[str, Any], *, as_json: bool) -> None:
    """Print a preset's figures as a row or as JSON."""
    off = f"{row['planned'] / row['measured'] - 1:+.1%}"
    line = _LINE.format(row["preset"], row["precision"], f"{row['planned']:,.0f}", f"{row['measured']:,.0f}", off)
    print(json.dumps(row) if as_json else line, flush=True)


def compare(preset: str, precision: str, steps: int, world: World) -> dict[str, Any]:
    """Plan and train some steps of a preset; returns the tokens per second of both."""
    run = resolve(preset=preset)
    model, micro = run.model, run.train.micro_batch
    flags: dict[str, Any] = {
        "precision": precision, "vocab_size": model.vocab_size, "micro_batch": micro, "backend": "plain",
        "tokens_per_step": PRESETS[preset] * micro * model.block_size, "recompute": "none", "zero_stage": 0,
    }  # fmt: skip
    planned = plan(preset, gpu="cpu", **flags).choice
    with tempfile.TemporaryDirectory() as folder:
        ours = OurSteps({**flags, "sample_prompt": ""}, preset, Path(folder), world)
        seconds = []
        for _ in range(steps):
            start = clock()
            ours.step()
            seconds.append(clock() - start)
        ours.close()
    return {
        "preset": preset,
        "precision": precision,
        "planned": planned.tokens_per_second,
        "trainers_plan": ours.job.plan.tokens_per_second,
        "measured": ours.tokens / statistics.median(seconds[1:]),
    }


def _wait(patience: int) -> None:
    """Wait until the machine is idle, or patience ends. With a single thread, do not wait."""
    end = time.monotonic() + patience
    while torch.get_num_threads() > 1 and is_busy() and time.monotonic() < end:
        time.sleep(2)


if __name__ == "__main__":
    sys.exit(main())
