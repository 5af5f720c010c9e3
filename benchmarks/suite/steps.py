"""Real steps of a trainer's backend on random tokens, and what they hold. For every suite that trains."""

import gc
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.suite.children import Values
from scalegpt.backends import Backend
from scalegpt.backends.base import local
from scalegpt.planner.batches import BatchPlan
from scalegpt.training.batches import on_device


class Peaks:
    """The allocator's peaks, part of a run by part; on the CPU it has none.

    Args:
        device: whose allocator.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.allocated: dict[str, int] = {}
        self.reserved: dict[str, int] = {}

    def lap(self, part: str) -> None:
        """What was held since the last lap belongs to this part; a part may come several times."""
        if self.device.type != "cuda":
            return
        for peaks, peak in (
            (self.allocated, torch.cuda.max_memory_allocated(self.device)),
            (self.reserved, torch.cuda.max_memory_reserved(self.device)),
        ):
            peaks[part] = max(peak, peaks.get(part, 0))
        torch.cuda.reset_peak_memory_stats(self.device)

    def summary(self, before: Values, after: Values) -> Values:
        """The measurement: the largest of all parts, and what was held before and after."""
        return {
            "allocated_bytes": max(self.allocated.values()),
            "reserved_bytes": max(self.reserved.values()),
            "driver_bytes": after["driver_bytes"],
            "outside_bytes": after["driver_bytes"] - after["reserved_bytes"],
            "allocated_by_part": self.allocated,
            "allocation_retries": after["allocation_retries"] - before["allocation_retries"],
            "before": before,
            "after": after,
        }


class Marks:
    """Moments of a step, on the card's own clock, which runs behind Python; on the CPU by the processor's.

    Args:
        device: whose clock.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._events: list[torch.cuda.Event] = []
        self._times: list[float] = []

    def mark(self) -> None:
        """Mark the moment at which the card is done with all that it was given so far."""
        if self.device.type != "cuda":
            self._times.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._events.append(event)

    def spans(self) -> list[float]:
        """Seconds from each mark to the next; waits for the card."""
        if self.device.type != "cuda":
            return [end - start for start, end in pairwise(self._times)]
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) / 1000 for start, end in pairwise(self._events)]


def take_step(
    backend: Backend, batch: BatchPlan, peaks: Peaks | None = None, after_micro: Callable[[], None] = lambda: None
) -> bool:
    """What the trainer does in a step, on random tokens.

    Args:
        backend: with its weights.
        batch: how the step is divided.
        peaks: takes the allocator's peaks of its parts; None: nobody does.
        after_micro: called after each micro step.

    Over a fake group gathered weights are whatever the memory held, and so are the gradients: they are set to zero, lest the
    step be skipped for one that is not finite.

    Returns:
        Whether the step was skipped.
    """
    world = backend.world
    total = torch.zeros((), device=world.device)
    for micro, (tokens, targets) in enumerate(_micro_batches(backend, batch)):
        total += backend.micro_step(tokens, targets, last=micro == batch.grad_accum - 1)
        after_micro()
    if world.size > 1:
        for parameter in backend.model.parameters():
            if parameter.grad is not None:
                local(parameter.grad).zero_()
    if peaks is not None:
        peaks.lap("micro steps")
    result = backend.step(backend.run.train.learning_rate)
    world.sum(total).item()
    if peaks is not None:
        peaks.lap("optimizer step")
    return result.skipped


def _micro_batches(backend: Backend, batch: BatchPlan) -> Iterator[tuple[Tensor, Tensor]]:
    """Random tokens, handed to the device as the trainer does."""
    generator = np.random.default_rng(backend.run.train.seed)
    for _ in range(batch.grad_accum):
        windows = generator.integers(0, backend.run.model.vocab_size, (batch.micro_batch, batch.block_size + 1))
        yield on_device(windows[:, :-1].copy(), windows[:, 1:].copy(), backend.world.device)


def dismantle(backend: Any) -> None:
    """Take DeepSpeed's engine apart.

    It leaves circles through C++ that Python's garbage collector does not see, and stage 3 keeps the model in a module's list
    and in a cache: both would hold the weights, and all that hangs on them, beside the next configuration's.
    """
    backend.engine.destroy()
    parameters = list(backend.model.parameters())
    for thing in (*parameters, backend.optimizer, backend.engine):
        vars(thing).clear()
    for parameter in parameters:
        parameter.grad = None
        parameter.data = parameter.data.new_empty(0)


def living_bytes(known: set[int]) -> int:
    """Bytes of the CPU's tensors that Python can reach, apart from those at the known addresses."""
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(size for address, size in storages.items() if address and address not in known)
