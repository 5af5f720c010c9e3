"""Measures rows in the suite's child process, with the trainer's own backends.

Every answer has an ``outcome``: ``ran``, ``out of memory``, ``skipped`` or ``failed``. The last three have a ``reason``, and
a failed row has a ``traceback``. ``measured`` has the figures, ``notes`` further remarks. The figures of a dry run come from
tiny models on a CPU and mean nothing.

**Emulated cards.** A process takes two kinds of memory on a card: what the allocator reserves, and what is outside the
allocator (the context, loaded kernels, NCCL's buffers). ``set_per_process_memory_fraction`` limits only the allocator.
At the limit the allocator acts as on a full card: it frees cached blocks, tries again, and then is out of memory. The
limit is therefore the emulated card's memory minus the memory outside the allocator, which the previous row measured.
The planner's tables are not used for it, since the suite tests them.
"""

import importlib
import importlib.util
import json
import math
import os
import pkgutil
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch

import scalegpt
from benchmarks.steps.baseline import AUTOCAST, BaselineSteps, Shape
from benchmarks.steps.losses import gradients, inputs, loss_of, relative_error
from benchmarks.steps.ours import random_tokens
from benchmarks.suite.rows import ROOT, Row, Values, settings
from benchmarks.suite.steps import Memory, dismantle_deepspeed, profiled, release, take_step, timed
from scalegpt import api
from scalegpt.backends import Backend, World, build_model, make_backend
from scalegpt.backends.base import DTYPES
from scalegpt.backends.capabilities import check_attention, device_name, resolve_compile
from scalegpt.config import RunConfig
from scalegpt.errors import InputError
from scalegpt.hardware.gpus import find_card, peak_flops
from scalegpt.hardware.machine import Machine
from scalegpt.optim.factory import optimizer_factory
from scalegpt.planner.batches import BatchPlan
from scalegpt.planner.memory.deepspeed.settings import deepspeed_settings
from scalegpt.planner.time.work import flops_per_token
from scalegpt.speed.precision import resolve_precision
from scalegpt.tracing.trace import fake_process_group
from scalegpt.training.memory import machine_of, measure
from scalegpt.training.metrics import mfu
from scalegpt.units import gib

IMAGINED = "H100 SXM"
"""The card for which a dry run plans. The machine need not have it."""

DRY_MODEL = {"n_layer": 2, "n_embd": 32, "n_head": 2, "block_size": 32, "vocab_size": 128}
DRY_BATCH, DRY_CHUNK, DRY_SECONDS, DRY_STEPS = 2, 16, 0.01, 8

WARM_STEPS, MOST_SKIPPED = 2, 12
"""The number of warm-up steps, which compile and make the optimizer's state; and the number of steps that fp16 may skip
while it finds its loss scale."""

RUN_STEPS = 300

OPTIONAL = ("deepspeed", "triton", "liger_kernel")
"""Optional libraries. Rows that need a missing library are skipped."""

MOST_LEFT_OVER = 64 * 2**20
"""Bytes that may stay allocated after a row. If more bytes stay allocated, a new process takes the next row."""

DRIVER_OUT_OF_MEMORY = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Texts in the errors that occur when a library asks the driver, not torch's allocator, for memory and there is none."""


def make_bench(mode: str) -> "DeviceBench":
    """The bench on the first CUDA device, or on the CPU if ``mode`` is ``dry`` or there is no CUDA device."""
    on_cuda = mode != "dry" and torch.cuda.is_available()
    if mode == "dry":
        torch.set_num_threads(1)  # for tensors this small, threads only wait for each other
    return DeviceBench(torch.device("cuda", 0) if on_cuda else torch.device("cpu"), dry=mode == "dry")


class DeviceBench:
    """Measures one row after another on a device.

    Args:
        device: the device.
        dry: whether to use tiny models, to see that every row runs.
    """

    def __init__(self, device: torch.device, *, dry: bool) -> None:
        self.device, self.dry, self.on_cuda = device, dry, device.type == "cuda"
        self.world = World(0, 1, 0, 1, device)
        self.outside = 0
        self.draws = torch.empty(0)

    def greet(self) -> Values:
        """The machine that the trainer would plan for, and its card. ``machine`` is None if there is no CUDA device."""
        if self.dry:
            machine = replace(Machine.with_card(find_card(IMAGINED)), torch=torch.__version__)
            return {"machine": machine, "card": f"a dry run, planned for {machine.name}"}
        if not self.on_cuda:
            return {"machine": None}
        torch.cuda.set_device(self.device)
        torch.zeros(1, device=self.device)
        machine, held = machine_of(self.world), measure(self.device)
        self.outside = held.driver or 0
        return {
            "machine": machine, "card": machine.name, "memory": machine.usable_bytes, "capability": machine.capability,
            "driver": machine.driver, "cuda": torch.version.cuda or torch.version.hip, "context_bytes": held.driver,
            "driver_counts_this_process_alone": held.driver_is_ours,
            "allocator": os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
        }  # fmt: skip

    def answer(self, row: Row) -> Values:
        """Measure one row. Errors are returned as answers."""
        found: Values = {"notes": []}
        try:
            found["measured"] = getattr(self, row.kind)(row, found)
            found["outcome"] = "ran"
        except InputError as error:
            found |= {"outcome": "skipped", "reason": str(error)}
        except Exception as error:  # errors of libraries have no common class, and none of them may end the suite
            found |= failure(error)
        try:
            left = release(self.device)
        except RuntimeError as error:  # the device no longer answers
            return {**failure(error), **found, "restart": True}
        if left > MOST_LEFT_OVER:
            found["restart"] = True
            found["notes"].append(f"{gib(left)} stayed allocated")
        return found

    # --- kinds of rows -----------------------------------------------------------------------------------------------

    def imports(self, _row: Row, found: Values) -> Values:
        """Import every module of the package, and the optional libraries; missing libraries become notes."""
        programs = {"scalegpt.__main__", "scalegpt.train"}  # to be run, not imported
        modules = {each.name for each in pkgutil.walk_packages(scalegpt.__path__, "scalegpt.")} - programs
        for name in (*OPTIONAL, *sorted(modules)):
            try:
                importlib.import_module(name)
            except ModuleNotFoundError as error:
                if str(error.name).split(".")[0] not in OPTIONAL:
                    raise
                found["notes"].append(f"{name}: {error}")
        return {}

    def train(self, row: Row, found: Values) -> Values:
        """Take steps with a backend and measure their memory; if the row has ``seconds``, also their time."""
        run, batch = self._settings(row)
        memory = Memory(self.device)
        with self._limited(row, found), self._backend(run, batch, row) as backend:
            memory.lap("set-up")
            warm_up(backend, batch)
            memory.lap("first steps")
            loss, skipped = take_step(backend, batch, memory)
            if skipped or (batch.ranks == 1 and not math.isfinite(loss)):
                raise RuntimeError(f"the step was skipped, or its loss is not finite: {loss}")
            speed = timed(lambda: take_step(backend, batch), self._seconds(row)) if row.seconds else {}
            memory.lap("timed steps")
            held = memory.summary()
        self.outside = held["outside_bytes"]
        return {**held, "loss": loss, **self._rates(speed, run, batch.tokens)}

    def loop(self, row: Row, _found: Values) -> Values:
        """Measure memory and time of a nanoGPT-style loop with the shape of a preset."""
        run, batch = self._settings(row)
        if run.train.precision != "bf16":
            raise InputError(f"the plain loop trains in bf16, not in {run.train.precision} as this card would")
        model, memory = run.model, Memory(self.device)
        shape = Shape(
            model.n_layer, model.n_head, model.n_embd, model.block_size, model.vocab_size,
            batch=batch.micro_batch, bias=model.has_bias, grad_accum=batch.grad_accum,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder, self._eager_if_dry():
            data = random_tokens(Path(folder), model.vocab_size)
            loop = BaselineSteps(shape, data, self.device, precision=AUTOCAST, compiled=True)
            for _ in range(WARM_STEPS):
                loop.step()
            speed = timed(loop.take, self._seconds(row))
            memory.lap("steps")
        return {**memory.summary(), **self._rates(speed, run, shape.tokens)}

    def loss(self, row: Row, found: Values) -> Values:
        """Measure forward and backward of the loss by itself, over the tokens of a micro batch."""
        run, batch = self._settings(row)
        way = {**row.more, **({"chunk": DRY_CHUNK} if self.dry else {})}
        shape = batch.tokens, run.model.n_embd, run.model.vocab_size
        hidden, head, targets = inputs(*shape, DTYPES[run.train.precision], self.device)
        with self._eager_if_dry():
            loss = loss_of(**way)
            found["gradient_error"] = relative_error(loss, hidden, head, targets)
            gradients(loss, hidden, head, targets)  # compiles for this shape
            memory = Memory(self.device)
            memory.lap("inputs")
            before = torch.cuda.memory_allocated(self.device) if self.on_cuda else 0
            speed = timed(lambda: gradients(loss, hidden, head, targets), self._seconds(row))
            memory.lap("loss")
        return {**speed, "tokens": batch.tokens, "extra_bytes": memory.peaks["loss"][0] - before}

    def profile(self, row: Row, _found: Values) -> Values:
        """Profile the kernels of some steps."""
        run, batch = self._settings(row)
        with self._backend(run, batch, row) as backend:
            warm_up(backend, batch)
            return profiled(lambda: take_step(backend, batch), self.device, row.more.get("trace"))

    def run(self, row: Row, _found: Values) -> Values:
        """Use the package's API: train on this repository's documents, save, resume, sample."""
        steps, flags = DRY_STEPS if self.dry else RUN_STEPS, {**row.flags, **(DRY_MODEL if self.dry else {})}
        flags |= {"vocab_size": "auto", "tokenizer": "byte", "device": self.device.type}
        with tempfile.TemporaryDirectory() as folder:
            for until in (steps // 2, steps):
                run = api.train(input_file=ROOT / "docs", model_name="run", runs_dir=folder, max_iters=until, **flags)
            sample = api.load(run, device=self.device.type).generate("The ")
            lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses = [each["loss"] for each in map(json.loads, lines) if "loss" in each]
        if len(losses) != steps or not losses[-1] < losses[0]:
            raise RuntimeError(f"{len(losses)} of {steps} steps; losses {losses[:: steps // DRY_STEPS]}")
        return {"losses": losses[:: steps // DRY_STEPS], "sample": sample}

    # --- what they share ---------------------------------------------------------------------------------------------

    def _settings(self, row: Row) -> tuple[RunConfig, BatchPlan]:
        """The run and its batch, with the precision resolved and attention checked for this device.

        In a dry run both are tiny.
        """
        run, accum = settings(row.preset, row.flags), row.grad_accum
        train, model = run.train, run.model
        if self.dry:
            model, accum = model.changed(**DRY_MODEL), min(2, accum)
            micro, precision = min(DRY_BATCH, train.micro_batch), train.precision.replace("auto", "bf16")
            train = train.changed(micro_batch=micro, loss_chunk=DRY_CHUNK, precision=precision)
        train = train.changed(precision=resolve_precision(replace(run, model=model, train=train), self.device))
        check_attention(train.attention, train.precision, self.device, model.head_width, dropout=model.dropout > 0)
        batch = BatchPlan(train.micro_batch, accum, row.ranks, model.block_size)
        return replace(run, model=model, train=train.changed(tokens_per_step=batch.tokens)), batch

    @contextmanager
    def _backend(self, run: RunConfig, batch: BatchPlan, row: Row) -> Iterator[Backend]:
        """The trainer's backend with its weights; its memory is freed afterwards."""
        is_deepspeed, compiled = run.parallel.backend == "deepspeed", row.flags["compile"] == "on"
        if is_deepspeed and importlib.util.find_spec("deepspeed") is None:
            raise InputError("DeepSpeed is not installed")
        lacking = resolve_compile("on", self.device)[1] if compiled and not self.dry else None
        if lacking is not None:
            raise InputError(lacking)
        world = replace(self.world, size=batch.ranks, local_size=batch.ranks)
        with self._group(batch.ranks), self._eager_if_dry():
            options = None
            if is_deepspeed:
                options = deepspeed_settings(run, grad_accum=batch.grad_accum, ranks=1, on_cuda=self.on_cuda)
            model = build_model(run, compiled=compiled, device=self.device)
            backend = make_backend(run, world, batch.grad_accum, model, optimizer_factory(run.train), options)
            backend.load_weights(self._weights(model.shapes))
            try:
                yield backend
            finally:
                if is_deepspeed:
                    dismantle_deepspeed(backend)

    def _weights(self, shapes: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Initial weights of a model, by name.

        They reuse the same random numbers, since new ones would take seconds per row.
        """
        most = max(map(math.prod, shapes.values()))
        if len(self.draws) < most:
            self.draws = 0.02 * torch.randn(most)
        for name, shape in shapes.items():
            matrix, ones = self.draws[: math.prod(shape)].view(*shape), torch.ones(shape)
            yield name, matrix if len(shape) > 1 else ones * name.endswith("weight")

    @contextmanager
    def _group(self, ranks: int) -> Iterator[None]:
        """A fake process group for more than one rank.

        For one rank, the backend makes a group, which later rows use too.
        """
        if ranks > 1:
            self.world.leave()
        with fake_process_group(ranks) if ranks > 1 else nullcontext():
            yield

    @contextmanager
    def _limited(self, row: Row, found: Values) -> Iterator[None]:
        """Limit the allocator to the memory of the emulated card minus the memory outside the allocator."""
        if row.usable_bytes is None:
            yield
            return
        found["allocator_limit_bytes"] = limit = row.usable_bytes - self.outside
        if self.on_cuda:
            total = torch.cuda.mem_get_info(self.device)[1]
            torch.cuda.set_per_process_memory_fraction(max(0.0, min(1.0, limit / total)), self.device)
        try:
            yield
        finally:
            if self.on_cuda:
                torch.cuda.set_per_process_memory_fraction(1.0, self.device)

    def _eager_if_dry(self) -> AbstractContextManager[object]:
        """In a dry run, make compiled code run eagerly, since compilation takes minutes on a CPU."""
        return torch.compiler.set_stance("force_eager") if self.dry else nullcontext()

    def _seconds(self, row: Row) -> float:
        return DRY_SECONDS if self.dry else float(row.seconds)

    def _rates(self, speed: Values, run: RunConfig, tokens: int) -> Values:
        """The figures of ``speed``, with tokens per step, tokens per second and MFU; empty if nothing was timed."""
        if not speed:
            return {}
        rate, peak = tokens / speed["step_seconds"], peak_flops(device_name(self.device), run.train.precision)
        share = mfu(rate, flops_per_token(run.model), peak, 1)
        return {**speed, "tokens_per_step": tokens, "tokens_per_second": rate, "mfu": share}


def warm_up(backend: Backend, batch: BatchPlan) -> None:
    """Take steps until :data:`WARM_STEPS` of them were not skipped."""
    taken = 0
    for _ in range(MOST_SKIPPED + WARM_STEPS):
        taken += not take_step(backend, batch)[1]
        if taken == WARM_STEPS:
            return
    raise RuntimeError(f"{MOST_SKIPPED} steps were skipped for a gradient that is not finite")


def failure(error: Exception) -> Values:
    """The answer for an error: the outcome, the reason, and whether a new process must take the next row."""
    errors: list[BaseException] = [error]
    while errors[-1].__context__ is not None:  # cleaning up after the first error may have raised further ones
        errors.append(errors[-1].__context__)
    for each in errors:
        by_driver = any(sign in str(each) for sign in DRIVER_OUT_OF_MEMORY)
        if isinstance(each, torch.OutOfMemoryError) or by_driver:
            return {"outcome": "out of memory", "reason": str(each), "restart": by_driver or each is not error}
    text = "".join(traceback.format_exception(error))
    return {"outcome": "failed", "reason": f"{type(error).__name__}: {error}", "traceback": text, "restart": True}
