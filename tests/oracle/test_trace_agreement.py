"""The arithmetic says what a trace of the real step says; ``python tests/oracle/draws.py 160`` draws more than these."""

import pytest

from oracle.draws import compare, draw
from scalegpt.planner.attention import attention_kernel

NUMBERS = (1, 4, 9, 22, 24, 25, 27, 28, 31, 62, 69, 191)


@pytest.mark.parametrize("number", NUMBERS)
def test_plan_and_trace_agree(number: int) -> None:
    case = draw(number)
    error, planned, traced = compare(case)
    assert abs(error) <= (0.005 if case.run.parallel.backend == "plain" else 0.01), case.label
    assert planned.steady_bytes == pytest.approx(traced.steady_bytes, rel=0.005), case.label
    assert sum(planned.breakdown.values()) == planned.peak_bytes


def test_the_draws_differ() -> None:
    runs = [draw(number).run for number in NUMBERS]
    assert {run.parallel.backend for run in runs} == {"plain", "fsdp"}
    assert {run.parallel.offload for run in runs} == {"none", "all"}
    assert {run.train.recompute for run in runs} == {"none", "selective", "full"}
    assert {attention_kernel(run) for run in runs} == {"flash", "mem_efficient", "cudnn", "math"}
    assert {draw(number).grad_accum for number in NUMBERS} == {1, 2}
    assert any(run.model.head_width % 8 for run in runs)
