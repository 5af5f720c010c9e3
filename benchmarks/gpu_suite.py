"""Measures on a CUDA card what the rest of the project predicts. Each suite is one command of under 9 minutes.

python benchmarks/gpu_suite.py plan          predicted memory against the allocator's and the driver's figures
python benchmarks/gpu_suite.py choice        the planner's choices on emulated cards: do they run, and as fast as it says?
python benchmarks/gpu_suite.py speed         tokens per second, MFU and memory, beside a nanoGPT-style loop, and a profile
python benchmarks/gpu_suite.py plan --dry    the same configurations, tiny and on the CPU: do they all build and step?

``plan`` takes some sixty configurations through three or more optimizer steps of the trainer's own backends, on random
tokens: the presets, plain, FSDP2 and DeepSpeed on one GPU, FSDP2 as rank 0 of a fake process group of eight (its allocations
are real, nothing is sent), micro batches, recompute, loss, accumulation, optimizer, attention, dtypes, dropout. For each
it compares, by the planner's tables alone and without earlier measurements,

- the predicted peak and cuBLAS workspaces with ``torch.cuda.max_memory_allocated``,
- the predicted reservation with ``torch.cuda.max_memory_reserved``,
- the predicted total with what the driver counts: by NVML for the process, else what is in use on the card.

What is not predicted to fit the card, with a tenth to spare for an error, is left out; running out of memory is a result like
any other, held against the prediction.

``choice`` gives the planner the card at hand with the memory of cards of 8, 10, 12, 16, 24, 40 and 80 GB, as far as it has
that, and presets of 150M to 500M. The allocator is held to the emulated card's memory less what lies outside the allocator
(:mod:`benchmarks.suite.choice_child` says how). For each size and preset

- the chosen plan takes twenty optimizer steps: none may run out of memory, and tokens per second are to be as predicted;
- the largest micro batch that runs, all else as chosen, is found by bisection: how much of it was chosen?
- for one preset of each size the next best plans are timed too, one of them laid out otherwise: is the predicted order right?

What the planner says does not fit is listed and not tried. The blocks are compiled, as is the trainer's default
(``--no_compile``: they are not). Rows come in rounds that hold every size and preset, so that what time leaves out is spread.

``speed`` times 150M_1024, 350M_1024 and 500M_1024, all with the same tokens in a step: as the planner chooses them for one
process, and beside that a nanoGPT-style loop, compiled; then one setting changed at a time: each backend over one rank,
recompute, loss, compilation, attention kernels, micro batches. The head's loss is also timed alone, ours, torch's
``linear_cross_entropy`` and, where ``liger-kernel`` is installed, Liger's. The best row is profiled; ``--trace FILE`` keeps
the whole trace. Predicted speed and memory stand beside the measured ones, and each limit is said to be kept or not.

At the end of ``--minutes`` what is left is named and left out. JSON and Markdown go into ``benchmarks/results/``, named by
date and card; an earlier file is never replaced.

Exit status: 0 done, 1 a configuration failed in a way that is no result, 2 bad arguments, 3 there is no CUDA device,
130 interrupted (what was measured by then is written).
"""

import argparse
import sys
from pathlib import Path

# Run by path: the repository's packages must be found without installed ones.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.suite import choice_suite, plan_suite, speed_suite
from benchmarks.suite.frame import INTERRUPTED


def main(arguments: list[str] | None = None) -> int:
    """Run the suite that is named.

    Args:
        arguments: the command line; None: the process's own.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    suites = parser.add_subparsers(dest="suite", required=True, metavar="SUITE")
    plan_suite.add_arguments(suites.add_parser("plan", help="predicted memory against measured"))
    choice_suite.add_arguments(suites.add_parser("choice", help="the planner's choices on emulated cards"))
    speed_suite.add_arguments(suites.add_parser("speed", help="tokens per second, MFU and memory, and a profile"))
    given = parser.parse_args(arguments)
    try:
        status: int = given.run(given)
    except KeyboardInterrupt:
        return INTERRUPTED
    return status


if __name__ == "__main__":
    sys.exit(main())
