"""Takes real steps of DeepSpeed on this rank and reports which tensors lived when."""

import gc
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ranks import join_cpu
from scalegpt.backends import World, build_model, make_backend
from scalegpt.backends.deepspeed.engine import DeepSpeedBackend
from scalegpt.config.presets import resolve
from scalegpt.config.train import LOSS_ROWS
from scalegpt.model.loss import make_loss
from scalegpt.optim.factory import optimizer_factory
from scalegpt.planner.memory.deepspeed.settings import deepspeed_settings
from scalegpt.tracing.trace import _watch
from scalegpt.tracing.tracker import Snapshot, Tracker

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
    """All that Python refers to; between steps nothing is held by C++ alone."""
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and thing.device.type == "cpu":
            yield thing


def measure(flags: dict[str, Any], grad_accum: int, world: World) -> dict[str, Any]:
    """Some steps, then one that is followed."""
    gc.collect()
    older = [tensor.untyped_storage() for tensor in tensors_alive()]  # of earlier engines
    known = {storage._cdata for storage in older}
    run = resolve(flags=flags)
    settings = deepspeed_settings(run, grad_accum=grad_accum, ranks=world.size, on_cuda=False)
    model = build_model(run, compiled=False)
    model.loss = make_loss(run.train.loss, run.train.loss_chunk, rows=LOSS_ROWS)  # as on a GPU
    backend = make_backend(run, world, grad_accum, model, optimizer_factory(run.train), settings)
    assert isinstance(backend, DeepSpeedBackend)
    backend.load_weights(backend.model.initial_weights(run.train.seed))
    tracker = RealTensors()
    _watch(backend.model, tracker)
    for _ in range(WARM_UP):
        step(backend, tracker)
    gc.collect()
    gc.disable()
    buckets = follow_buckets(backend, tracker)
    with tracker:
        tracker.calibrate()
        for tensor in tensors_alive():
            if tensor.untyped_storage()._cdata not in known:
                tracker.mark(tensor, "others")
        mark_states(backend, tracker)
        tracker.restart()
        gradients = step(backend, tracker)
        mark_states(backend, tracker)  # a hook that adds to them makes them look like gradients
        steady, moments = tracker.replay()
    gc.enable()
    return {
        "steady": described(steady),
        "phases": {phase: described(moment) for phase, moment in moments.items()},
        "gradients": gradients,
        "buckets": max(buckets, default=0),
    }


def follow_buckets(backend: DeepSpeedBackend, tracker: Tracker) -> list[int]:
    """Have the bytes of the buckets noted whenever stages 1 and 2 make them; stage 3 has them from the start."""
    wrapper: Any = backend.optimizer
    sizes: list[int] = []

    def note() -> None:
        for bucket in getattr(wrapper, "ipg_buckets", {}).values():
            made = [bucket.buffer] if isinstance(bucket.buffer, Tensor) else bucket.buffer
            largest = getattr(wrapper, "temp_grad_buffer_for_gpu_offload", None)
            made = [*made, largest] if largest is not None else made
            for tensor in made:
                tracker.mark(tensor, "buckets")
            sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in made))

    original = getattr(wrapper, "setup_buckets", None)
    if original is None:
        with tracker:
            note()
        return sizes

    def setup_buckets() -> None:
        original()
        note()

    wrapper.setup_buckets = setup_buckets
    return sizes


def mark_states(backend: DeepSpeedBackend, tracker: Tracker) -> None:
    """Say what lives between steps; what offload would put into host memory is known by who holds it."""
    wrapper, offload = backend.optimizer, backend.run.parallel.offload
    for parameter in backend.model.parameters():
        tracker.mark(parameter, "weights")
        if offload != "all":
            tracker.mark(getattr(parameter, "ds_tensor", None), "weights")
    for master, state in backend._inner_optimizer().state.items():
        for value in (master, master.grad, *state.values()):
            tracker.mark(value, "optimizer" if offload == "none" else HOST)
    tracker.mark(getattr(wrapper, "grad_partitions_flat_buffer", None), "gradients" if offload == "none" else HOST)
    for gradient in getattr(wrapper, "fp32_groups_gradients_flat", ()):
        tracker.mark(gradient, "gradients")
    if offload != "none":
        for name in ("param_buffer_of_bit16_for_cpu_offload_groups", "param_groups_fp16_flat_cpu_memory"):
            for tensor in getattr(wrapper, name, ()):
                tracker.mark(tensor, HOST)
        tracker.mark(getattr(wrapper, "temp_grad_buffer_for_cpu_offload", None), HOST)
        for tensor in getattr(wrapper, "accumulated_grads_in_cpu", {}).values():
            tracker.mark(tensor, HOST)


def reduced_gradients(backend: DeepSpeedBackend, tracker: Tracker) -> int:
    """Bytes of what the ranks hold of the gradients when the backward passes are over."""
    wrapper: Any = backend.optimizer
    held = list(getattr(wrapper, "fp32_groups_gradients_flat", ()))
    held += [group.flat_partition for group in getattr(wrapper, "averaged_gradients", {}).values()
             if hasattr(group, "flat_partition")]  # fmt: skip
    flat = getattr(wrapper, "grad_partitions_flat_buffer", None)
    held += [flat] if flat is not None and backend.run.parallel.offload == "none" else []
    for tensor in held:
        tracker.mark(tensor, "gradients")
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def described(moment: Snapshot) -> dict[str, Any]:
    return {
        "total": moment.size,
        "pieces": [[p.kind, p.made_by, list(p.shape), p.dtype, p.count, p.size] for p in moment.groups],
    }


def step(backend: DeepSpeedBackend, tracker: Tracker) -> int:
    """What the trainer does in a step; returns the bytes of the reduced gradients."""
    run = backend.run
    shape = run.train.micro_batch, run.model.block_size
    for micro in range(backend.grad_accum):
        tracker.phase = "forward"
        tokens, targets = (torch.randint(run.model.vocab_size, shape) for _ in range(2))
        for tensor in (tokens, targets):
            tracker.mark(tensor, "inputs")
        backend.micro_step(tokens, targets, last=micro == backend.grad_accum - 1)
    gradients = reduced_gradients(backend, tracker)
    tracker.phase = "optimizer_step"
    assert not backend.step(run.train.learning_rate).skipped
    return gradients


def let_go_of_what_was_reduced() -> None:
    """Give gloo's threads the time to let go of the tensors of a collective that is done: they wait for us to do so."""
    for name in ("all_reduce", "reduce_scatter_tensor"):
        inherited = getattr(torch.distributed, name)

        def patient(*args: Any, inherited: Any = inherited, **kwargs: Any) -> Any:
            work = inherited(*args, **kwargs)
            time.sleep(0.005)
            return work

        setattr(torch.distributed, name, patient)


def pretend(ranks: int) -> World:
    """Join as rank 0 of ranks that do not exist (torch's fake process group); what is received from them is zero."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        inherited = getattr(torch.distributed, name)

        def zeros(*args: Any, inherited: Any = inherited, **kwargs: Any) -> Any:
            work = inherited(*args, **kwargs)
            (args or [kwargs.get(key) for key in ("output", "output_tensor") if key in kwargs])[0].zero_()
            return work

        setattr(torch.distributed, name, zeros)
    os.environ["WORLD_SIZE"] = str(ranks)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    return World(rank=0, size=ranks, local_rank=0, local_size=ranks, device=torch.device("cpu"))


def main(task_path: str, result_path: str) -> None:
    task = json.loads(Path(task_path).read_text())
    pretended = task.pop("pretended ranks", 0)
    world = pretend(pretended) if pretended else join_cpu()
    let_go_of_what_was_reduced()
    results: dict[str, Any] = {}
    linear = torch.nn.functional.linear
    for label, case in task.items():
        torch.nn.functional.linear = linear  # ZeRO-3 puts its own there, for good
        mine = measure(case["flags"], case["grad_accum"], world)
        results[label] = [mine]
        if not pretended:
            results[label] = [None] * world.size
            torch.distributed.all_gather_object(results[label], mine)
    if world.is_first:
        Path(result_path).write_text(json.dumps(results))
    world.barrier()
    world.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # without finalization, as `run_and_exit` explains
