"""Gives each of several layouts the same state, and reports a digest of what each makes of it.

For every layout: the digest of the state that was loaded, the loss with it, and both again after one step and a return to the
first state, since a load must also undo what training and evaluation leave behind.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from backends.canonical import digest, drawn, gathered, reader
from backends.parity_worker import make
from scalegpt.backends import World
from scalegpt.config.presets import resolve


def probe(flags: dict[str, Any], world: World) -> dict[str, Any]:
    run = resolve(flags={**flags, "micro_batch": 2})
    backend = make(run, world, 1)
    backend.load_weights(backend.model.initial_weights(run.train.seed))
    state = drawn(backend, seed=1)
    tokens = torch.randint(
        run.model.vocab_size, (2, run.model.block_size + 1), generator=torch.Generator().manual_seed(2)
    )
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    seen = {"expected": digest(state), "initial": digest(gathered(backend)), "found": [], "losses": []}
    for turn in range(2):
        backend.load_pieces(reader(state), steps=7)
        seen["found"].append(digest(gathered(backend)))
        seen["losses"].append(backend.evaluate(inputs, targets).item())
        seen["found"].append(digest(gathered(backend)))  # with weights gathered, where a layout gathers them
        if turn == 0:
            backend.micro_step(inputs, targets, last=True)
            backend.step(run.train.learning_rate)
            seen["stepped"] = digest(gathered(backend))
    seen["total"] = sum(values.numel() for values in state.values())
    seen["pieces"] = sum(piece.values.numel() for piece in backend.pieces())
    return seen


def main(task_path: str, result_path: str) -> None:
    task = json.loads(Path(task_path).read_text())
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    if size > 1:
        torch.distributed.init_process_group("gloo")
    # Made by hand: more ranks than cores are refused where a run is started, but here nothing is timed.
    world = World(rank, size, rank, size, torch.device("cpu"))
    results = {label: probe({**task["shared"], **flags}, world) for label, flags in task["layouts"].items()}
    if world.is_first:
        Path(result_path).write_text(json.dumps(results))
    world.barrier()
    world.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # without finalization, as `run_and_exit` explains
