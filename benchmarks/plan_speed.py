"""Measures how long the planner takes, for one ``scalegpt plan`` and for twelve presets on every card of the catalogue.

``python benchmarks/plan_speed.py`` prints both times, and the memory that planning the presets takes. The twelve
presets have GPT-2's shape, so that times can be compared with earlier ones. Each measurement runs in its own processes
with cached bytecode, like an installed package. CPU time is printed beside wall-clock time, since other load on the
machine disturbs it less.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

COMMAND = ("plan", "--gpu", "a100-40gb", "--preset", "500M_1024")
COUNTS = ((1, 1), (8, 1), (8, 8))
"""(cards in each machine, machines) for which the presets are planned."""


def sweep() -> tuple[int, int]:
    """Plan the twelve presets on 1, 8 and 64 of every card; return the number of plans, and how many of them fit."""
    from scalegpt.config.presets import preset_names, resolve
    from scalegpt.hardware.gpus import catalogue
    from scalegpt.hardware.machine import Machine
    from scalegpt.planner.tables import over_presets
    from scalegpt.planner.time.calibration import Calibration

    names = [name for name in preset_names() if resolve(preset=name).model.position == "learned"]
    rows = [
        row
        for card in catalogue()
        for gpus, nodes in COUNTS
        for row in over_presets(Machine.with_card(card, gpus=gpus, nodes=nodes), {}, Calibration(), names=names)
    ]
    return len(rows), sum(row.fits for row in rows)


def measured(words: tuple[str, ...], bytecode: str) -> tuple[float, float, str]:
    """Run Python in a new process.

    Returns:
        Seconds of wall-clock time, seconds of CPU time, and the process's standard output.
    """
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": bytecode, "SCALEGPT_GPUS": ""}
    settings.pop("PYTHONDONTWRITEBYTECODE", None)
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, *words], env=settings, capture_output=True, text=True, check=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, done.stdout


def main() -> None:
    """Measure both and print the times. With ``--sweep``, only plan the presets in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15, help="runs of the command, of which the median is printed")
    parser.add_argument("--sweep", action="store_true", help="only sweep the catalogue, in this process")
    arguments = parser.parse_args()
    if arguments.sweep:
        start = time.perf_counter()
        made, fitting = sweep()
        seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
        print(f"{made} plans, {fitting} fit: {seconds:.2f} s after the imports, {peak:.0f} MB resident at most")
        return
    with tempfile.TemporaryDirectory() as bytecode:
        command = ("-m", "scalegpt", *COMMAND)
        measured(command, bytecode)  # writes the bytecode
        times = [measured(command, bytecode)[:2] for _ in range(arguments.runs)]
        walls, processor = (statistics.median(column) for column in zip(*times, strict=True))
        print(
            f"scalegpt {' '.join(COMMAND)}: {walls:.3f} s, {processor:.3f} s of processor time, median of {len(times)}"
        )
        wall, processor, said = measured((__file__, "--sweep"), bytecode)
        figures = f"{wall:.2f} s, {processor:.2f} s of processor time"
        print(f"twelve presets on every card, 1, 8 and 64 of it: {figures}; {said}", end="")


if __name__ == "__main__":
    main()
