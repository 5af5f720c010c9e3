"""FSDP2 with everything offloaded: real steps on real tensors of the CPU, every storage followed.

Host and device are one here. The holder of a tensor decides which of the two it counts for: weights, reduced gradients and
moments count as host memory, everything else as the device's. The copies between the two, which would not happen here, are
made (``scalegpt.tracing.trace``). The other ranks of the process group do not exist: their collectives need no memory here.

A CPU shows neither that pinned memory comes in powers of two, nor when non-blocking copies free the device's memory.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from scalegpt.backends import Backend, World, build_model, make_backend, plain
from scalegpt.config import RunConfig
from scalegpt.config.presets import resolve
from scalegpt.config.train import LOSS_ROWS
from scalegpt.model.loss import make_loss
from scalegpt.optim.factory import optimizer_factory
from scalegpt.planner.memory import fsdp as fsdp_memory
from scalegpt.planner.memory.predict import predict
from scalegpt.tracing import trace
from scalegpt.tracing.cuda import shared_extras
from scalegpt.tracing.tracker import Snapshot, Tracker

MODEL = {
    "backend": "fsdp", "zero_stage": 3, "offload": "all", "n_layer": 4, "n_embd": 128, "n_head": 4, "block_size": 128,
    "vocab_size": 1500, "micro_batch": 2, "precision": "fp32", "attention": "math", "loss_chunk": 128,
}  # fmt: skip

CASES: dict[str, tuple[dict[str, Any], int, int]] = {
    "two ranks": ({}, 2, 1),
    "eight ranks, accumulated": ({"recompute": "full", "bias": True}, 8, 2),
    "own head, full loss": ({"tie_head": False, "loss": "full", "recompute": "selective"}, 8, 1),
    "alone": ({"n_layer": 2}, 1, 2),
}

aten = torch.ops.aten


class RealTensors(Tracker):
    """The tracker of tensors without data, for those with: a number that is read is the tensor's own."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default:
            return func(*args)
        return super().__torch_dispatch__(func, types, args, kwargs)


@contextmanager
def real_backend(run: RunConfig, ranks: int, grad_accum: int) -> Iterator[Backend]:
    """The trainer's backend on rank 0, with weights."""
    with trace.fake_process_group(ranks):
        world = World(rank=0, size=ranks, local_rank=0, local_size=ranks, device=torch.device("cpu"))
        model = build_model(run, compiled=False)
        model.loss = make_loss(run.train.loss, run.train.loss_chunk, rows=LOSS_ROWS)  # as on a GPU
        backend = make_backend(run, world, grad_accum, model, optimizer_factory(run.train))
        with torch.no_grad():
            for parameter in backend.model.parameters():
                plain.local(parameter).normal_(0, 0.02)
        yield backend


def follow(backend: Backend) -> tuple[Snapshot, dict[str, Snapshot]]:
    """The second of two steps."""
    tracker, fused = RealTensors(extras=shared_extras), backend.run.train.fused
    with trace._no_collection(), tracker, trace._resizing(tracker), trace._copies_to_host(tracker):
        tracker.calibrate()
        trace._watch(backend.model, tracker)
        for _ in range(2):
            trace._mark_states(backend, tracker, fused=fused, on_host=True)
            gc.collect()
            tracker.restart()
            trace._take_step(backend, tracker, on_host=True)
        return tracker.replay()


@pytest.fixture(params=CASES)
def case(
    request: pytest.FixtureRequest, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> tuple[RunConfig, int, int]:
    # What ranks that do not exist would have sent is not finite, and yet the step is to be taken.
    monkeypatch.setattr(plain, "is_finite", lambda _: True)
    flags, ranks, grad_accum = CASES[request.param]
    return resolve(flags={**MODEL, **flags}), ranks, grad_accum


def test_the_device_holds_what_the_ledger_says(case: tuple[RunConfig, int, int]) -> None:
    run, ranks, grad_accum = case
    with real_backend(run, ranks, grad_accum) as backend:
        steady, moments = follow(backend)
    predicted = predict(run, ranks=ranks, grad_accum=grad_accum)
    assert steady.size == predicted.steady_bytes == 0
    for phase in ("forward", "loss", "loss_backward", "block_backward", "backward_tail"):
        assert predicted.phases[phase] == pytest.approx(moments[phase].size, rel=0.01), phase


def test_the_host_holds_what_the_ledger_says(case: tuple[RunConfig, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    run, ranks, grad_accum = case
    monkeypatch.setattr(fsdp_memory, "host_size", lambda count, *, pin: count)  # no powers of two without pinned memory
    with real_backend(run, ranks, grad_accum) as backend:
        tokens = torch.zeros(run.train.micro_batch, run.model.block_size, dtype=torch.int64)
        for micro in range(grad_accum):
            backend.micro_step(tokens, tokens, last=micro == grad_accum - 1)
        held = [tensor for parameter in backend.model.parameters() for tensor in (parameter, parameter.grad)]
        backend.step(1e-4)
        held += [state[name] for state in backend.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    sizes = [plain.local(tensor).numel() * plain.local(tensor).element_size() for tensor in held if tensor is not None]
    assert len(sizes) == 4 * len(backend.model.shapes)
    assert predict(run, ranks=ranks, grad_accum=grad_accum).host_bytes == sum(sizes)


def test_pinned_memory_comes_in_powers_of_two() -> None:
    """One weight [100, 96] over 8 ranks: ⌈100 / 8⌉ = 13 rows, 4,992 bytes, and so 8,192 for it and for its gradient."""
    run = resolve(flags={**MODEL, "n_embd": 96, "vocab_size": 100})
    other = resolve(flags={**MODEL, "n_embd": 96, "vocab_size": 8})  # 1 row of 384 bytes, and so 512
    more = predict(run, ranks=8).host_bytes - predict(other, ranks=8).host_bytes
    assert more == 2 * (8192 - 512) + 2 * (4992 - 384)
