"""Measures how long saving a checkpoint pauses the training loop, with synchronous and with asynchronous saves.

python benchmarks/checkpoint_speed.py                        (from the repository's root; 150M_1024: 12 bytes a parameter)
python benchmarks/checkpoint_speed.py --preset tiny --saves 5

It runs one process on the CPU. The state is what training would save, filled with random numbers: fp32 weights and both
moments. Each kind of save is made several times. Memory for the copy is allocated first, as training does during its
first steps. No training steps run during the measurement. In training, writer and steps may share the cores, so steps
may take longer while a checkpoint is written. The measured pause does not include that.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from scalegpt.backends import Backend, World, build_model, make_backend
from scalegpt.checkpoint.manifest import Header, Progress
from scalegpt.checkpoint.saver import Keeping, Saver
from scalegpt.checkpoint.writer import bytes_of
from scalegpt.config.presets import resolve
from scalegpt.optim.factory import optimizer_factory

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


Times = dict[str, float]
"""Seconds from the start of a save: ``pause`` until training can continue, ``whole`` until the checkpoint is complete."""


def main() -> None:
    """Measure both kinds of saves, and print a table or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="150M_1024")
    parser.add_argument("--saves", type=int, default=3, help="saves of each kind [3]")
    parser.add_argument("--folder", type=Path, help="where to write [a temporary folder]")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    backend = filled_backend(arguments.preset)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        waited = saves(backend, Path(folder) / "waited", arguments.saves, asynchronous=False)
        meanwhile = saves(backend, Path(folder) / "meanwhile", arguments.saves, asynchronous=True)
    report(arguments.preset, bytes_of(backend.pieces()), waited, meanwhile, as_json=arguments.json)


def filled_backend(preset: str) -> Backend:
    """A plain backend for a preset, with random weights and moments."""
    run = resolve(preset=preset, flags={"backend": "plain", "precision": "fp32", "micro_batch": 1})
    if not run.model.vocab_size:
        run = run.with_vocab(257)
    backend = make_backend(run, ALONE, 1, build_model(run, compiled=False), optimizer_factory(run.train))
    generator = torch.Generator().manual_seed(1)
    for piece in backend.held():
        piece.values.normal_(generator=generator)
    return backend


def saves(backend: Backend, folder: Path, count: int, *, asynchronous: bool) -> list[Times]:
    """The times of ``count`` saves, made one after another."""
    saver = Saver(backend, folder, Keeping(1, False), asynchronous=asynchronous)
    if asynchronous:
        saver.prepare()
        assert saver.copy.is_ready
    times = []
    for step in range(1, count + 1):
        start = time.perf_counter()
        saver.save(Header(Progress(step=step, tokens=0), {}, {}))
        pause = time.perf_counter() - start
        saver.confirm(step)  # the checkpoint before it is then deleted, as in a run
        if saver.lacks_memory:
            sys.exit("host memory has no room for the copy, so there is nothing to measure")
        saver.finish()
        times.append({"pause": pause, "whole": time.perf_counter() - start})
    saver.close()
    return times


def report(preset: str, size: int, waited: list[Times], meanwhile: list[Times], *, as_json: bool) -> None:
    """Print the measured times, and the pauses of asynchronous saves as shares of the median synchronous save."""
    before, after = (statistics.median(each["pause"] for each in times) for times in (waited, meanwhile))
    longest, threads = max(each["pause"] for each in meanwhile), torch.get_num_threads()
    if as_json:
        result = {"preset": preset, "bytes": size, "threads": threads, "synchronous": waited, "asynchronous": meanwhile}
        print(json.dumps({**result, "pause_share": after / before, "longest_pause_share": longest / before}, indent=2))
        return
    print(f"{preset}: {size / 1e9:.3f} GB of state, one process on the CPU, {threads} threads")
    print(f"synchronous save    {before:7.3f} s (median of {len(waited)})")
    print(f"asynchronous pause  {after:7.3f} s (median of {len(meanwhile)}), {after / before:.1%} of it")
    print(f"the longest pause   {longest:7.3f} s, {longest / before:.1%} of it")
    print(f"asynchronous, whole {statistics.median(each['whole'] for each in meanwhile):7.3f} s")


if __name__ == "__main__":
    main()
