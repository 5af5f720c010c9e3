"""Where a suite's child process measures: one configuration after another through the trainer's own backends.

A suite's child is a :class:`Station` with a ``measure`` of its own; :func:`serve_from` makes it a process that answers jobs.
A job is :meth:`Configuration.as_dict`, with whatever the suite adds. What every answer holds:

===================  ==================================================================================================
``outcome``          what the suite says; ``stepped``, in a dry run; ``out of memory``; ``left out``, ``skipped`` or
                     ``failed``, each with a ``reason``
``notes``            what was done otherwise than asked
``left_over_bytes``  what was not given back afterwards
``seconds``          from the first byte to the last
``restart``          whether this process is no longer fit to measure in
===================  ==================================================================================================
"""

import gc
import os
import platform
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.suite.children import Values, serve
from benchmarks.suite.steps import dismantle, living_bytes
from scalegpt.backends import Backend, World, build_model, make_backend
from scalegpt.backends.capabilities import check_attention, device_name, resolve_compile
from scalegpt.backends.precision import resolve_precision
from scalegpt.config import RunConfig
from scalegpt.config.presets import resolve
from scalegpt.errors import InputError
from scalegpt.model.gpt import GPT
from scalegpt.optim.factory import optimizer_factory
from scalegpt.planner.batches import BatchPlan
from scalegpt.planner.memory.deepspeed.settings import deepspeed_settings
from scalegpt.tracing.trace import fake_process_group
from scalegpt.training.memory import MemoryWatch, machine_of

TINY = {"n_layer": 2, "n_embd": 32, "n_head": 2, "block_size": 32, "vocab_size": 128}
"""The shape of every model in a dry run."""

TINY_BATCH, TINY_CHUNK = 2, 16

MOST_LEFT_OVER = 64 * 2**20
"""Bytes that may stay allocated after a configuration; with more, a new process measures the next."""

DRIVER_OUT_OF_MEMORY = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""How it reads when a library asks the driver itself for memory, past torch's allocator."""


class Station(ABC):
    """Where configurations are measured, one after another.

    Args:
        device: where they run.
        dry: tiny ones, to see that they do.
    """

    def __init__(self, device: torch.device, *, dry: bool) -> None:
        self.device, self.dry = device, dry
        self._weights: dict[str, Tensor] = {}

    @abstractmethod
    def measure(self, job: Values, found: Values) -> None:
        """Take a configuration through its steps, and enter into ``found`` what became of it.

        Raises:
            InputError: this machine cannot do it.
        """

    def greet(self) -> Values:
        """What this process finds."""
        if self.device.type != "cuda":
            return {"gpu": None, "torch": torch.__version__}
        properties = torch.cuda.get_device_properties(self.device)
        machine = machine_of(self._world(1))
        torch.zeros(1, device=self.device)
        self.release()
        context = MemoryWatch(self.device).measure()
        return {
            "torch": torch.__version__,
            "gpu": {
                "name": device_name(self.device),
                "total_bytes": properties.total_memory,
                "capability": f"{properties.major}.{properties.minor}",
                "catalogue_entry": machine.card.name if machine.card else None,
                "driver": machine.driver,
                "cuda": torch.version.cuda,
                "hip": torch.version.hip,
                "nccl": _nccl_version(),
                "processor": platform.machine(),
                "allocator_settings": os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
                "context_bytes": context.driver,
                "driver_bytes_are_ours": context.driver_is_ours,
            },
        }

    def answer(self, job: Values) -> Values:
        """Measure one configuration; whatever becomes of it is an answer."""
        start = time.perf_counter()
        found: Values = {"notes": []}
        try:
            self.measure(job, found)
        except InputError as error:
            found |= {"outcome": "skipped", "reason": str(error)}
        except Exception as error:  # a library's errors have no common class, and one of them must not end the suite
            found |= self._failure(error)
        found["left_over_bytes"] = self.release()
        if found["left_over_bytes"] > MOST_LEFT_OVER:
            found["restart"] = True
        found["seconds"] = round(time.perf_counter() - start, 2)
        return found

    def _failure(self, error: Exception) -> Values:
        """What an exception means for the configuration and for this process."""
        errors: list[BaseException] = [error]
        while errors[-1].__context__ is not None:  # cleaning up after the first may have raised others
            errors.append(errors[-1].__context__)
        for each in errors:
            if isinstance(each, torch.OutOfMemoryError):
                reason = _first_line(each).removesuffix(".")
                return {"outcome": "out of memory", "reason": reason, "restart": each is not error}
            if any(sign in str(each) for sign in DRIVER_OUT_OF_MEMORY):
                return {"outcome": "out of memory", "reason": _first_line(each), "restart": True}
        traceback.print_exc()
        reason = f"{type(error).__name__}: {_first_line(error)}"
        return {"outcome": "failed", "reason": reason, "restart": True}

    # --- one configuration -------------------------------------------------------------------------------------------

    def _resolved(self, job: Values) -> RunConfig:
        layout = {"backend": job["backend"], "zero_stage": job["zero_stage"], "ds_config": None}
        run = resolve(preset=job["preset"], flags={**layout, **job["flags"]})
        precision = run.train.precision
        if self.dry:
            precision = "bf16" if precision == "auto" else precision
        else:
            precision = resolve_precision(
                precision, self.device, run.model, run.train.micro_batch * run.model.block_size
            )
            dropout = run.model.dropout > 0
            check_attention(run.train.attention, precision, self.device, run.model.head_size, dropout=dropout)
            if job["compiled"]:
                _, lacking = resolve_compile("on", self.device)
                if lacking is not None:
                    raise InputError(lacking)
        return replace(run, train=run.train.changed(precision=precision))

    def _shrunk(self, run: RunConfig, notes: list[str]) -> RunConfig:
        """The same settings around a tiny model, as far as this CPU has them."""
        train = run.train.changed(micro_batch=min(TINY_BATCH, run.train.micro_batch), loss_chunk=TINY_CHUNK)
        run = replace(run, model=run.model.changed(**TINY), train=train)
        try:
            dropout = run.model.dropout > 0
            check_attention(train.attention, train.precision, self.device, run.model.head_size, dropout=dropout)
        except InputError:
            notes.append(f"attention auto: the CPU has no {train.attention}")
            return replace(run, train=train.changed(attention="auto"))
        return run

    def _world(self, ranks: int) -> World:
        """We are the first of so many ranks on this machine."""
        return World(rank=0, size=ranks, local_rank=0, local_size=ranks, device=self.device)

    @contextmanager
    def _group(self, run: RunConfig, world: World) -> Iterator[None]:
        """The process group that a run makes, or a fake one for more ranks than there are; left again afterwards."""
        if world.size > 1:
            with fake_process_group(world.size):
                yield
            return
        try:
            yield
        finally:
            if run.parallel.backend != "deepspeed":  # which keeps its own record of the group
                world.leave()

    @contextmanager
    def _built(
        self, run: RunConfig, world: World, batch: BatchPlan, *, compiled: bool, notes: list[str]
    ) -> Iterator[Backend]:
        """The backend, ready to step, and taken apart afterwards. In a dry run compiled blocks run eagerly."""
        eagerly = self.dry and compiled
        if eagerly:
            notes.append("compiled blocks run eagerly")
        backend = self._build(run, world, batch, compiled=compiled)
        try:
            with torch.compiler.set_stance("force_eager") if eagerly else nullcontext():
                yield backend
        finally:
            if run.parallel.backend == "deepspeed":
                dismantle(backend)

    def _build(self, run: RunConfig, world: World, batch: BatchPlan, *, compiled: bool) -> Backend:
        """Model, backend and weights as the trainer makes them."""
        settings = None
        if run.parallel.backend == "deepspeed":
            on_cuda = self.device.type == "cuda"
            settings = deepspeed_settings(run, grad_accum=batch.grad_accum, ranks=world.size, on_cuda=on_cuda)
        run = replace(run, train=run.train.changed(tokens_per_step=batch.tokens))
        model = build_model(run, compiled=compiled)
        weights = self._initial_weights(model, run.train.seed)
        backend = make_backend(run, world, batch.grad_accum, model, optimizer_factory(run.train), settings)
        backend.load_weights(weights.items())
        return backend

    def _initial_weights(self, model: GPT, seed: int) -> dict[str, Tensor]:
        """The model's weights in host memory, kept for the next configuration of the same shape."""
        shapes = {name: tuple(value.shape) for name, value in self._weights.items()}
        if shapes != {name: tuple(shape) for name, shape in model.shapes.items()}:
            self._weights.clear()
            self._weights.update(model.initial_weights(seed))
        return self._weights

    def _held(self) -> Values:
        """What is held at this moment."""
        if self.device.type != "cuda":
            return {}
        torch.cuda.synchronize(self.device)
        measured = MemoryWatch(self.device).measure()
        return {
            "allocated_bytes": torch.cuda.memory_allocated(self.device),
            "reserved_bytes": torch.cuda.memory_reserved(self.device),
            "driver_bytes": measured.driver,
            "driver_bytes_are_ours": measured.driver_is_ours,
            "allocation_retries": torch.cuda.memory_stats(self.device).get("num_alloc_retries", 0),
        }

    def release(self) -> int:
        """Give back what a configuration held, workspaces included, as if the process were new.

        Returns:
            Bytes that are still allocated on the device, or in a dry run the tensors that Python still knows.
        """
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
        gc.collect()
        if self.device.type != "cuda":
            return living_bytes({tensor.data_ptr() for tensor in self._weights.values()})
        torch.cuda.synchronize(self.device)
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)


def _nccl_version() -> str | None:
    if not torch.distributed.is_nccl_available():
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


def batch_of(run: RunConfig, job: Values) -> BatchPlan:
    """How the steps of a job are divided."""
    return BatchPlan(run.train.micro_batch, job["grad_accum"], job["ranks"], run.model.block_size)


def serve_from(make: Callable[..., Station], arguments: list[str]) -> None:
    """Serve on the first CUDA device, or on the CPU in a dry run or where there is no other.

    Args:
        make: makes the suite's station, of the arguments of :class:`Station`.
        arguments: ``cuda`` or ``dry``.
    """
    dry = arguments == ["dry"]
    on_cuda = not dry and torch.cuda.is_available()
    if on_cuda:
        torch.cuda.set_device(0)
    if dry:
        torch.set_num_threads(1)  # for tensors this small, threads only wait for each other
    station = make(torch.device("cuda", 0) if on_cuda else torch.device("cpu"), dry=dry)
    serve(station.greet, station.answer)
