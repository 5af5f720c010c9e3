"""Times our training step beside that of a plain nanoGPT-style loop of the same shape, in turn in one process.

python benchmarks/compare_nanogpt.py                           (from the repository's root: shapes tiny, small and char)
python benchmarks/compare_nanogpt.py --shapes tiny --rounds 9 --json compare.json
python benchmarks/compare_nanogpt.py --peer ../nanoGPT         the model of a nanoGPT checkout instead

The plain loop runs in fp32, in bf16 under autocast, and in bf16 compiled whole; ours in the precision that ``auto`` picks on
this machine, as it is and with compiled blocks. In every round each takes one step, so that a machine that slows down slows
all of them. Steps are compared by their medians; a contender whose second step takes longer than eight times the fastest's
takes no more, and its second step is what is told of it.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.steps.baseline import BaselineSteps, Shape
from benchmarks.steps.ours import OurSteps, random_tokens
from scalegpt.backends import World
from scalegpt.backends.capabilities import device_name

PATIENCE = 8.0
SHAPES = {
    "tiny": Shape(4, 6, 192, 256, 50304, batch=4),
    "small": Shape(12, 6, 384, 256, 50304, batch=4),
    "char": Shape(4, 4, 128, 64, 65, batch=12),
}
EAGER, AUTOCAST, COMPILED = "plain loop, fp32", "plain loop, bf16", "plain loop, bf16, compiled"
BASELINES = {EAGER: (False, False), AUTOCAST: (True, False), COMPILED: (True, True)}
OURS = {"ours": "off", "ours, compiled": "on"}


@dataclass
class Contender:
    """Something that takes steps, and the seconds that they took."""

    name: str
    step: Callable[[], float]
    seconds: list[float] = field(default_factory=list)
    is_out: bool = False


def main() -> int:
    """Compare on every shape; 1 if a contender fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES), help=f"of {', '.join(SHAPES)} [all]")
    parser.add_argument("--rounds", type=int, default=7, help="counted steps of each [7]")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--peer", type=Path, help="a checkout of nanoGPT, whose model is timed")
    parser.add_argument("--skip", default="", help="contenders to leave out, separated by semicolons")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.shapes.split(",") if name not in SHAPES]
    if unknown:
        parser.error(f"--shapes: there is no {unknown[0]!r}; choose from {', '.join(SHAPES)}")
    world = World.join(arguments.device)
    skip = {name.strip() for name in arguments.skip.split(";")}
    results = {}
    for name in arguments.shapes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            results[name] = compare(SHAPES[name], Path(folder), world, arguments.rounds, arguments.peer, skip)
        print(table(name, results[name], world), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


def compare(
    shape: Shape, folder: Path, world: World, rounds: int, peer: Path | None, skip: set[str]
) -> dict[str, dict[str, Any]]:
    """Median, spread and tokens a second of each contender."""
    data = random_tokens(folder / "tokens", shape.vocab_size)
    contenders, ours = [], []
    for name, (bf16, compiled) in BASELINES.items():
        if name not in skip:
            made = BaselineSteps(shape, data, world.device, bf16=bf16, compiled=compiled, checkout=peer)
            contenders.append(Contender(name, made.step))
    for name, compile_ in OURS.items():
        if name not in skip:
            ours.append(OurSteps(flags_of(shape, data, compile_), None, folder / compile_, world))
            contenders.append(Contender(name, ours[-1].step))
    try:
        race(contenders, rounds)
    finally:
        for each in ours:
            each.close()
    return {each.name: figures(each, shape) for each in contenders}


def flags_of(shape: Shape, data: Path, compile_: str) -> dict[str, Any]:
    """Our settings for a shape: the trainer's own choice, with the micro batch that all use."""
    return {
        "n_layer": shape.n_layer, "n_head": shape.n_head, "n_embd": shape.n_embd, "block_size": shape.block_size,
        "vocab_size": shape.vocab_size, "bias": shape.bias, "tie_head": True, "dropout": 0.0,
        "micro_batch": shape.batch, "tokens_per_step": shape.tokens, "recompute": "none", "compile": compile_,
        "backend": "plain", "input_file": str(data), "precision": "auto",
    }  # fmt: skip


def race(contenders: list[Contender], rounds: int) -> None:
    """A first step, which compiles, a second, which tells who is hopeless, and the rounds that count."""
    for each in contenders:
        each.step()
    second = {each.name: each.step() for each in contenders}
    fastest = min(second.values())
    for each in contenders:
        each.is_out = second[each.name] > PATIENCE * fastest
        each.seconds = [second[each.name]] if each.is_out else []
    for _ in range(rounds):
        for each in contenders:
            if not each.is_out:
                each.seconds.append(each.step())


def figures(each: Contender, shape: Shape) -> dict[str, Any]:
    """What is told of a contender."""
    median = statistics.median(each.seconds)
    return {
        "step_seconds": median,
        "least": min(each.seconds),
        "most": max(each.seconds),
        "steps": len(each.seconds),
        "tokens_per_second": shape.tokens / median,
    }


def table(name: str, results: dict[str, dict[str, Any]], world: World) -> str:
    """One shape's results for reading: tokens a second, and how many times as fast as each plain loop ours is."""
    shape = SHAPES[name]
    lines = [
        f"{name}: L{shape.n_layer} H{shape.n_embd} V{shape.vocab_size} T{shape.block_size} B{shape.batch}, "
        f"{device_name(world.device)}, {torch.get_num_threads()} threads, torch {torch.__version__}"
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
