"""Times steps of our trainer, whole and by phase, for any preset, backend and setting.

python benchmarks/step_bench.py --preset tiny --micro_batch 4 --tokens_per_step 1024          (from the repository's root)
torchrun --nproc_per_node 2 benchmarks/step_bench.py --preset tiny --backend fsdp --zero_stage 2
python benchmarks/step_bench.py --preset 350M_1024 --steps 20 --json step.json

Every step is the trainer's own, with real data loading, guards, logging and metrics. The tokens are random unless
--input_file is given. First whole steps are timed. Then the same number of steps is timed by phase, with a wait for the
device between the phases. All flags of ``launch/train.py`` are accepted. The times are medians; for the whole step, the
first and third quartile are printed too.
"""

import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.arguments import at_least, new_file, write_figures
from benchmarks.steps.ours import PHASES, OurSteps
from scalegpt.backends import World
from scalegpt.backends.capabilities import device_name
from scalegpt.cli.parser import given_settings
from scalegpt.cli.train import make_parser
from scalegpt.config.run import SECTIONS
from scalegpt.errors import InputError, RunError
from scalegpt.hardware.gpus import peak_flops
from scalegpt.planner.time.work import flops_per_token
from scalegpt.training import memory
from scalegpt.training.metrics import mfu

LOADED_STEPS = 50
"""The number of steps whose data the loader loads when it is timed by itself."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table on the first rank, and write the JSON file that was asked for."""
    parser = make_parser()
    parser.description = __doc__
    parser.prog = "step_bench"
    parser.add_argument("--steps", type=at_least(1), default=10, help="steps that count, whole and by phase each [10]")
    parser.add_argument("--warmup", type=at_least(0), default=3, help="steps before them [3]")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write the figures there")
    try:
        arguments = parser.parse(sys.argv[1:] if argv is None else argv)
        world = World.join(arguments.device)
        with tempfile.TemporaryDirectory() as folder:
            flags = given_settings(arguments, *SECTIONS.values())
            shared = world.on_first(lambda: folder)
            figures = measure(flags, arguments.preset, Path(shared), world, arguments.steps, arguments.warmup)
            world.barrier()
    except (InputError, RunError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"step_bench: error: {error}", file=sys.stderr)
        return error.exit_status
    if world.is_first:
        print(table(figures))
        write_figures(arguments.json, figures)
    world.leave()
    return 0


def measure(
    flags: dict[str, Any], preset: str | None, folder: Path, world: World, steps: int, warmup: int
) -> dict[str, Any]:
    """The results of one configuration as plain values: step times, phases, throughput, memory, and the device."""
    ours = OurSteps(flags, preset, folder, world)
    try:
        for _ in range(warmup):
            ours.step()
        if world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = [ours.step() for _ in range(steps)]
        phases = ours.phases(steps)
        median = statistics.median(seconds)
        rate = ours.tokens / median
        run = ours.job.run
        return {
            "preset": preset,
            "layout": ours.layout,
            "device": device_name(world.device),
            "ranks": world.size,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "tokens_per_step": ours.tokens,
            "step_seconds": median,
            "middle_half": statistics.quantiles(seconds, n=4)[::2] if steps > 1 else [median, median],
            "tokens_per_second": rate,
            "mfu": mfu(
                rate, flops_per_token(run.model), peak_flops(device_name(world.device), run.train.precision), world.size
            ),
            "phases": phases,
            "loader_tokens_per_second": ours.loader_rate(LOADED_STEPS),
            "predicted_peak_bytes": ours.job.plan.peak_bytes,
            **memory.measure(world.device).as_status(),
        }
    finally:
        ours.close()


def table(figures: dict[str, Any]) -> str:
    """The results as text."""
    low, high = figures["middle_half"]
    phases, whole = figures["phases"], sum(figures["phases"].values())
    share = f", MFU {figures['mfu']:.1%}" if figures["mfu"] else ""
    lines = [
        f"{figures['ranks']} × {figures['device']}, {figures['threads']} threads, torch {figures['torch']}",
        figures["layout"],
        f"{figures['tokens_per_step']:,} tokens a step: {1e3 * figures['step_seconds']:.1f} ms "
        f"({1e3 * low:.1f} to {1e3 * high:.1f}), {figures['tokens_per_second']:,.0f} tokens/s{share}",
        f"  the loader alone gives {figures['loader_tokens_per_second']:,.0f} tokens/s, "
        f"{figures['loader_tokens_per_second'] / figures['tokens_per_second']:,.0f} times as many",
        *(f"  {phase:18s} {1e3 * phases[phase]:10.2f} ms {phases[phase] / whole:7.2%}" for phase in PHASES),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
