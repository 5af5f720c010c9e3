"""The division of a step: the tokens stay, accumulation follows, and what cannot be divided is refused with a way out."""

import re
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from scalegpt.config import ModelConfig, RunConfig, TrainConfig
from scalegpt.errors import InputError
from scalegpt.planner.batches import BatchPlan, plan_batches

SIZES = st.integers(1, 200)


def run(micro_batch: int, tokens_per_step: int | None, block_size: int = 16) -> RunConfig:
    return RunConfig(
        name="run",
        model=ModelConfig(block_size=block_size),
        train=TrainConfig(micro_batch=micro_batch, tokens_per_step=tokens_per_step),
    )


@given(SIZES, SIZES, st.integers(1, 16), st.integers(1, 64))
def test_a_step_keeps_its_tokens(micro: int, per_rank: int, ranks: int, block: int) -> None:
    tokens = per_rank * ranks * block
    plan = plan_batches(run(micro, tokens, block), ranks, micro_fixed=False)
    assert plan.tokens == tokens
    assert plan.sequences == per_rank * ranks
    assert plan.micro_batch == max(size for size in range(1, micro + 1) if per_rank % size == 0)


@given(SIZES, SIZES, st.integers(1, 16))
def test_a_fixed_micro_batch_that_divides_is_kept(micro: int, accum: int, ranks: int) -> None:
    plan = plan_batches(run(micro, micro * accum * ranks * 16), ranks, micro_fixed=True)
    assert plan == BatchPlan(micro, accum, ranks, 16)


@given(SIZES, SIZES, st.integers(1, 16))
def test_what_the_refusal_proposes_works(micro: int, per_rank: int, ranks: int) -> None:
    assume(per_rank % micro)
    tokens = per_rank * ranks * 16
    with pytest.raises(InputError, match="does not divide") as caught:
        plan_batches(run(micro, tokens), ranks, micro_fixed=True)
    found = re.search(r"--micro_batch (\d+), or --tokens_per_step (\d+)", str(caught.value))
    assert found is not None
    plan_batches(run(int(found[1]), tokens), ranks, micro_fixed=True)
    plan_batches(run(micro, int(found[2])), ranks, micro_fixed=True)


@given(st.integers(1, 10_000), st.integers(1, 16), st.integers(1, 64))
def test_tokens_that_no_ranks_can_share_are_refused_with_neighbours(tokens: int, ranks: int, block: int) -> None:
    assume(tokens % (ranks * block))
    with pytest.raises(InputError, match="is not a multiple") as caught:
        plan_batches(run(1, tokens, block), ranks, micro_fixed=False)
    proposed = str(caught.value).split("; ")[1].removesuffix(" would work").split(" or ")
    assert [abs(int(each) - tokens) < ranks * block for each in proposed] == [True] * len(proposed)
    for each in proposed:
        plan_batches(run(1, int(each), block), ranks, micro_fixed=True)


def test_without_tokens_per_step_a_step_is_one_micro_batch_a_rank() -> None:
    assert plan_batches(run(6, None), 4, micro_fixed=False) == BatchPlan(6, 1, 4, 16)


@pytest.mark.parametrize("flags", [{"micro_batch": 8}, {"micro_batch": 10**6}])
def test_a_mistyped_giant_is_not_searched_to_its_end(flags: dict[str, Any]) -> None:
    giant = 999_999_999_056  # 16 times a prime: nothing divides its sequences
    for fixed in (True, False):
        try:
            plan = plan_batches(run(tokens_per_step=giant, **flags), 1, micro_fixed=fixed)
        except InputError:
            assert fixed
        else:
            assert plan.tokens == giant
