"""Times short training steps of small models. Each model spends most of its time on a different kind of work.

The probes run the trainer's own backend and model, so their time contains all that the time of a real step contains.
The planner counts their work (:class:`~scalegpt.planner.time.step_time.StepWork`) as it counts the work of a plan.
"""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from scalegpt.backends import World, build_model
from scalegpt.backends.plain import PlainBackend
from scalegpt.config import RunConfig
from scalegpt.config.presets import resolve
from scalegpt.optim.factory import optimizer_factory
from scalegpt.planner.attention import attention_kernel
from scalegpt.planner.time.step_time import StepTotals, StepWork

SHAPES: Mapping[str, tuple[int, int, int, int, int, int]] = {
    "starting kernels": (4, 32, 2, 16, 64, 1),
    "narrow": (4, 128, 4, 128, 257, 8),
    "middle": (2, 192, 3, 256, 257, 4),
    "wide": (1, 768, 12, 256, 64, 1),
    "many tokens": (1, 384, 6, 256, 64, 4),
    "vocabulary": (1, 192, 3, 256, 32768, 2),
    "attention": (1, 128, 2, 1024, 64, 1),
}
"""The kind of work that a probe measures → its layers, width, heads, block size, vocabulary and micro batch."""

FEWER = {"narrow": (4, 128, 4, 128, 257, 6), "middle": (1, 192, 3, 256, 257, 2), "wide": (1, 512, 8, 256, 64, 1),
         "many tokens": (1, 384, 6, 256, 64, 2), "vocabulary": (1, 192, 3, 256, 4096, 4)}  # fmt: skip
"""Smaller shapes, for a dtype in which the processor is slow."""


@dataclass(frozen=True)
class Timed:
    """A probe's work and the time that it took.

    Attributes:
        work: the planner's count of the work of a step.
        least: least seconds of the forward and backward pass.
        typical: median seconds of the forward and backward pass.
        update: median seconds of the optimizer update.
    """

    work: StepTotals
    least: float
    typical: float
    update: float


def probe_run(name: str, precision: str, *, fewer: bool = False) -> RunConfig:
    """The run of a probe; the arguments are those of :class:`Probe`."""
    layers, width, heads, block, vocabulary, micro = (FEWER if fewer else SHAPES).get(name, SHAPES[name])
    shape = {"n_layer": layers, "n_embd": width, "n_head": heads, "block_size": block, "vocab_size": vocabulary}
    return resolve(
        flags={**shape, "micro_batch": micro, "tokenizer": "byte", "backend": "plain", "precision": precision}
    )


def work_of(run: RunConfig) -> StepTotals:
    """The planner's count of the work of a step of a probe."""
    return StepWork.of(run, ranks=1, grad_accum=1, kernel=attention_kernel(run), compiled=False).totals()


def clock() -> float:
    """Read a clock in seconds. With one thread it counts processor time, which other processes hardly affect."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


class Probe:
    """A model that can be trained for a step at a time, on random tokens.

    Args:
        name: one of :data:`SHAPES`.
        precision: the compute dtype.
        fewer: take the shape of :data:`FEWER`, if it has one.
    """

    def __init__(self, name: str, precision: str, *, fewer: bool = False) -> None:
        self.run = probe_run(name, precision, fewer=fewer)
        world = World(0, 1, 0, 1, torch.device("cpu"))
        model = build_model(self.run, compiled=False, device=world.device)
        self.backend = PlainBackend(self.run, world, 1, model, optimizer_factory(self.run.train))
        self.backend.load_weights(self.backend.model.initial_weights(0))
        random = torch.Generator().manual_seed(0)  # leaves the run's own generator alone
        size = (self.run.train.micro_batch, self.run.model.block_size)
        self.tokens = torch.randint(self.run.model.vocab_size, size, generator=random)
        self.passes: list[float] = []
        self.updates: list[float] = []

    def step(self, *, counts: bool = True) -> float:
        """Take a step, and return its seconds by :func:`clock`; it ``counts`` if it is to be a part of :meth:`timed`."""
        start = clock()
        self.backend.micro_step(self.tokens, self.tokens, last=True)
        between = clock()
        self.backend.step(1e-4)
        end = clock()
        if counts:
            self.passes.append(between - start)
            self.updates.append(end - between)
        return end - start

    def timed(self) -> Timed:
        """The work of a step, and the time of the steps that counted."""
        least, typical = min(self.passes), statistics.median(self.passes)
        return Timed(work_of(self.run), least, typical, statistics.median(self.updates))
