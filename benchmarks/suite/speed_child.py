"""The child process of ``gpu_suite.py speed``: times steps of ours and of a plain loop, and the loss alone, and profiles.

``python -m benchmarks.suite.speed_child cuda|dry``; a job is :meth:`Configuration.as_dict` with

=========  ============================================================================================================
``kind``   one of those in :mod:`benchmarks.suite.speed_rows`
``trace``  of a profile: a file for all of it, or None
``way``    of a loss: which, with its ``chunk``
=========  ============================================================================================================

and an answer holds beside what :mod:`benchmarks.suite.station` says

============  =========================================================================================================
``outcome``   ``ran``, too
``measured``  seconds, tokens a second, MFU, memory; of a profile what :func:`benchmarks.suite.profiling.summary` says;
              nothing in a dry run, whose figures would mean nothing
============  =========================================================================================================

Nobody waits for the device between the steps that count: marks on its own clock divide them.
"""

import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.steps.baseline import BaselineSteps, Shape
from benchmarks.steps.ours import random_tokens
from benchmarks.suite.children import Values
from benchmarks.suite.loss_ways import distance, gradients, loss_of
from benchmarks.suite.profiling import profiled
from benchmarks.suite.speed_rows import (
    LEAST_STEPS,
    LOOP,
    LOSS,
    MOST_STEPS,
    PROFILE,
    PROFILED_STEPS,
    TIMED_SECONDS,
    TRAIN,
    WARM_STEPS,
)
from benchmarks.suite.station import TINY_BATCH, TINY_CHUNK, Station, batch_of, serve_from
from benchmarks.suite.steps import Marks, Peaks, take_step
from scalegpt.backends import Backend
from scalegpt.backends.base import DTYPES
from scalegpt.backends.capabilities import device_name
from scalegpt.config import RunConfig
from scalegpt.errors import InputError
from scalegpt.hardware.gpus import peak_flops
from scalegpt.planner.batches import BatchPlan
from scalegpt.planner.time.work import flops_per_token
from scalegpt.training.metrics import mfu

MOST_SKIPPED = 12
"""Steps that fp16 may skip while it looks for its loss scale."""

DRY_ACCUM = 2
"""Micro batches of a step in a dry run, at most."""

LOSS_SECONDS_TIMED = 0.25
"""A loss takes milliseconds."""

COMPARED_TOKENS = 4096
"""Over so many tokens at most a loss's gradients are held against those of full logits in fp32."""

MOST_ERROR = 0.2
"""Rounding to the compute dtype gives a fortieth of that; with more a loss computes something else."""


class SpeedStation(Station):
    """Times what trains, and what is part of it."""

    def measure(self, job: Values, found: Values) -> None:
        """Do a job of any kind."""
        run = self._resolved(job)
        run = self._shrunk(run, found["notes"]) if self.dry else run
        {TRAIN: self._train, LOOP: self._loop, LOSS: self._loss, PROFILE: self._profile}[job["kind"]](run, job, found)
        found["outcome"] = "stepped" if self.dry else "ran"

    # --- steps -------------------------------------------------------------------------------------------------------

    def _train(self, run: RunConfig, job: Values, found: Values) -> None:
        before, peaks, batch = self._held(), Peaks(self.device), self._batch(run, job)
        with self._backend(run, job, batch, found) as backend:
            peaks.lap("set-up")
            self._warm_up(backend, batch)
            peaks.lap("first steps")
            skipped: list[bool] = []
            measured = self._timed(lambda: skipped.append(take_step(backend, batch)), TIMED_SECONDS)
            peaks.lap("steps")
            if any(skipped):
                found["notes"].append(f"{sum(skipped)} of the steps that count were skipped: not all was done in them")
            self._enter(measured, run, batch.tokens, peaks, before, found)

    def _loop(self, run: RunConfig, job: Values, found: Values) -> None:
        """The plain loop, of the same shape and with the same tokens of a step."""
        if run.train.precision != "bf16":
            raise InputError(f"the plain loop trains in bf16, not in {run.train.precision} as this card would")
        before, peaks, batch = self._held(), Peaks(self.device), self._batch(run, job)
        model = run.model
        shape = Shape(
            model.n_layer, model.n_head, model.n_embd, model.block_size, model.vocab_size,
            batch=batch.micro_batch, bias=model.bias, grad_accum=batch.grad_accum,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder, self._eagerly_if_dry(job, found):
            data = random_tokens(Path(folder), model.vocab_size)
            loop = BaselineSteps(shape, data, self.device, bf16=True, compiled=job["compiled"])
            peaks.lap("set-up")
            for _ in range(WARM_STEPS - 1):
                loop.step()
            peaks.lap("first steps")
            measured = self._timed(loop.take, TIMED_SECONDS)
            peaks.lap("steps")
            self._enter(measured, run, shape.tokens, peaks, before, found)

    @contextmanager
    def _backend(self, run: RunConfig, job: Values, batch: BatchPlan, found: Values) -> Iterator[Backend]:
        """The trainer's backend, ready to step."""
        world = self._world(1)
        with (
            self._group(run, world),
            self._built(run, world, batch, compiled=job["compiled"], notes=found["notes"]) as backend,
        ):
            yield backend

    @contextmanager
    def _eagerly_if_dry(self, job: Values, found: Values) -> Iterator[None]:
        """In a dry run what is compiled runs eagerly."""
        eagerly = self.dry and job["compiled"]
        if eagerly:
            found["notes"].append("compiled parts run eagerly")
        with torch.compiler.set_stance("force_eager") if eagerly else nullcontext():
            yield

    def _batch(self, run: RunConfig, job: Values) -> BatchPlan:
        """How a step is divided."""
        batch = batch_of(run, job)
        return replace(batch, grad_accum=min(DRY_ACCUM, batch.grad_accum)) if self.dry else batch

    def _warm_up(self, backend: Backend, batch: BatchPlan) -> None:
        """Steps that compile, make the optimizer's state and find the loss scale."""
        taken = 0
        for _ in range(MOST_SKIPPED + WARM_STEPS):
            taken += not take_step(backend, batch)
            if taken == WARM_STEPS - 1:
                return
        raise RuntimeError(f"{MOST_SKIPPED} steps were skipped for a gradient that is not finite")

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _timed(self, take: Callable[[], object], seconds: float) -> Values:
        """Steps in a row, as many as take so long. A first one that is waited for tells how many, and does not count.

        Returns:
            The median of a step and its middle half, and the mean by the processor's clock over all of them.
        """
        begin = time.perf_counter()
        take()
        self._wait()
        if self.dry:
            return {}
        count = steps_for(seconds, time.perf_counter() - begin)
        marks = Marks(self.device)
        begin = time.perf_counter()
        marks.mark()
        for _ in range(count):
            take()
            marks.mark()
        spans = marks.spans()
        mean = (time.perf_counter() - begin) / count
        return {
            "step_seconds": statistics.median(spans),
            "middle_half": statistics.quantiles(spans, n=4)[::2],
            "mean_seconds": mean,
            "steps": count,
        }

    def _enter(
        self, measured: Values, run: RunConfig, tokens: int, peaks: Peaks, before: Values, found: Values
    ) -> None:
        """Enter what was measured of steps of so many tokens."""
        if self.dry:
            return
        each = flops_per_token(run.model)
        rate = tokens / measured["step_seconds"]
        found["measured"] = {
            **measured,
            "tokens_per_step": tokens,
            "tokens_per_second": rate,
            "mfu": mfu(rate, each, peak_flops(device_name(self.device), run.train.precision), 1),
            "model_flops_per_second": rate * each,
            "precision": run.train.precision,
            **(peaks.summary(before, self._held()) if self.device.type == "cuda" else {}),
        }

    # --- the loss alone ----------------------------------------------------------------------------------------------

    def _loss(self, run: RunConfig, job: Values, found: Values) -> None:
        """Forward and backward of the loss over the tokens of a micro batch."""
        if self.dry and "chunk" in job:
            job = {**job, "chunk": TINY_CHUNK}
        micro = TINY_BATCH if self.dry else job["flags"]["micro_batch"]
        n, shape = micro * run.model.block_size, (run.model.vocab_size, run.model.n_embd)
        compute = DTYPES[run.train.precision]
        generator = torch.Generator(self.device).manual_seed(run.train.seed)
        hidden = torch.randn(n, shape[1], device=self.device, dtype=compute, generator=generator).requires_grad_()
        head = (0.02 * torch.randn(shape, device=self.device, generator=generator)).requires_grad_()
        targets = torch.randint(shape[0], (n,), device=self.device, generator=generator)
        some = slice(0, COMPARED_TOKENS)
        with self._eagerly_if_dry(job, found):
            loss = loss_of(job, self.device)
            found["gradient_error"] = distance(loss, hidden[some].detach().requires_grad_(), head, targets[some])
            if not found["gradient_error"] <= MOST_ERROR:
                raise RuntimeError(f"its gradients are {found['gradient_error']:.1%} off: it is another loss")
            if self.dry:
                gradients(loss, hidden, head, targets)
                return
            self._time_loss(lambda: gradients(loss, hidden, head, targets), n, found)

    def _time_loss(self, both: Callable[[], object], tokens: int, found: Values) -> None:
        both()  # compiles for this shape
        self._wait()
        on_cuda = self.device.type == "cuda"
        before = torch.cuda.memory_allocated(self.device) if on_cuda else 0
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        found["measured"] = {**self._timed(both, LOSS_SECONDS_TIMED), "tokens": tokens}
        if on_cuda:
            found["measured"]["extra_bytes"] = torch.cuda.max_memory_allocated(self.device) - before

    # --- the profile -------------------------------------------------------------------------------------------------

    def _profile(self, run: RunConfig, job: Values, found: Values) -> None:
        batch = self._batch(run, job)
        with self._backend(run, job, batch, found) as backend:
            self._warm_up(backend, batch)
            self._wait()
            steps = 1 if self.dry else PROFILED_STEPS
            summary = profiled(lambda: take_step(backend, batch), steps, self.device, job["trace"])
            if not self.dry:
                found["measured"] = summary


def steps_for(seconds: float, step_seconds: float) -> int:
    """How many steps take so long, within bounds."""
    return min(MOST_STEPS, max(LEAST_STEPS, math.ceil(seconds / step_seconds)))


if __name__ == "__main__":
    serve_from(SpeedStation, sys.argv[1:])
