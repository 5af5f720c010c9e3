"""The arithmetic says what a trace of the real step says; ``python tests/oracle/draws.py 160`` draws more than these."""

from typing import Any

import pytest

from oracle.draws import Case, compare, draw
from scalegpt.config.presets import resolve
from scalegpt.planner.attention import attention_kernel

NUMBERS = (1, 4, 9, 22, 24, 25, 27, 28, 31, 62, 69, 191)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.slow
def test_plan_and_trace_agree(number: int) -> None:
    case = draw(number)
    error, planned, traced = compare(case)
    assert abs(error) <= (0.005 if case.run.parallel.backend == "plain" else 0.01), case.label
    assert planned.steady_bytes == pytest.approx(traced.steady_bytes, rel=0.005), case.label
    assert sum(planned.breakdown.values()) == planned.peak_bytes


SHAPE = {"n_layer": 3, "n_embd": 768, "n_head": 12, "vocab_size": 5003, "block_size": 128, "micro_batch": 1}


@pytest.mark.parametrize(
    ("ranks", "shard_size", "flags", "grad_accum"),
    [
        (8, None, {"zero_stage": 3}, 1), (64, None, {"zero_stage": 2}, 2), (1024, None, {"zero_stage": 3}, 2),
        (8, 4, {"zero_stage": 3}, 3), (64, 8, {"zero_stage": 2}, 2), (1024, 8, {"zero_stage": 3}, 2),
        (1024, 8, {"zero_stage": 2, "optimizer": "muon"}, 1), (1024, 256, {"zero_stage": 3, "optimizer": "muon"}, 1),
        (64, 8, {"zero_stage": 3, "offload": "all"}, 1), (1024, 16, {"zero_stage": 3, "offload": "all"}, 3),
    ],
)  # fmt: skip
def test_meshes_agree(ranks: int, shard_size: int | None, flags: dict[str, Any], grad_accum: int) -> None:
    """Rank 0 of up to 1,024 ranks, of which the others do not exist (torch's fake process group)."""
    run = resolve(flags={**SHAPE, "backend": "fsdp", "precision": "bf16", "shard_size": shard_size, **flags})
    error, planned, traced = compare(Case(run, ranks, grad_accum, ""))
    assert abs(error) <= 0.01
    assert planned.steady_bytes == traced.steady_bytes
    for phase, size in traced.phases.items():
        assert planned.phases[phase] == pytest.approx(size, rel=0.02, abs=32 << 10), phase


def test_the_draws_differ() -> None:
    runs = [draw(number).run for number in NUMBERS]
    assert {run.parallel.backend for run in runs} == {"plain", "fsdp"}
    assert {run.parallel.offload for run in runs} == {"none", "all"}
    assert {run.train.recompute for run in runs} == {"none", "selective", "full"}
    assert {attention_kernel(run) for run in runs} == {"flash", "mem_efficient", "cudnn", "math"}
    assert {draw(number).grad_accum for number in NUMBERS} == {1, 2}
    assert any(run.parallel.shard_size for run in runs)
    assert any(run.model.head_width % 8 for run in runs)
