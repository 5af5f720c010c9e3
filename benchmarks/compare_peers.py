"""Times our training step and the steps of other programs of the same shape, in turn.

python benchmarks/compare_peers.py --shapes tiny,small,char            (from the repository's root)
python benchmarks/compare_peers.py --shapes smol --json compare.json   beside transformers and litgpt, where installed
python benchmarks/compare_peers.py --shapes tiny --peer ../nanoGPT     the plain loop trains the model of a nanoGPT checkout
python benchmarks/compare_peers.py --keep_memory                       the others have our setting of the memory allocator too

The shapes tiny, small and char have GPT-2's block. They are compared with a plain nanoGPT-style loop in fp32, in bf16
under autocast, and in bf16 under autocast with the whole model compiled. The shape smol is SmolLM2 135M cut to 6
layers. It is compared with the models of transformers and of litgpt in the same eager loop: in fp32, in bf16 under
autocast, and with weights and optimizer in bf16. Our trainer runs eagerly and with compiled blocks, in the precision
that ``auto`` picks on this machine unless --precision is given. Each contender has its own process, so that settings of
one do not affect the others. They take steps in turn while the others wait, so that a slower phase of the machine
affects all of them. Their median step times are compared. A contender whose second step takes more than sixteen times
as long as the fastest contender's takes no further steps; the second step is then its result. Nine rounds of tiny,
small and char take two minutes on two cores. smol takes 2 GB of memory for each contender.
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
from benchmarks.steps.baseline import AUTOCAST, BF16, FP32, BaselineSteps, Shape
from benchmarks.steps.ours import OurSteps, random_tokens
from benchmarks.steps.peers import PEERS, LlamaShape, make_model, why_missing
from scalegpt.backends import World
from scalegpt.backends.capabilities import device_name
from scalegpt.backends.host_memory import keep_freed_memory
from scalegpt.backends.world import choose_device
from scalegpt.config.presets import resolve
from scalegpt.errors import InputError
from scalegpt.speed.precision import resolve_precision
from scalegpt.speed.rates import measure_if_needed

PATIENCE = 16.0
SHAPES = {
    "tiny": Shape(4, 6, 192, 256, 50304, batch=4),
    "small": Shape(12, 6, 384, 256, 50304, batch=4),
    "char": Shape(4, 4, 128, 64, 65, batch=12),
    "smol": LlamaShape(6, 9, 576, 512, 49152, batch=2, n_kv_head=3, n_inner=1536),
}
PLAIN = "the plain loop"


@dataclass(frozen=True)
class Loop:
    """A contender that is not ours: the model that it trains (:data:`PLAIN`, or a key of ``PEERS``), and its precision."""

    model: str
    precision: str
    compiled: bool = False

    @property
    def name(self) -> str:
        """The name in tables."""
        return f"{self.model.removeprefix('the ')}, {self.precision}{', compiled' if self.compiled else ''}"

    def meets(self, shape: Shape) -> bool:
        """Whether it trains models of this shape."""
        return (self.model in PEERS) == isinstance(shape, LlamaShape)


_LOOPS = (
    *(Loop(PLAIN, *how) for how in ((FP32,), (AUTOCAST,), (AUTOCAST, True))),
    *(Loop(peer, precision) for peer in PEERS for precision in (FP32, AUTOCAST, BF16)),
)
LOOPS = {loop.name: loop for loop in _LOOPS}
OURS = {"ours": "off", "ours, compiled": "on"}


PROCESSES = multiprocessing.get_context("spawn")
"""CUDA cannot be used in a forked process."""


@dataclass(frozen=True)
class Entry:
    """The description of a contender, from which its process is made.

    Attributes:
        name: a key of :data:`LOOPS` or :data:`OURS`.
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
        """Let the process take a step, and return its seconds. The first call also builds the model.

        Raises:
            RuntimeError: the process has ended. It has printed the reason.
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
    """The object that takes the contender's steps. Closing ``stack`` closes all that the object has opened."""
    given, data = entry.arguments, entry.folder / "tokens"
    if entry.name in OURS:
        flags = flags_of(entry.shape, data, OURS[entry.name], entry.precision)
        ours = OurSteps(flags, None, entry.folder / entry.name, World.join(given.device))
        stack.callback(ours.close)
        return ours
    if given.keep_memory:
        keep_freed_memory()
    loop, device = LOOPS[entry.name], choose_device(given.device, 0, 1)
    return BaselineSteps(
        entry.shape, data, device, precision=loop.precision, compiled=loop.compiled,
        make=lambda shape: make_model(loop.model, shape, given.peer),
    )  # fmt: skip


def main() -> int:
    """Compare the contenders on every shape that was asked for, and print a table for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", type=names_of(SHAPES), default=",".join(SHAPES), help=f"of {', '.join(SHAPES)} [all]"
    )
    parser.add_argument("--rounds", type=at_least(1), default=7, help="counted steps of each [7]")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--peer", type=Path, help="a checkout of nanoGPT, whose model is timed")
    everyone = {**LOOPS, **OURS}
    parser.add_argument("--skip", type=names_of(everyone, ";"), default="", help="contenders, separated by semicolons")
    parser.add_argument("--keep_memory", action="store_true", help="the others also keep the memory that they free")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="ours [auto]")
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
        precision = precision_of(shape, device, arguments.precision)
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            random_tokens(Path(folder) / "tokens", shape.vocab_size)
            contenders = []
            for each in contenders_of(shape, arguments.skip):
                contenders.append(Contender(Entry(each, shape, Path(folder), arguments, precision)))
                stack.callback(contenders[-1].close)
            race(contenders, arguments.rounds)
        results[name] = {each.entry.name: figures(each) for each in contenders}
        print(table(name, results[name], f"{device_name(device)}, ours in {precision}"), flush=True)
    write_figures(arguments.json, results)
    return 0


def contenders_of(shape: Shape, skip: list[str]) -> list[str]:
    """The names of the contenders for a shape. Prints a line for each missing package."""
    loops = [loop for name, loop in LOOPS.items() if loop.meets(shape) and name not in skip]
    missing = {model: why_missing(model) for model in {loop.model: None for loop in loops} if model in PEERS}
    for why in missing.values():
        if why:
            print(why, file=sys.stderr)
    return [loop.name for loop in loops if not missing.get(loop.model)] + [each for each in OURS if each not in skip]


def precision_of(shape: Shape, device: torch.device, wanted: str) -> str:
    """Our precision for a shape. ``auto`` is resolved once for both of ours, by the same rates."""
    if device.type == "cpu":
        measure_if_needed()
    run = resolve(flags={**flags_of(shape, Path(), "off", wanted), "input_file": None}, name="compare")
    return resolve_precision(run, device)


def flags_of(shape: Shape, data: Path, compile_: str, precision: str) -> dict[str, Any]:
    """The settings of our trainer for a shape, with the micro batch that all contenders use."""
    llama: dict[str, Any] = {}
    if isinstance(shape, LlamaShape):
        llama = {
            "n_kv_head": shape.n_kv_head, "n_inner": shape.n_inner, "norm": "rmsnorm", "norm_eps": shape.norm_eps,
            "position": "rope", "rope_theta": shape.rope_theta, "activation": "swiglu",
        }  # fmt: skip
    return {
        **llama, "n_layer": shape.n_layer, "n_head": shape.n_head, "n_embd": shape.n_embd, "block_size": shape.block_size,
        "vocab_size": shape.vocab_size, "bias": shape.bias, "tie_head": True, "dropout": 0.0,
        "micro_batch": shape.batch, "tokens_per_step": shape.tokens, "recompute": "none", "compile": compile_,
        "backend": "plain", "input_file": str(data), "precision": precision,
    }  # fmt: skip


def race(contenders: list[Contender], rounds: int) -> None:
    """Time all contenders: a first step, which compiles; a second, after which slow ones stop; then counted rounds."""
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
    """A contender's results: seconds of its steps (median, least, most), the number of steps, and tokens per second."""
    median = statistics.median(each.seconds)
    return {
        "step_seconds": median,
        "least": min(each.seconds),
        "most": max(each.seconds),
        "steps": len(each.seconds),
        "tokens_per_second": each.entry.shape.tokens / median,
    }


def table(name: str, results: dict[str, dict[str, Any]], device: str) -> str:
    """The results for one shape as text, with the speed of our faster contender relative to the others."""
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
    loops = [LOOPS[each] for each in results if each in LOOPS]
    for model in dict.fromkeys(loop.model for loop in loops):
        for dtype in (FP32, BF16) if best else ():
            those = [each for each in loops if each.model == model and each.precision.startswith(dtype)]
            if those:
                fastest = max(results[each.name]["tokens_per_second"] for each in those)
                lines.append(f"  ours over {model} in {dtype}: {best / fastest:.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
