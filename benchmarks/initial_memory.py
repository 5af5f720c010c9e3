"""Measures the host memory that each rank needs to build a model and load its initial weights, sharded over ranks on CPUs.

python benchmarks/initial_memory.py --layers 6               (Llama-2 7B's width on 2 ranks: about 8 GB in all)
python benchmarks/initial_memory.py --layers 4 --backend deepspeed
python benchmarks/initial_memory.py --layers 4 --source hf   (reads a bf16 Hugging Face folder, which it makes first)

Each rank reads the kernel's peak of its resident memory (VmHWM), less what the process held before the model was built. It
should exceed the rank's own share of the weights by at most one block.
"""

import argparse
import json
import os
import re
import resource
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.arguments import at_least
from scalegpt.cli.output import aligned
from scalegpt.config import RunConfig
from scalegpt.config.presets import resolve
from scalegpt.units import format_bytes

WIDTH: dict[str, Any] = {
    "n_embd": 4096, "n_head": 32, "n_inner": 11008, "activation": "swiglu", "position": "rope", "norm": "rmsnorm",
    "bias": "false", "tie_head": False, "vocab_size": 32000, "block_size": 64, "dropout": 0.0,
}  # fmt: skip
"""The shape of Llama 2 7B, apart from its 32 layers."""

NARROW = {"n_embd": 512, "n_head": 8, "n_inner": 1376, "vocab_size": 512}
"""A shape of small blocks and few tokens, to try the measurement."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure in processes of their own, and print a row for each rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=at_least(1), default=2, help="blocks, of Llama 2 7B's 32 [2]")
    parser.add_argument("--ranks", type=at_least(1), default=2, help="processes on this machine [2]")
    parser.add_argument("--backend", choices=("fsdp", "deepspeed"), default="fsdp")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--source", choices=("random", "hf"), default="random", help="random weights, or --init_from")
    parser.add_argument("--narrow", action="store_true", help="blocks of 1/64 of the size")
    parser.add_argument(
        "--limit_gb", type=at_least(1), default=9, help="largest data segment of each process, in GB [9]"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.rank is not None:
        print(json.dumps(measure(arguments, arguments.rank or None)), flush=True)
        return 0
    words = sys.argv[1:] if argv is None else list(argv)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.source == "hf":
            write_folder(run_of(arguments), Path(folder))
        figures = ranks(words, arguments.ranks, folder if arguments.source == "hf" else "")
    report(figures, as_json=arguments.json)
    return 0


def run_of(arguments: argparse.Namespace) -> RunConfig:
    """The run whose model is built."""
    shape = {**WIDTH, **(NARROW if arguments.narrow else {}), "n_layer": arguments.layers}
    flags = {**shape, "backend": arguments.backend, "zero_stage": 3, "precision": arguments.precision, "micro_batch": 1}
    return resolve(preset="tiny", flags=flags)


def ranks(words: Sequence[str], count: int, folder: str) -> list[dict[str, Any]]:
    """Run this script on each rank; returns what each measured."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(count):
        own = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
        environment = {**os.environ, **{key: str(value) for key, value in own.items()}, "MASTER_ADDR": "127.0.0.1"}
        environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        command = [sys.executable, str(Path(__file__)), *words, "--rank", folder]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("a rank has failed")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def measure(arguments: argparse.Namespace, folder: str | None) -> dict[str, Any]:
    """Build the model, and load its weights. Returns sizes in bytes."""
    resource.setrlimit(resource.RLIMIT_DATA, (arguments.limit_gb * 10**9,) * 2)
    import torch

    from scalegpt.backends import World, build_model, make_backend
    from scalegpt.backends.base import WEIGHT
    from scalegpt.checkpoint.writer import bytes_of
    from scalegpt.optim.factory import optimizer_factory
    from scalegpt.planner.memory.deepspeed.settings import deepspeed_settings
    from scalegpt.weights.origin import open_folder  # noqa: F401 - imports are not what is measured

    if arguments.backend == "deepspeed":
        import deepspeed  # noqa: F401
    run = run_of(arguments)
    world = World.join("cpu")
    world.ensure_group()
    world.sum(torch.ones(1))
    settings = None
    if arguments.backend == "deepspeed":
        settings = deepspeed_settings(run, grad_accum=1, ranks=world.size, on_cuda=False)
    model = build_model(run, compiled=False)
    block = sum(parameter.numel() for parameter in model.blocks[0].parameters()) * 4
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again at what is resident
    before = resident()["VmHWM"]
    backend = make_backend(run, world, 1, model, optimizer_factory(run.train), settings)
    weights = backend.model.initial_weights(0) if folder is None else stored(Path(folder), run)
    backend.load_weights(weights)
    after = resident()
    shard = bytes_of(backend.held((WEIGHT,)))
    world.barrier()
    found = {
        "rank": world.rank, "shard": shard, "block": block, "peak": after["VmHWM"] - before,
        "held": after["VmRSS"] - before, "before": before,
    }  # fmt: skip
    world.leave()
    return found


def stored(folder: Path, run: RunConfig) -> Iterator[tuple[str, Any]]:
    """The weights of the Hugging Face folder, as ``--init_from`` reads them."""
    from scalegpt.interop.families import read_config
    from scalegpt.weights.origin import open_folder

    return open_folder(read_config(folder)).weights(run.model)


def write_folder(run: RunConfig, folder: Path) -> None:
    """Write a bf16 Hugging Face folder with random weights, a file for each block."""
    import torch
    from safetensors.torch import save_file

    from scalegpt.interop.families import as_config
    from scalegpt.weights.layouts import targets
    from scalegpt.weights.table import HUGGING_FACE

    config = as_config(run.model, "llama")
    (folder / "config.json").write_text(json.dumps(config))
    index: dict[str, str] = {}
    by_file: dict[str, list[Any]] = {}
    for target in targets(run.model, HUGGING_FACE["llama"]):
        number = re.search(r"\.([0-9]+)\.", target.name)
        by_file.setdefault(f"model-{number[1] if number else 'rest'}.safetensors", []).append(target)
    for file, wanted in by_file.items():
        tensors = {each.name: torch.randn(each.shape).bfloat16() for each in wanted}
        save_file(tensors, folder / file)
        index |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def resident() -> dict[str, int]:
    """The process's resident memory, now and at its peak, in bytes."""
    status = Path("/proc/self/status").read_text()
    return {key: int(value) << 10 for key, value in re.findall(r"^(VmHWM|VmRSS):\s+([0-9]+) kB", status, re.MULTILINE)}


def report(figures: Sequence[dict[str, Any]], *, as_json: bool) -> None:
    """Print the figures of each rank."""
    rows: list[tuple[str, ...]] = [
        ("rank", "before", "its shard", "one block", "held after", "peak", "peak over shard")
    ]
    for each in figures:
        over = each["peak"] - each["shard"]
        sizes = (each["before"], each["shard"], each["block"], each["held"], each["peak"], over)
        each["blocks_over"] = over / each["block"]
        rows.append((str(each["rank"]), *map(format_bytes, sizes)))
    print(json.dumps(figures) if as_json else aligned(rows, right=set(range(7))))


if __name__ == "__main__":
    sys.exit(main())
