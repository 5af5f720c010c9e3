"""Takes a step of each of several layouts and counts what its collectives hand to the process group, by kind."""

import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from backends.parity_worker import make
from ranks import join_cpu
from scalegpt.backends import World
from scalegpt.config.presets import resolve

SMALL = 64
"""Bytes: norms, overflow flags and losses are no part of the volume."""

KINDS = {
    "allreduce_": ("all_reduce", 0), "allreduce_coalesced_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 0), "allgather_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1), "reduce_scatter_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1), "alltoall_base_": ("all_to_all", 0),
}  # fmt: skip
"""Operator → what it is, and which argument holds the whole of it."""


class Count(TorchDispatchMode):
    """Bytes of what is gathered, reduced or exchanged, whole, by kind and by the ranks that take part."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            kind, place = KINDS.get(name, (name, 0))
            size = sum(each.nbytes for each in tree_leaves(args[place]) if isinstance(each, Tensor))
            if size > SMALL:
                ranks = ranks_of(args)
                self.bytes[f"{kind} {ranks}"] += size * (len(ranks) if kind == "all_to_all" else 1)
        return func(*args, **(kwargs or {}))


def ranks_of(args: Any) -> list[int]:
    """The ranks of the group that a collective was called with."""
    for each in args:
        if isinstance(each, torch.ScriptObject) and "ProcessGroup" in str(each._type()):
            return dist.get_process_group_ranks(dist.ProcessGroup.unbox(each))
    raise AssertionError("a collective without a process group")


def count(flags: dict[str, Any], grad_accum: int, world: World) -> dict[str, int]:
    """A step in the steady state: the third, since ZeRO-3 compares notes in its first two."""
    run = resolve(flags=flags)
    backend = make(run, world, grad_accum)
    backend.load_weights(backend.model.initial_weights(run.train.seed))
    shape = (run.train.micro_batch, run.model.block_size)
    for _ in range(3):
        with Count() as counted:
            for micro in range(grad_accum):
                tokens = torch.randint(run.model.vocab_size, shape)
                backend.micro_step(tokens, tokens, last=micro == grad_accum - 1)
            backend.step(run.train.learning_rate)
    return dict(counted.bytes)


def main(task_path: str, result_path: str) -> None:
    task = json.loads(Path(task_path).read_text())
    world = join_cpu()
    results: dict[str, Any] = {}
    linear = torch.nn.functional.linear
    for label, case in task.items():
        torch.nn.functional.linear = linear  # ZeRO-3 puts its own there, for good
        results[label] = count(case["flags"], case["grad_accum"], world)
    if world.is_first:
        Path(result_path).write_text(json.dumps(results))
    world.barrier()
    world.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # without finalization, as `run_and_exit` explains
