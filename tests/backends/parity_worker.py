"""Trains the same tiny model on the same batches under each of several layouts, and reports every step's loss."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from backends.canonical import gathered, reader
from ranks import join_cpu
from scalegpt.backends import Backend, World, build_model, make_backend
from scalegpt.config.presets import resolve
from scalegpt.config.run import RunConfig
from scalegpt.model.chunk import IGNORED
from scalegpt.optim.factory import optimizer_factory
from scalegpt.planner.memory.deepspeed.settings import deepspeed_settings

END = 3
SEQUENCES = 8  # of each step, over all ranks and micro batches


def make(run: RunConfig, world: World, grad_accum: int) -> Backend:
    settings = None
    if run.parallel.backend == "deepspeed":
        if run.train.precision == "fp16":
            from deepspeed.accelerator import get_accelerator

            get_accelerator().is_fp16_supported = lambda: True  # torch computes it on any CPU, however slowly
        settings = deepspeed_settings(run, grad_accum=grad_accum, ranks=world.size, on_cuda=False)
    model = build_model(run, compiled=run.train.compile == "on")
    model.set_packing(END if run.train.packs_documents else None)
    return make_backend(run, world, grad_accum, model, optimizer_factory(run.train), settings)


def cut(run: RunConfig, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets; where documents are packed, the first token of a document is no target."""
    inputs, targets = windows[:, :-1], windows[:, 1:]
    return inputs, targets.masked_fill(inputs == END, IGNORED) if run.train.packs_documents else targets


def train(legs: list[dict[str, Any]], shared: dict[str, Any], world: World, steps: int, grad_accum: int) -> Any:
    """Train ``steps`` steps, an equal part under each of the layouts; state passes from one to the next."""
    micro = SEQUENCES // (world.size * grad_accum)
    generator = torch.Generator().manual_seed(0)
    values, norms, states = [], [], None
    for number, flags in enumerate(legs):
        run = resolve(flags={**shared, **flags, "micro_batch": micro})
        backend = make(run, world, grad_accum)
        if states is None:
            backend.load_weights(backend.model.initial_weights(run.train.seed))
        else:
            backend.load_pieces(reader(states), steps * number // len(legs))
        for _ in range(steps // len(legs)):
            tokens = torch.randint(run.model.vocab_size, (SEQUENCES, run.model.block_size + 1), generator=generator)
            tokens[:, 1::2] = tokens[:, :-1:2]  # something to learn: every second token repeats
            total = torch.zeros(())
            for m in range(grad_accum):
                first = (m * world.size + world.rank) * micro
                mine = tokens[first : first + micro]
                total += backend.micro_step(*cut(run, mine), last=m == grad_accum - 1)
            result = backend.step(run.train.learning_rate)
            assert not result.skipped
            norms.append(result.grad_norm)
            values.append((world.sum(total) / (grad_accum * world.size)).item())
        held_out = backend.evaluate(*cut(run, tokens)).item()
        states = gathered(backend)
    assert states is not None
    return {
        "losses": values,
        "norms": norms,
        "held_out": held_out,
        "sizes": [float(part.double().abs().sum()) for part in states.values()],
    }


def main(task_path: str, result_path: str) -> None:
    task = json.loads(Path(task_path).read_text())
    world = join_cpu()
    results = {}
    for label, legs in task["layouts"].items():
        results[label] = train(legs, task["shared"], world, task["steps"], task["grad_accum"])
    if world.is_first:
        Path(result_path).write_text(json.dumps(results))
    world.barrier()
    world.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # without finalization, as `run_and_exit` explains
