"""The arithmetic says what a trace of the real step says; ``python tests/oracle/draws.py 120`` draws more than these."""

import pytest

from oracle.draws import compare, draw


@pytest.mark.parametrize("number", [0, 4, 6, 8, 10, 14, 18, 19, 20, 25, 28, 30])
def test_plan_and_trace_agree(number: int) -> None:
    case = draw(number)
    error, planned, traced = compare(case)
    assert abs(error) <= (0.005 if case.run.parallel.backend == "plain" else 0.01), case.label
    assert planned.steady_bytes == pytest.approx(traced.steady_bytes, rel=0.005), case.label
    assert sum(planned.breakdown.values()) == planned.peak_bytes


def test_the_draws_differ() -> None:
    cases = [draw(number) for number in range(40)]
    assert {case.run.parallel.backend for case in cases} == {"plain", "fsdp"}
    assert {case.run.train.recompute for case in cases} == {"none", "selective", "full"}
    assert {case.grad_accum for case in cases} == {1, 2}
