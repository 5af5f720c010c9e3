"""Takes training steps on random tokens, measures their memory, time and profile, and frees a backend afterwards."""

import gc
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

from benchmarks.suite.rows import Values
from scalegpt.backends import Backend
from scalegpt.backends.base import local
from scalegpt.planner.batches import BatchPlan
from scalegpt.training.batches import on_device
from scalegpt.training.memory import measure, own_bytes

PROFILED_STEPS, KERNELS = 3, 25


class Memory:
    """Peak memory of a configuration, by part of the run, in bytes.

    On a GPU it is the allocator's peak. In a dry run on a CPU it is the memory of the process, so that the same code
    can run.

    Args:
        device: the device whose memory is measured.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peaks: dict[str, tuple[int, int]] = {}

    def lap(self, part: str) -> None:
        """End a part of the run: record the allocated and reserved peaks since the last call under the part's name."""
        if self.device.type != "cuda":
            self.peaks[part] = own_bytes(), own_bytes()
            return
        torch.cuda.synchronize(self.device)
        self.peaks[part] = torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)

    def summary(self) -> Values:
        """The largest peaks of all parts; the bytes that the driver counts now; and those of them outside the allocator."""
        watched = measure(self.device)
        driver = watched.driver or watched.peak
        reserved = torch.cuda.memory_reserved(self.device) if self.device.type == "cuda" else own_bytes()
        return {
            "allocated_bytes": max(allocated for allocated, _ in self.peaks.values()),
            "reserved_bytes": max(reserved for _, reserved in self.peaks.values()),
            "driver_bytes": driver,
            "outside_bytes": max(0, driver - reserved),
            "allocated_by_part": {part: allocated for part, (allocated, _) in self.peaks.items()},
        }


def timed(take: Callable[[], object], seconds: float) -> Values:
    """Time ``take``, which must be warmed up, for about ``seconds``: the median and interquartile range of its seconds."""
    timer = Timer("take()", globals={"take": take}, num_threads=torch.get_num_threads())
    found = timer.blocked_autorange(min_run_time=seconds)
    return {"step_seconds": found.median, "iqr_seconds": found.iqr, "steps": found.number_per_run * len(found.times)}


def profiled(take: Callable[[], object], device: torch.device, trace: str | None) -> Values:
    """Profile some steps: find the kernels that take the most time, and the share of the time in which a kernel runs.

    Args:
        take: takes a step; it must be warmed up.
        device: the device; on a CPU operators stand for kernels.
        trace: the file to write the whole trace to, in Chrome's format; None: no trace is written.
    """
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities) as profiler:
        begin = time.perf_counter()
        for _ in range(PROFILED_STEPS):
            take()
        if on_cuda:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - begin
    if trace is not None:
        profiler.export_chrome_trace(trace)
    key = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    events = profiler.key_averages()
    # On a GPU operators and annotations contain the time of their kernels, which must not count twice.
    kernels = [each for each in events if each.device_type.name == "CUDA" and not each.is_user_annotation]
    busy = sum(getattr(each, key) for each in (kernels if on_cuda else events)) / 1e6
    table = events.table(sort_by=key, row_limit=KERNELS, max_name_column_width=80)
    return {"step_seconds": seconds / PROFILED_STEPS, "busy_share": busy / seconds, "kernels": table}


def take_step(backend: Backend, batch: BatchPlan, memory: Memory | None = None) -> tuple[float, bool]:
    """Take a step on random tokens, as the trainer does.

    Args:
        backend: the backend, with its weights loaded.
        batch: how the step is divided.
        memory: records the peaks of the step's parts; None: they are not recorded.

    A fake process group sends nothing, so gathered weights and gradients have arbitrary values. The gradients are then
    set to zero, since a gradient that is not finite would make the backend skip the step.

    Returns:
        The mean loss, and whether the step was skipped.
    """
    world = backend.world
    total = torch.zeros((), device=world.device)
    for micro, (tokens, targets) in enumerate(_micro_batches(backend, batch)):
        total += backend.micro_step(tokens, targets, last=micro == batch.grad_accum - 1)
    if world.size > 1:
        for parameter in backend.model.parameters():
            if parameter.grad is not None:
                local(parameter.grad).zero_()
    if memory is not None:
        memory.lap("micro steps")
    result = backend.step(backend.run.train.learning_rate)
    loss = float(world.sum(total)) / (batch.grad_accum * world.size)
    if memory is not None:
        memory.lap("optimizer step")
    return loss, result.skipped


def _micro_batches(backend: Backend, batch: BatchPlan) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets [B, T] of random tokens for each micro batch, moved to the device as in the trainer."""
    generator = np.random.default_rng(backend.run.train.seed)
    for _ in range(batch.grad_accum):
        windows = generator.integers(0, backend.run.model.vocab_size, (batch.micro_batch, batch.block_size + 1))
        yield on_device(windows[:, :-1].copy(), windows[:, 1:].copy(), backend.world.device)


def dismantle_deepspeed(backend: Any) -> None:
    """Free the memory of DeepSpeed's engine.

    The engine leaves reference cycles through C++ that Python's garbage collector does not see, and stage 3 keeps the
    model in a module-level list and in a cache. Without this function, the weights and all objects of the engine would
    stay in memory while the next configuration is measured.
    """
    backend.engine.destroy()
    parameters = list(backend.model.parameters())
    for thing in (*parameters, backend.optimizer, backend.engine):
        vars(thing).clear()
    for parameter in parameters:
        parameter.grad = None
        parameter.data = parameter.data.new_empty(0)


def release(device: torch.device) -> int:
    """Free what a row has left, including workspaces and compiled code; return the bytes that stay allocated on a GPU."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)
