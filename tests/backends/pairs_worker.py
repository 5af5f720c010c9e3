"""Trains the first half of a run under several layouts, each leaving a checkpoint; or the second half, each from one."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from backends.canonical import digest, gathered
from backends.parity_worker import make
from scalegpt.backends import Backend, World
from scalegpt.checkpoint.manifest import Header, Progress
from scalegpt.checkpoint.reader import Checkpoint
from scalegpt.checkpoint.saver import Keeping, Saver
from scalegpt.config.presets import resolve

SEQUENCES = 6  # of each step: divides by one, two and three ranks


def losses(backend: Backend, world: World, steps: range) -> list[float]:
    values = []
    micro = SEQUENCES // world.size
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        model = backend.run.model
        tokens = torch.randint(model.vocab_size, (SEQUENCES, model.block_size + 1), generator=generator)
        tokens[:, 1::2] = tokens[:, :-1:2]  # something to learn: every second token repeats
        mine = tokens[world.rank * micro : (world.rank + 1) * micro]
        loss = backend.micro_step(mine[:, :-1], mine[:, 1:], last=True)
        backend.step(backend.run.train.learning_rate)
        values.append((world.sum(loss.clone()) / world.size).item())
    return values


def leg(world: World, shape: dict[str, Any], entry: dict[str, Any], steps: range) -> dict[str, Any]:
    """Part of a run under one layout; ``entry`` has its flags, and the folders to load from and to save to."""
    run = resolve(flags={**shape, **entry["flags"], "micro_batch": SEQUENCES // world.size})
    backend = make(run, world, 1)
    result: dict[str, Any] = {}
    if entry.get("load"):
        stored = Checkpoint.open(Path(entry["load"]))
        stored.verify()
        backend.load_pieces(stored.read, stored.manifest.header.progress.step)
        result["loaded"] = digest(gathered(backend))
    else:
        backend.load_weights(backend.model.initial_weights(run.train.seed))
    result["losses"] = losses(backend, world, steps)
    if entry.get("save"):
        result["saved"] = digest(gathered(backend))
        saver = Saver(backend, Path(entry["save"]), Keeping(1, False), asynchronous=True)
        saver.save(Header(Progress(step=steps.stop, tokens=0), {}, {}))
        saver.finish()
    return result


def main(task_path: str, result_path: str) -> None:
    task = json.loads(Path(task_path).read_text())
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    if size > 1:
        torch.distributed.init_process_group("gloo")
    # Made by hand: more ranks than cores are refused where a run is started, but here nothing is timed.
    world = World(rank, size, rank, size, torch.device("cpu"))
    results = {name: leg(world, task["shape"], entry, range(*task["steps"])) for name, entry in task["legs"].items()}
    if world.is_first:
        Path(result_path).write_text(json.dumps(results))
    world.barrier()
    world.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # without finalization, as `run_and_exit` explains
