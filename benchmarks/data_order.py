"""Measures the order of windows of a corpus of 10¹² tokens: windows per second, memory, and that no window comes twice.

``python benchmarks/data_order.py`` prints a line for one source and one for a mixture of three. No tokens are needed: the
order is a function of their number.
"""

import argparse
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scalegpt.data.windows.sampler import MixtureSampler
from scalegpt.inputs import shares_of

SIZES = {"one source": ((1.0,), (1.0,)), "three sources": ((1.0, 0.3, 0.1), (0.7, 0.2, 0.1))}
"""Name → number of tokens of each source, relative to the largest, and their weights."""


def main() -> None:
    """Draw windows step by step, and print the rates and the memory of a step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=float, default=1e12, help="tokens of the largest source [1e12]")
    parser.add_argument("--block_size", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=1 << 16, help="windows of a step")
    parser.add_argument("--steps", type=int, default=64)
    arguments = parser.parse_args()
    for name, (sizes, weights) in SIZES.items():
        tokens = [int(size * arguments.tokens) for size in sizes]
        tracemalloc.start()
        order = MixtureSampler(tokens, shares_of(weights), arguments.block_size, seed=1)
        order.windows(0, arguments.windows)
        memory = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        start, used = time.perf_counter(), time.process_time()
        drawn = [order.windows(step * arguments.windows, arguments.windows) for step in range(arguments.steps)]
        wall, cpu = time.perf_counter() - start, time.process_time() - used
        count = arguments.steps * arguments.windows
        different = len(np.unique(np.concatenate([each.starts * len(sizes) + each.sources for each in drawn])))
        print(
            f"{name}: {count / wall:,.0f} windows/s of wall-clock time, {count / cpu:,.0f} of CPU time; "
            f"{memory / 1e6:.1f} MB; {different:,} of {count:,} windows are different"
        )


if __name__ == "__main__":
    main()
