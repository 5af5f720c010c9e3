"""Trains the same tiny model on the same batches under each layout of a list, and reports every step's loss."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from scalegpt.backends import World, build_model, make_backend
from scalegpt.config.presets import resolve
from scalegpt.config.run import RunConfig
from scalegpt.planner.deepspeed_settings import deepspeed_settings
from scalegpt.training.optimizers import optimizer_factory

SEQUENCES = 8  # of each step, over all ranks and micro batches


def losses(run: RunConfig, world: World, steps: int, grad_accum: int) -> dict[str, Any]:
    micro = SEQUENCES // (world.size * grad_accum)
    run = RunConfig(
        name=run.name, model=run.model, parallel=run.parallel, data=run.data, train=run.train.changed(micro_batch=micro)
    )
    settings = None
    if run.parallel.backend == "deepspeed":
        settings = deepspeed_settings(run, grad_accum=grad_accum, ranks=world.size, on_cuda=False)
    model = build_model(run, compiled=False)
    backend = make_backend(run, world, grad_accum, model, optimizer_factory(run.train), settings)
    backend.load_weights(backend.model.initial_weights(run.train.seed))
    generator = torch.Generator().manual_seed(0)
    values, norms = [], []
    for _ in range(steps):
        tokens = torch.randint(run.model.vocab_size, (SEQUENCES, run.model.block_size + 1), generator=generator)
        tokens[:, 1::2] = tokens[:, :-1:2]  # something to learn: every second token repeats
        total = torch.zeros(())
        for m in range(grad_accum):
            first = (m * world.size + world.rank) * micro
            mine = tokens[first : first + micro]
            total += backend.micro_step(mine[:, :-1], mine[:, 1:], last=m == grad_accum - 1)
        result = backend.step(run.train.learning_rate)
        assert not result.skipped
        norms.append(result.grad_norm)
        values.append((world.sum(total) / (grad_accum * world.size)).item())
    held_out = backend.evaluate(tokens[:, :-1], tokens[:, 1:]).item()
    weights = {state.name: state.weight for state in backend.states()}
    digest = sum(float(weight.double().abs().sum()) for weight in weights.values())
    return {"losses": values, "norms": norms, "held_out": held_out, "digest": digest}


def main(task_path: str, result_path: str) -> None:
    task = json.loads(Path(task_path).read_text())
    world = World.join("cpu")
    results = {}
    for label, flags in task["layouts"].items():
        run = resolve(flags={**task["shared"], **flags})
        results[label] = losses(run, world, task["steps"], task["grad_accum"])
    if world.is_first:
        Path(result_path).write_text(json.dumps(results))
    world.barrier()
    world.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
