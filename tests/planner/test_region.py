"""The feasible region, against single plans."""

import pytest

from scalegpt.api import plan
from scalegpt.config.run import ParallelConfig
from scalegpt.config.train import RECOMPUTE
from scalegpt.planner.batches import BatchPlan, divisors
from scalegpt.planner.plan import Plan, make_plan
from scalegpt.planner.query import Answer
from scalegpt.planner.search.question import Scheme
from scalegpt.planner.search.region import feasible_region


def single(given: Answer, layout: ParallelConfig, recompute: str, micro: int) -> Plan:
    run, batch = given.choice.run, given.choice.batch
    divided = BatchPlan(micro, batch.micro_batch * batch.grad_accum // micro, batch.ranks, batch.block_size)
    return make_plan(Scheme(layout, recompute, run.train.loss).applied(run, divided), given.choice.machine, divided)


@pytest.mark.parametrize(
    "asked",
    [
        {"preset": "Llama-3-8B", "gpu": "h100", "gpus": 8, "tokens_per_step": 2**18},
        {"preset": "500M_1024", "gpu": "3060", "tokens_per_step": 2**15},
        {
            "preset": "350M_1024",
            "gpu": "4090",
            "gpus": 2,
            "tokens_per_step": 49152,
            "backend": "fsdp",
            "optimizer": "muon",
        },
    ],
)
def test_it_has_the_lightest_recompute_that_fits(asked: dict[str, object]) -> None:
    given = plan(**asked, calibrated=False)  # type: ignore[arg-type]
    rows = list(feasible_region(given.question, given.choice))
    found = {(row.layout, micro): lightest for row in rows for micro, lightest in row.lightest.items()}
    assert len(set(found.values())) >= 2
    for (layout, micro), lightest in found.items():
        fitting = [
            recompute
            for recompute in RECOMPUTE
            if (each := single(given, layout, recompute, micro)).total_bytes <= given.question.limit and each.fits_host
        ]
        assert lightest == (fitting[0] if fitting else None), (layout, micro)


def test_it_has_all_layouts_and_micro_batches_though_they_are_fixed() -> None:
    given = plan("350M_1024", gpu="4090", gpus=8, backend="fsdp", zero_stage=2, micro_batch=12, calibrated=False)
    rows = list(feasible_region(given.question, given.choice))
    assert {(row.layout.backend, row.layout.stage) for row in rows} >= {("fsdp", 0), ("fsdp", 3), ("deepspeed", 1)}
    per_rank = given.choice.batch.micro_batch * given.choice.batch.grad_accum
    assert all(tuple(row.lightest) == divisors(per_rank) for row in rows)
    assert {row.layout.offload for row in rows} == {"none"}
