"""Takes Muon's steps over ranks, sharded and whole, and reports how far they are from those of one process."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from scalegpt.config import TrainConfig
from scalegpt.optim.factory import optimizer_factory
from scalegpt.planner.memory import newton_schulz

STEPS, TOLERANCE = 3, {"fp32": 1e-5, "fp16": 1e-2, "bf16": 1e-1}


def drawn(shapes: list[list[int]], count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes for _ in range(count)]


def step(weights: list[Any], gradients: list[list[Any]], precision: str) -> None:
    others = [("wte.weight", nn.Parameter(torch.ones(3, 2)))]
    named = [(f"blocks.{number}.fc.weight", weight) for number, weight in enumerate(weights)]
    optimizer = optimizer_factory(TrainConfig(optimizer="muon", precision=precision))([*named, *others])
    for each in gradients:
        for weight, gradient in zip(weights, each, strict=True):
            weight.grad = gradient
        optimizer.step()


def alone(weights: list[Tensor], gradients: list[list[Tensor]], precision: str) -> list[Tensor]:
    """The same in one process: a process group stands in the way, so that its size is hidden."""
    own, dist.is_initialized = dist.is_initialized, lambda: False
    try:
        made = [nn.Parameter(weight.clone()) for weight in weights]
        step(made, [[gradient.clone() for gradient in each] for each in gradients], precision)
    finally:
        dist.is_initialized = own
    return [weight.detach() for weight in made]


def compare(shapes: list[list[int]], count: int, placement: Any, precision: str) -> dict[str, Any]:
    weights, gradients = drawn(shapes, count, 0), [drawn(shapes, count, 1 + number) for number in range(STEPS)]
    expected = alone(weights, gradients, precision)
    if placement is None:
        parts: list[Any] = [nn.Parameter(weight.clone()) for weight in weights]
        step(parts, [[gradient.clone() for gradient in each] for each in gradients], precision)
    else:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        parts = [nn.Parameter(distribute_tensor(weight.clone(), mesh, [placement])) for weight in weights]
        sharded = [[distribute_tensor(gradient.clone(), mesh, [placement]) for gradient in each] for each in gradients]
        step(parts, sharded, precision)
    found = [part.detach().full_tensor() if isinstance(part, DTensor) else part.detach() for part in parts]
    return {
        "how": str(placement), "precision": precision, "limit": newton_schulz.ROUND_ELEMENTS,
        "error": max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True)),
        "moved": min((a - b).abs().max().item() for a, b in zip(expected, weights, strict=True)),
        "tolerance": 0.02 * STEPS * TOLERANCE[precision] * 2,
    }  # fmt: skip


def main(task_path: str, result_path: str) -> None:
    task = json.loads(Path(task_path).read_text())
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = []
    for limit in (newton_schulz.ROUND_ELEMENTS, 60):
        newton_schulz.ROUND_ELEMENTS = limit
        results += [
            compare(task["shapes"], task["count"], placement, precision)
            for placement in (None, Replicate(), Shard(0))
            for precision in ("fp32", "bf16", "fp16")
        ]
    if dist.get_rank() == 0:
        Path(result_path).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)
