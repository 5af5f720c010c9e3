"""Trains with one bad step in the middle, and without that step, under each of several layouts; reports what differs."""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from parity_worker import SEQUENCES, make

from ranks import join_cpu
from scalegpt.backends import Backend, World
from scalegpt.config.presets import resolve

STEPS, BAD, ACCUM = 5, 2, 2


def batch(step: int, run: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(run.model.vocab_size, (SEQUENCES, run.model.block_size + 1), generator=generator)


class Poison:
    """What goes wrong on the last rank in one micro batch: in the loss, or on the way back only."""

    def __init__(self, backend: Backend, kind: str | None, world: World) -> None:
        self.kind, self.armed, self.is_ill = kind, False, world.rank == world.size - 1
        backend.model.register_forward_hook(self._hook)

    def _hook(self, _module: Any, _arguments: Any, output: torch.Tensor) -> torch.Tensor:
        if not (self.armed and self.is_ill):
            return output
        if self.kind == "loss and gradient":
            return output * math.nan
        if self.kind == "gradient" and output.requires_grad:
            output.register_hook(lambda gradient: gradient * math.inf)
        return output


def state(backend: Backend) -> list[torch.Tensor]:
    return [piece.values.clone() for piece in backend.pieces()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def train(flags: dict[str, Any], world: World, kind: str | None) -> dict[str, Any]:
    """Five steps, the third of them bad in the way ``kind`` says; with None that step is not even begun."""
    micro = SEQUENCES // (world.size * ACCUM)
    run = resolve(flags={**flags, "micro_batch": micro})
    backend = make(run, world, ACCUM)
    backend.load_weights(backend.model.initial_weights(run.train.seed))
    poison, losses, skipped, unchanged = Poison(backend, kind, world), [], [], True
    for step in range(STEPS):
        if step == BAD and kind is None:
            continue
        before = state(backend) if step == BAD and kind else []
        scale = backend.scaler
        tokens, total = batch(step, run), torch.zeros(())
        for m in range(ACCUM):
            first = (m * world.size + world.rank) * micro
            mine = tokens[first : first + micro]
            poison.armed = step == BAD and m == 0
            total += backend.micro_step(mine[:, :-1], mine[:, 1:], last=m == ACCUM - 1)
        if step == BAD and kind == "loss alone" and poison.is_ill:
            total *= math.nan
        mean = world.sum(total) / (ACCUM * world.size)
        result = backend.step(run.train.learning_rate, lambda mean=mean: bool(mean.isfinite()))
        if result.skipped:
            skipped.append(step)
            same_scale = kind == "gradient" or (backend.scaler.scale == scale.scale)
            unchanged = unchanged and (step != BAD or (same(before, state(backend)) and same_scale))
        if step != BAD:
            losses.append(mean.item())
    return {"losses": losses, "skipped": skipped, "unchanged": unchanged, "state": state(backend)}


def main(task_path: str, result_path: str) -> None:
    task = json.loads(Path(task_path).read_text())
    world = join_cpu()
    results: dict[str, Any] = {}
    for label, flags in task["layouts"].items():
        shared = {**task["shared"], **flags}
        without = train(shared, world, None)
        for kind in task["kinds"]:
            found = train(shared, world, kind)
            skipped: list[Any] = [None] * world.size
            if world.size > 1:
                torch.distributed.all_gather_object(skipped, found["skipped"])
            else:
                skipped = [found["skipped"]]
            results[f"{label}, {kind}"] = {
                "skipped": skipped,
                "unchanged": found["unchanged"],
                "losses": found["losses"] == without["losses"] and all(map(math.isfinite, found["losses"])),
                "state": same(found["state"], without["state"]),
                "also skipped without": without["skipped"],
            }
    if world.is_first:
        Path(result_path).write_text(json.dumps(results))
    world.barrier()
    world.leave()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(*sys.argv[1:])
    os._exit(0)  # without finalization, as `run_and_exit` explains
