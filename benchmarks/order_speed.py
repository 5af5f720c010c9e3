"""Times how a corpus of 10^12 tokens is opened and its windows are drawn in shuffled order, and measures the memory.

``python benchmarks/order_speed.py`` makes a folder of sparse token files, opens it, draws the starts of windows, and reads
some windows. It also draws windows of a mixture of three sources. ``--whole`` draws a whole epoch and checks that each window
comes once. This takes many minutes, and one byte of memory per window. ``--json`` prints one object.
"""

import argparse
import json
import os
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scalegpt.data.shards import open_tokens
from scalegpt.data.windows.sampler import MixtureSampler, WindowSampler, cut_windows
from scalegpt.inputs import shares_of

SIZES = (512, 10_000, 100_000)
"""The numbers of windows that are drawn at a time."""

MIXTURE = ((1.0, 0.7), (0.3, 0.2), (0.1, 0.1))
"""Each source of the mixture: its tokens relative to the corpus, and its weight."""


def make_sparse(folder: Path, tokens: int, shards: int) -> None:
    """Make a folder of prepared tokens whose training files are holes.

    Args:
        folder: an empty folder.
        tokens: number of training tokens.
        shards: number of files that they are divided into.
    """
    counts = [tokens // shards + (number < tokens % shards) for number in range(shards)]
    listed = [{"name": f"train_{number:05}.bin", "tokens": each, "sha256": ""} for number, each in enumerate(counts)]
    for shard, count in zip(listed, counts, strict=True):
        path = folder / str(shard["name"])
        path.touch()
        os.truncate(path, 2 * count)
    (folder / "val.bin").write_bytes(bytes(4096))
    meta = {
        "format": "scalegpt-tokens",
        "version": 2,
        "dtype": "uint16",
        "train_tokens": tokens,
        "val_tokens": 2048,
        "tokenizer": {"kind": "byte"},
        "sources": [],
        "shards": {"train": listed, "val": [{"name": "val.bin", "tokens": 2048, "sha256": ""}]},
    }
    (folder / "meta.json").write_text(json.dumps(meta))


def rate(sampler: WindowSampler, windows: int, at_once: int) -> float:
    """Windows drawn per second, ``at_once`` together."""
    start = time.perf_counter()
    for first in range(0, windows, at_once):
        sampler.starts(first, at_once)
    return windows / (time.perf_counter() - start)


def mixture_rate(tokens: int, block_size: int, windows: int, at_once: int) -> float:
    """Windows of the mixture drawn per second, ``at_once`` together."""
    sizes, weights = zip(*MIXTURE, strict=True)
    sampler = MixtureSampler([int(size * tokens) for size in sizes], shares_of(weights), block_size, seed=1)
    start = time.perf_counter()
    for first in range(0, windows, at_once):
        sampler.windows(first, at_once)
    return windows / (time.perf_counter() - start)


def peak_bytes(sampler: WindowSampler, at_once: int) -> int:
    """The most memory that drawing ``at_once`` windows takes, in bytes."""
    tracemalloc.start()
    sampler.starts(0, at_once)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def are_distinct(starts: npt.NDArray[np.int64]) -> bool:
    """Whether no start comes twice."""
    return len(np.unique(starts)) == len(starts)


def comes_once(sampler: WindowSampler, at_once: int = 100_000) -> bool:
    """Whether an epoch has every window once."""
    seen = np.zeros(sampler.tokens // sampler.block_size + 1, dtype=bool)
    for begin in range(0, sampler.windows, at_once):
        starts = sampler.starts(begin, min(at_once, sampler.windows - begin))
        seen[starts // sampler.block_size] = True  # windows of an epoch begin whole blocks apart
    return int(seen.sum()) == sampler.windows


def measure(tokens: int, shards: int, block_size: int, windows: int, *, whole: bool) -> dict[str, Any]:
    """Make the folder, and measure everything; rates are in windows per second, memory in bytes."""
    with tempfile.TemporaryDirectory() as scratch:
        make_sparse(Path(scratch), tokens, shards)
        start = time.perf_counter()
        opened = open_tokens(scratch)
        opening = time.perf_counter() - start
        sampler = WindowSampler(len(opened.train), block_size, seed=1)
        windows = min(windows, sampler.windows)  # a second epoch begins windows again
        rates = {str(size): rate(sampler, windows, size) for size in SIZES}
        start = time.perf_counter()
        cut_windows(opened.train, sampler.starts(0, 2000), block_size)
        reading = 2000 / (time.perf_counter() - start)
    return {
        "tokens": tokens,
        "files": shards,
        "windows": sampler.windows,
        "drawn": windows,
        "opening_seconds": opening,
        "drawn_per_second": rates,
        "mixture_drawn_per_second": mixture_rate(tokens, block_size, windows, SIZES[-1]),
        "order_peak_bytes": peak_bytes(sampler, SIZES[-1]),
        "distinct": are_distinct(sampler.starts(0, windows)),
        "read_per_second": reading,
        **({"each_once": comes_once(sampler)} if whole else {}),
    }


def main() -> None:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=float, default=1e12)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--block_size", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=1_000_000, help="number of windows to draw")
    parser.add_argument(
        "--whole", action="store_true", help="draw a whole epoch, and check that each window comes once"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    chosen = parser.parse_args()
    found = measure(int(chosen.tokens), chosen.files, chosen.block_size, chosen.windows, whole=chosen.whole)
    if chosen.json:
        print(json.dumps(found, indent=1))
        return
    print(
        f"{found['tokens']:,} tokens in {found['files']:,} files, {found['windows']:,} windows of {chosen.block_size}"
    )
    print(f"opened in {found['opening_seconds']:.3f} s")
    for size, each in found["drawn_per_second"].items():
        print(f"{each:,.0f} windows drawn per second, {int(size):,} at once")
    print(f"{found['mixture_drawn_per_second']:,.0f} windows of a mixture drawn per second, {SIZES[-1]:,} at once")
    print(f"{found['order_peak_bytes'] / 1e6:.1f} MB at most for {SIZES[-1]:,} at once")
    print(f"the first {found['drawn']:,} windows are distinct: {found['distinct']}")
    print(f"{found['read_per_second']:,.0f} windows read per second, of holes")
    if "each_once" in found:
        print(f"each of {found['windows']:,} windows comes once: {found['each_once']}")


if __name__ == "__main__":
    main()
