"""Times our training step and the step of a plain nanoGPT-style loop of the same shape, in turn.

python benchmarks/compare_nanogpt.py                           (from the repository's root: shapes tiny, small and char)
python benchmarks/compare_nanogpt.py --shapes tiny --rounds 9 --json compare.json
python benchmarks/compare_nanogpt.py --peer ../nanoGPT         the plain loop trains the model of a nanoGPT checkout
python benchmarks/compare_nanogpt.py --keep_memory             the plain loop has our setting of the memory allocator too

There are five contenders. The plain loop runs in fp32, in bf16 under autocast, and in bf16 with the whole model compiled. Our
trainer runs in the precision that ``auto`` picks on this machine, eager and with compiled blocks. Each contender has a
process of its own, so that settings of one process do not affect the others. They take steps in turn while the others wait,
so that a machine that slows down slows all of them. Their median step times are compared. A contender whose second step
takes more than sixteen times as long as the fastest contender's takes no further steps, and its second step is its result.
Nine rounds of the three shapes take two minutes on two cores.
"""

import argparse
import multiprocessing
import statistics
import sys
import tempfile
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.arguments import at_least, names_of, new_file, write_figures
from benchmarks.steps.baseline import BaselineSteps, Shape
from benchmarks.steps.ours import OurSteps, random_tokens
from scalegpt.backends import World
from scalegpt.backends.capabilities import device_name
from scalegpt.backends.host_memory import keep_freed_memory
from scalegpt.backends.precision import resolve_precision
from scalegpt.backends.world import choose_device
from scalegpt.config.presets import resolve
from scalegpt.errors import InputError

PATIENCE = 16.0
SHAPES = {
    "tiny": Shape(4, 6, 192, 256, 50304, batch=4),
    "small": Shape(12, 6, 384, 256, 50304, batch=4),
    "char": Shape(4, 4, 128, 64, 65, batch=12),
}
EAGER, AUTOCAST, COMPILED = "plain loop, fp32", "plain loop, bf16", "plain loop, bf16, compiled"
BASELINES = {EAGER: (False, False), AUTOCAST: (True, False), COMPILED: (True, True)}
OURS = {"ours": "off", "ours, compiled": "on"}


PROCESSES = multiprocessing.get_context("spawn")
"""CUDA cannot be used in a forked process."""


@dataclass(frozen=True)
class Entry:
    """A contender before it has a process.

    Attributes:
        name: a key of :data:`BASELINES` or :data:`OURS`.
        shape: model and batch.
        folder: the folder of the data and the runs.
        arguments: the arguments of the command line.
        precision: the precision of our trainer.
    """

    name: str
    shape: Shape
    folder: Path
    arguments: argparse.Namespace
    precision: str


class Contender:
    """A process that takes training steps on request, and the seconds of its counted steps."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.seconds: list[float] = []
        self._connection, theirs = PROCESSES.Pipe()
        self._process = PROCESSES.Process(target=serve, args=(entry, theirs))
        self._process.start()
        theirs.close()

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join()

    def step(self) -> float:
        """Let the process take a step; returns its seconds. The first call also builds the model.

        Raises:
            RuntimeError: the process has ended; it has printed why.
        """
        try:
            self._connection.send(None)
            seconds: float = self._connection.recv()
        except (EOFError, OSError):
            raise RuntimeError(f"{self.entry.name} has failed") from None
        return seconds


def serve(entry: Entry, connection: Connection) -> None:
    """Take a step and send its seconds for each message that arrives, until the other side closes the connection."""
    with ExitStack() as stack, suppress(EOFError):
        connection.recv()
        steps = build(entry, stack)
        while True:
            connection.send(steps.step())
            connection.recv()


def build(entry: Entry, stack: ExitStack) -> BaselineSteps | OurSteps:
    """The object that takes the contender's steps; closing ``stack`` closes what the object holds open."""
    given, data = entry.arguments, entry.folder / "tokens"
    if entry.name in OURS:
        flags = flags_of(entry.shape, data, OURS[entry.name], entry.precision)
        ours = OurSteps(flags, None, entry.folder / entry.name, World.join(given.device))
        stack.callback(ours.close)
        return ours
    if given.keep_memory:
        keep_freed_memory()
    bf16, compiled = BASELINES[entry.name]
    device = choose_device(given.device, 0, 1)
    return BaselineSteps(entry.shape, data, device, bf16=bf16, compiled=compiled, checkout=given.peer)


def main() -> int:
    """Compare the contenders on every shape that was asked for, and print a table for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", type=names_of(SHAPES), default=",".join(SHAPES), help=f"of {', '.join(SHAPES)} [all]"
    )
    parser.add_argument("--rounds", type=at_least(1), default=7, help="counted steps of each [7]")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--peer", type=Path, help="a checkout of nanoGPT, whose model is timed")
    everyone = {**BASELINES, **OURS}
    parser.add_argument("--skip", type=names_of(everyone, ";"), default="", help="contenders, separated by semicolons")
    parser.add_argument(
        "--keep_memory", action="store_true", help="the plain loops keep the memory that they free, too"
    )
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write the figures there")
    arguments = parser.parse_args()
    if arguments.peer and not (arguments.peer / "model.py").is_file():
        parser.error(f"--peer {arguments.peer}: no model.py there; give the folder of a nanoGPT checkout")
    try:
        device = choose_device(arguments.device, 0, 1)
    except InputError as error:
        parser.error(str(error))
    results = {}
    for name in arguments.shapes:
        shape = SHAPES[name]
        precision = precision_of(shape, device)
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            random_tokens(Path(folder) / "tokens", shape.vocab_size)
            contenders = []
            for each in (each for each in everyone if each not in arguments.skip):
                contenders.append(Contender(Entry(each, shape, Path(folder), arguments, precision)))
                stack.callback(contenders[-1].close)
            race(contenders, arguments.rounds)
        results[name] = {each.entry.name: figures(each) for each in contenders}
        print(table(name, results[name], f"{device_name(device)}, ours in {precision}"), flush=True)
    write_figures(arguments.json, results)
    return 0


def precision_of(shape: Shape, device: torch.device) -> str:
    """The precision that ``auto`` picks for a shape. It is resolved once for both of ours, since on a CPU it is timed."""
    run = resolve(flags={**flags_of(shape, Path(), "off", "auto"), "input_file": None}, name="compare")
    return resolve_precision("auto", device, run.model, shape.tokens)


def flags_of(shape: Shape, data: Path, compile_: str, precision: str) -> dict[str, Any]:
    """The settings of our trainer for a shape, with the micro batch that all contenders use."""
    return {
        "n_layer": shape.n_layer, "n_head": shape.n_head, "n_embd": shape.n_embd, "block_size": shape.block_size,
        "vocab_size": shape.vocab_size, "bias": shape.bias, "tie_head": True, "dropout": 0.0,
        "micro_batch": shape.batch, "tokens_per_step": shape.tokens, "recompute": "none", "compile": compile_,
        "backend": "plain", "input_file": str(data), "precision": precision,
    }  # fmt: skip


def race(contenders: list[Contender], rounds: int) -> None:
    """Time all contenders: a first step, which compiles; a second, after which slow ones stop; then the counted rounds."""
    for each in contenders:
        each.step()
    second = {each: each.step() for each in contenders}
    left = [each for each in contenders if second[each] <= PATIENCE * min(second.values())]
    for _ in range(rounds):
        for each in left:
            each.seconds.append(each.step())
    for each in contenders:
        each.seconds = each.seconds or [second[each]]


def figures(each: Contender) -> dict[str, Any]:
    """A contender's results: seconds of its steps (median, least, most), their number, and tokens per second."""
    median = statistics.median(each.seconds)
    return {
        "step_seconds": median,
        "least": min(each.seconds),
        "most": max(each.seconds),
        "steps": len(each.seconds),
        "tokens_per_second": each.entry.shape.tokens / median,
    }


def table(name: str, results: dict[str, dict[str, Any]], device: str) -> str:
    """The results for one shape as text, and how many times as fast as the plain loops our faster contender is."""
    shape = SHAPES[name]
    lines = [
        f"{name}: L{shape.n_layer} H{shape.n_embd} V{shape.vocab_size} T{shape.block_size} B{shape.batch}, "
        f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    ]
    for each, found in results.items():
        lines.append(
            f"  {each:28s} {1e3 * found['step_seconds']:9.1f} ms ({1e3 * found['least']:.1f} to {1e3 * found['most']:.1f}, "
            f"{found['steps']} steps) {found['tokens_per_second']:10,.0f} tokens/s"
        )
    best = max((results[each]["tokens_per_second"] for each in OURS if each in results), default=None)
    loops = {each: results[each]["tokens_per_second"] for each in BASELINES if each in results}
    if best and loops:
        lines.append(f"  ours over the best plain loop: {best / max(loops.values()):.2f}")
        if EAGER in loops:
            lines.append(f"  ours over the plain loop in fp32: {best / loops[EAGER]:.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
