"""The trace of a step, against what torch's CPU allocator says of a real one, and against the laws that it must obey."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile, record_function

from scalegpt.architecture.counting import count_parameters
from scalegpt.backends import World, build_model, make_backend, plain
from scalegpt.config import RunConfig
from scalegpt.config.presets import resolve
from scalegpt.errors import InputError, RunError
from scalegpt.hardware.gpus import find_card
from scalegpt.optim.factory import optimizer_factory
from scalegpt.tracing import trace
from scalegpt.tracing.trace import PHASES, Trace, trace_step

SMALL = {
    "n_layer": 2,
    "n_embd": 128,
    "n_head": 4,
    "block_size": 128,
    "vocab_size": 1000,
    "micro_batch": 4,
    "loss_chunk": 128,
    "backend": "plain",
    "compile": "off",
}


def configure(**flags: Any) -> RunConfig:
    return resolve(flags={**SMALL, "precision": "bf16", **flags})


@cache
def traced(*, ranks: int = 1, grad_accum: int = 1, **flags: Any) -> Trace:
    return trace_step(configure(**flags), ranks=ranks, grad_accum=grad_accum)


class PhaseMarks:
    """Stands in for a tracker in a real step: leaves a mark in the profile where a phase begins."""

    made = 0
    phase = ""

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if name == "phase":
            with record_function(f"phase {value}"):
                pass

    def mark(self, *_: Any) -> None: ...

    def mark_since(self, *_: Any) -> None: ...

    @contextmanager
    def keeping(self, _kind: str) -> Iterator[None]:
        yield


def measure(run: RunConfig, ranks: int, grad_accum: int) -> dict[str, int]:
    """The most bytes of each phase of a real step on the CPU, from the allocator's own events."""
    group = trace.fake_process_group(ranks) if run.parallel.backend == "fsdp" else nullcontext()
    with group:
        model = build_model(run, compiled=False)
        world = World(rank=0, size=ranks, local_rank=0, local_size=ranks, device=torch.device("cpu"))
        backend = make_backend(run, world, grad_accum, model, optimizer_factory(run.train))
        with torch.no_grad():
            for parameter in model.parameters():
                plain.local(parameter).normal_(0, 0.02)
        marks: Any = PhaseMarks()
        trace._watch(model, marks)
        trace._take_step(backend, marks)
        gc.collect()
        tensors = list(model.parameters())
        for state in backend.optimizer.state.values():
            tensors += [value for name, value in state.items() if name != "step" or run.train.fused]
        now = sum(plain.local(tensor).untyped_storage().nbytes() for tensor in tensors)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            trace._take_step(backend, marks)
    assert profiled.profiler is not None
    events = list(profiled.profiler.kineto_results.events())
    most, phase = dict.fromkeys(PHASES, 0), PHASES[0]
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
        elif event.name().startswith("phase "):
            phase = event.name()[6:]
        most[phase] = max(most[phase], now)
    return most


REAL = {
    "chunked loss, accumulated": {"grad_accum": 2},
    "full loss, biases, foreach": {"loss": "full", "bias": True, "fused": False},
    "own head, everything recomputed": {"tie_head": False, "recompute": "full"},
    "selective, full loss, one sequence": {"recompute": "selective", "loss": "full", "micro_batch": 1},
    "fsdp 0, foreach": {"backend": "fsdp", "zero_stage": 0, "ranks": 8, "fused": False},
    "fsdp 2, accumulated": {"backend": "fsdp", "zero_stage": 2, "ranks": 8, "grad_accum": 2},
    "fsdp 3, recomputed": {"backend": "fsdp", "zero_stage": 3, "ranks": 8, "recompute": "full"},
    "fsdp 3, offloaded": {"backend": "fsdp", "zero_stage": 3, "ranks": 8, "offload": "all", "grad_accum": 2},
    "fsdp 2, full loss": {"backend": "fsdp", "zero_stage": 2, "ranks": 8, "loss": "full"},
}


@pytest.mark.parametrize("case", REAL)
@pytest.mark.slow
def test_the_trace_says_what_the_allocator_says(case: str, one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = dict(REAL[case])
    ranks, grad_accum = flags.pop("ranks", 1), flags.pop("grad_accum", 1)
    run = configure(precision="fp32", attention="math", **flags)
    # What ranks that do not exist would have sent is not finite, and yet the step is to be taken.
    monkeypatch.setattr(plain, "is_finite", lambda _: True)
    real = measure(run, ranks, grad_accum)
    traced_run = trace_step(run, ranks=ranks, grad_accum=grad_accum, as_cuda=False)
    for phase in PHASES:
        assert traced_run.phases[phase] == pytest.approx(real[phase], rel=0.002), phase


def test_the_fused_optimizer_needs_no_temporaries_and_foreach_a_copy_of_the_weights() -> None:
    parameters = count_parameters(configure().model).total
    fused, foreach = traced(), traced(fused=False)
    more = foreach.phases["optimizer_step"] - fused.phases["optimizer_step"]
    assert more == pytest.approx(4 * parameters, rel=0.05)


def test_recompute_and_chunks_save_memory() -> None:
    peaks = [traced(recompute=kind, n_layer=4).peak_bytes for kind in ("full", "selective", "none")]
    assert peaks == sorted(set(peaks))
    full = traced(loss="full")
    assert full.peak_phase == "loss_backward"
    assert traced(loss="chunked").peak_bytes < full.peak_bytes


def test_gradients_exist_in_the_second_micro_batch() -> None:
    once, twice = traced(), traced(grad_accum=2)
    gradients = 4 * count_parameters(configure().model).total
    assert twice.phases["forward"] - once.phases["forward"] == pytest.approx(gradients, rel=0.02)
    assert once.phases["optimizer_step"] == twice.phases["optimizer_step"]


def test_fsdp_divides_what_it_shards() -> None:
    stages = {stage: traced(zero_stage=stage, backend="fsdp", ranks=8) for stage in (0, 2, 3)}
    assert stages[3].peak_bytes < stages[2].peak_bytes < stages[0].peak_bytes
    whole = 12 * count_parameters(configure().model).total
    assert stages[0].steady_bytes == pytest.approx(whole, rel=0.01)
    for stage in (2, 3):
        assert stages[stage].steady_bytes == pytest.approx(whole / 8, rel=0.03)  # blocks of 512 bytes
    assert stages[2].breakdown["gathered weights"] > stages[3].breakdown["gathered weights"]


def test_cuda_kernels_keep_what_the_formula_says() -> None:
    """Per block, in bf16 with flash attention: 32·n·H, the norms' statistics 16·n, the attention's 4·B·a·T."""
    B, T, H, heads, few, many = 4, 128, 128, 4, 2, 4
    forwards = [traced(n_layer=layers).snapshots["forward"].by_kind["activations"] for layers in (few, many)]
    n = B * T
    block = 32 * n * H + 16 * n + 4 * B * heads * T
    weights_of_norms = 2 * 512
    assert forwards[1] - forwards[0] == pytest.approx((many - few) * block, abs=(many - few) * weights_of_norms)


def test_dropout_keeps_a_byte_for_each_element() -> None:
    kept = [traced(dropout=dropout).snapshots["forward"].by_kind["activations"] for dropout in (0.0, 0.1)]
    masks, elements = 1 + 2 * 2, 4 * 128 * 128
    # The projections' results are not saved; the sums' are, with dropout as without.
    assert kept[1] - kept[0] == pytest.approx(masks * elements, rel=0.01)


@pytest.mark.parametrize("attention", ["flash", "mem_efficient", "cudnn", "math"])
def test_every_attention_kernel_can_be_traced(attention: str) -> None:
    width = 60 if attention in {"flash", "math"} else 64
    traced_run = traced(attention=attention, dropout=0.125, n_embd=width, recompute="selective")
    assert traced_run.peak_bytes > 0
    scores = [piece for piece in traced_run.snapshots["forward"].groups if piece.shape[-2:] == (128, 128)]
    assert bool(scores) == (attention == "math")


def test_the_card_decides_on_the_kernel() -> None:
    """A T4 has no flash attention, and its memory-efficient kernel does not take heads of 20."""
    run = configure(precision="fp16", n_embd=80, recompute="none")
    recent, old = trace_step(run), trace_step(run, card=find_card("t4"))
    made_by = [{piece.made_by for piece in traced_run.snapshots["forward"].groups} for traced_run in (recent, old)]
    assert "aten._scaled_dot_product_flash_attention.default" in made_by[0]
    assert "aten._safe_softmax.default" in made_by[1]


def test_math_attention_drops_out_as_cuda_does() -> None:
    """Kept are the softmax, what dropout leaves of it, and a mask of a byte: the CPU's mask has four."""
    B, T, heads, layers = 4, 128, 4, 2
    masks = 4 * 128 * 128 * (1 + 2 * layers)  # of the embedding, and of each branch
    kept = [
        traced(dropout=dropout, attention="math").snapshots["loss"].by_kind["activations"] for dropout in (0.0, 0.125)
    ]
    assert kept[1] - kept[0] == pytest.approx(layers * 5 * B * heads * T * T + masks, rel=0.01)


def test_what_is_offloaded_is_not_on_the_device() -> None:
    sharded = {"backend": "fsdp", "zero_stage": 3, "ranks": 8, "vocab_size": 8000}
    here, there = traced(**sharded), traced(offload="all", **sharded)
    assert there.steady_bytes == 0
    assert set(there.snapshots["optimizer_step"].by_kind) <= {"inputs", "temporaries"}
    assert there.phases["optimizer_step"] < 16 * 4 * 128 + 1024  # the last micro batch and its loss
    assert 0 < there.peak_bytes < here.peak_bytes


def test_a_trace_is_the_same_every_time_and_leaves_nothing_behind() -> None:
    before = F.dropout, F.scaled_dot_product_attention, torch.get_rng_state()
    offloaded = {"backend": "fsdp", "zero_stage": 3, "offload": "all", "ranks": 8, "dropout": 0.1}
    first = traced.__wrapped__(**offloaded)
    assert first == traced.__wrapped__(**offloaded)
    assert not dist.is_initialized()
    assert gc.isenabled()
    assert "resize_" not in vars(torch.UntypedStorage)
    assert "to" not in vars(torch.Tensor)
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("aten::dropout", "AutogradCPU")
    assert (F.dropout, F.scaled_dot_product_attention) == before[:2]
    assert torch.equal(before[2], torch.get_rng_state())
    assert type(torch.zeros(1)) is torch.Tensor


def test_the_breakdown_is_all_there_is() -> None:
    traced_run = traced(recompute="selective")
    for phase in PHASES:
        assert sum(traced_run.snapshots[phase].by_kind.values()) == traced_run.phases[phase]
    assert sum(traced_run.breakdown.values()) == traced_run.peak_bytes == max(traced_run.phases.values())
    assert set(traced_run.steady.by_kind) == {"weights", "optimizer"}
    assert all(piece.size % 512 == 0 for moment in traced_run.snapshots.values() for piece in moment.groups)


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ({"backend": "deepspeed"}, "deepspeed"),
        ({"precision": "auto"}, "precision"),
        ({"ranks": 2}, "plain"),
    ],
)
def test_what_cannot_be_traced_is_refused(flags: dict[str, Any], word: str) -> None:
    with pytest.raises(InputError, match=word):
        traced(**flags)


def test_a_process_with_ranks_is_refused() -> None:
    with trace.fake_process_group(2):
        with pytest.raises(RunError, match="process group"):
            traced(backend="fsdp", ranks=2)
        assert dist.is_initialized()
