"""Takes real steps of DeepSpeed on this rank and reports which tensors lived when."""

import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalegpt.backends import World, build_model, make_backend
from scalegpt.backends.deepspeed import DeepSpeedBackend
from scalegpt.config.presets import resolve
from scalegpt.planner.deepspeed_settings import deepspeed_settings
from scalegpt.training.optimizers import optimizer_factory
from scalegpt.training.trace import _watch
from scalegpt.training.trace_tracker import Moment, Tracker

HOST = "host"
WARM_UP = 3

aten = torch.ops.aten


class RealTensors(Tracker):
    """The tracker of fake tensors, for real ones: a number that is read from a tensor is that tensor's.

    What is first seen when it is split was not made by an operator: it is gloo's own copy of what it reduces.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default:
            return func(*args)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _follow(self, tensor: Tensor, func: Any) -> None:
        if func is not aten.split.Tensor:
            super()._follow(tensor, func)


def tensors_alive() -> Iterator[Tensor]:
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and thing.device.type == "cpu":
            yield thing


def measure(flags: dict[str, Any], grad_accum: int, world: World) -> dict[str, Any]:
    gc.collect()
    older = [tensor.untyped_storage() for tensor in tensors_alive()]  # of earlier engines
    run = resolve(flags=flags)
    settings = deepspeed_settings(run, grad_accum=grad_accum, ranks=world.size, on_cuda=False)
    model = build_model(run, compiled=False)
    backend = make_backend(run, world, grad_accum, model, optimizer_factory(run.train), settings)
    assert isinstance(backend, DeepSpeedBackend)
    backend.load_weights(backend.model.initial_weights(run.train.seed))
    tracker = RealTensors()
    _watch(backend.model, tracker)
    for _ in range(WARM_UP):
        tracker.phase = "warm up"
        step(backend, tracker)
    gc.collect()
    gc.disable()
    with tracker:
        tracker.calibrate()
        known = {storage._cdata for storage in older}
        for tensor in tensors_alive():
            if tensor.untyped_storage()._cdata not in known:
                tracker.mark(tensor, "others")
        mark_states(backend, tracker)
        tracker.restart()
        tracker.phase = "forward"
        step(backend, tracker)
        steady, moments = tracker.replay()
    gc.enable()
    return {
        "steady": described(steady),
        "phases": {phase: described(moment) for phase, moment in moments.items()},
    }


def mark_states(backend: DeepSpeedBackend, tracker: Tracker) -> None:
    wrapper: Any = backend.optimizer
    for parameter in backend.model.parameters():
        tracker.mark(parameter, "weights")
        tracker.mark(getattr(parameter, "ds_tensor", None), "weights")
    inner = backend._inner_optimizer()
    for master, state in inner.state.items():
        tracker.mark(master, "optimizer")
        tracker.mark(master.grad, "gradients")
        for value in state.values():
            tracker.mark(value, "optimizer")


def described(moment: Moment) -> dict[str, Any]:
    return {
        "total": moment.size,
        "pieces": [[p.kind, p.made_by, list(p.shape), p.dtype, p.count, p.size] for p in moment.pieces],
    }


def step(backend: DeepSpeedBackend, tracker: Tracker) -> None:
    run = backend.run
    shape = run.train.micro_batch, run.model.block_size
    for micro in range(backend.grad_accum):
        tracker.phase = "forward"
        tokens, targets = (torch.randint(run.model.vocab_size, shape) for _ in range(2))
        for tensor in (tokens, targets):
            tracker.mark(tensor, "inputs")
        backend.micro_step(tokens, targets, last=micro == backend.grad_accum - 1)
    tracker.phase = "optimizer_step"
    assert not backend.step(run.train.learning_rate).skipped


def main(task_path: str, result_path: str) -> None:
    task = json.loads(Path(task_path).read_text())
    world = World.join("cpu")
    results: dict[str, Any] = {}
    linear = torch.nn.functional.linear
    for label, case in task.items():
        torch.nn.functional.linear = linear  # ZeRO-3 puts its own there, for good
        mine = measure(case["flags"], case["grad_accum"], world)
        results[label] = [None] * world.size
        torch.distributed.all_gather_object(results[label], mine)
    if world.is_first:
        Path(result_path).write_text(json.dumps(results))
    world.barrier()
    world.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
