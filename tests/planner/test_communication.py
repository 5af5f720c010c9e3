"""What is sent in a step: the volumes that the ZeRO paper counts, and when it happens."""

from itertools import pairwise
from typing import Any

import pytest

from scalegpt.architecture.counting import count_parameters
from scalegpt.config import RunConfig
from scalegpt.config.presets import resolve
from scalegpt.planner.time.communication import (
    ALL,
    EVERY,
    EXPOSED,
    LAST,
    REPLICAS,
    SHARDS,
    Collective,
    collectives,
    sent_bytes,
)

L, H, V, T = 24, 256, 512, 64
"""All rows are multiples of 64, so that nothing is padded; 64 ranks divide every tensor."""

RANKS = (2, 4, 8, 64)


def made(backend: str, stage: int, **flags: Any) -> RunConfig:
    """A run in fp32, where weights and gradients are four bytes a parameter."""
    shape = {"n_layer": L, "n_embd": H, "n_head": 4, "vocab_size": V, "block_size": T}
    return resolve(flags={**shape, "precision": "fp32", "backend": backend, "zero_stage": stage, **flags})


PARAMETERS = V * H + T * H + L * (12 * H**2 + 2 * H) + H
ROOT = V * H + T * H + H
"""Parameters outside the blocks, which FSDP2 gathers once for both passes."""
KEPT_BY_STAGE3, VECTORS = 2 * 12 * H**2, L * 2 * H + H
"""What ZeRO-3 need not gather on the way back, two blocks' matrices, and the norms, which it gathers once a step."""


def collectives_of(run: RunConfig, ranks: int) -> tuple[Collective, ...]:
    return collectives(run, run.parallel.mesh(ranks))


def models_sent(run: RunConfig, ranks: int, grad_accum: int = 1) -> float:
    """What a rank sends, in models, if a ring sent all of a tensor rather than (W - 1) / W of it."""
    return sent_bytes(run, ranks=ranks, grad_accum=grad_accum) / (4 * PARAMETERS) * ranks / (ranks - 1)


def test_the_model_is_as_large_as_reckoned() -> None:
    assert count_parameters(made("fsdp", 2).model).total == PARAMETERS


@pytest.mark.parametrize("ranks", RANKS)
def test_a_step_sends_the_model_twice_and_at_stage_3_three_times(ranks: int) -> None:
    """Rajbhandari et al. 2020, arXiv 1910.02054, section 7: 2Ψ with parameters whole, 3Ψ with them cut."""
    assert models_sent(made("fsdp", 0), ranks) == pytest.approx(2)
    assert models_sent(made("fsdp", 2), ranks) == pytest.approx(2)
    assert models_sent(made("fsdp", 3), ranks) == pytest.approx(3 - ROOT / PARAMETERS)
    assert models_sent(made("deepspeed", 0), ranks) == pytest.approx(2)
    assert models_sent(made("deepspeed", 3), ranks) == pytest.approx(3 - (KEPT_BY_STAGE3 + VECTORS) / PARAMETERS)


@pytest.mark.parametrize("ranks", RANKS)
def test_deepspeed_reduces_gradients_for_everyone_where_the_paper_scatters_them(ranks: int) -> None:
    """So that its stages 1 and 2 send Ψ more than the paper's 2Ψ."""
    for stage in (1, 2):
        assert models_sent(made("deepspeed", stage), ranks) == pytest.approx(3)


def test_one_rank_sends_nothing() -> None:
    for run in (made("fsdp", 0), made("fsdp", 3), made("deepspeed", 2), made("plain", 0)):
        assert collectives_of(run, 1) == ()
        assert sent_bytes(run, ranks=1, grad_accum=5) == 0


def test_more_ranks_send_more_each_but_never_twice_as_much_as_two() -> None:
    for run in (made("fsdp", 0), made("fsdp", 2), made("fsdp", 3), made("deepspeed", 1), made("deepspeed", 3)):
        sent = [sent_bytes(run, ranks=ranks, grad_accum=1) for ranks in RANKS]
        assert all(fewer < more for fewer, more in pairwise(sent))
        assert sent[-1] < 2 * sent[0]


@pytest.mark.parametrize(
    ("backend", "stage", "again"),
    [
        ("fsdp", 0, 0), ("fsdp", 2, 0), ("fsdp", 3, 3 - ROOT / PARAMETERS),
        ("deepspeed", 0, 0), ("deepspeed", 1, 0), ("deepspeed", 2, 2),
        ("deepspeed", 3, 3 - (KEPT_BY_STAGE3 + 2 * VECTORS) / PARAMETERS),
    ],
)  # fmt: skip
def test_what_another_micro_step_sends(backend: str, stage: int, again: float) -> None:
    run = made(backend, stage)
    for grad_accum in (1, 2, 7):
        more = models_sent(run, 8, grad_accum + 1) - models_sent(run, 8, grad_accum)
        assert more == pytest.approx(again, abs=1e-9)


def test_half_precision_halves_the_weights_and_leaves_gradients_fp32() -> None:
    for backend, stage in (("fsdp", 3), ("deepspeed", 3), ("deepspeed", 2)):
        full, half = (
            {each.kind: each.size for each in collectives_of(made(backend, stage, precision=precision), 8)}
            for precision in ("fp32", "bf16")
        )
        assert half["all_gather"] * 2 == full["all_gather"]
        assert {kind: size for kind, size in half.items() if kind != "all_gather"} == {
            kind: size for kind, size in full.items() if kind != "all_gather"
        }


def test_rows_that_ranks_do_not_divide_are_padded() -> None:
    """FSDP2 gives each rank ⌈rows / W⌉ rows, DeepSpeed ⌈elements / W⌉ elements."""
    for backend in ("fsdp", "deepspeed"):
        gathered = next(each for each in collectives_of(made(backend, 3), 7) if each.kind == "all_gather")
        assert PARAMETERS < gathered.size / 4 < 1.05 * PARAMETERS
        assert gathered.size % (4 * 7) == 0


def test_deepspeed_hides_no_gathering_after_the_update() -> None:
    for stage in (1, 2):
        (gather,) = (each for each in collectives_of(made("deepspeed", stage), 8) if each.kind == "all_gather")
        assert gather.behind == EXPOSED
    for backend in ("fsdp", "deepspeed"):
        exposed = sum(each.size for each in collectives_of(made(backend, 3), 8) if each.behind == EXPOSED)
        assert exposed == (4 * VECTORS if backend == "deepspeed" else 0)


def test_stage_1_reduces_behind_the_backward_pass_unless_in_bf16_on_the_card() -> None:
    def reduced_behind(**flags: Any) -> str:
        run = made("deepspeed", 1, **flags)
        return next(each.behind for each in collectives_of(run, 8) if each.kind == "all_reduce")

    assert reduced_behind(precision="bf16") == EXPOSED
    assert reduced_behind(precision="fp16") == reduced_behind(precision="bf16", offload="optimizer") != EXPOSED


@pytest.mark.parametrize("stage", [2, 3])
def test_replicas_exchange_nothing_but_their_shards_gradients_once_a_step(stage: int) -> None:
    alone, replicated = collectives_of(made("fsdp", stage), 8), collectives_of(made("fsdp", stage, shard_size=8), 64)
    assert [each._replace(over=ALL) for each in replicated if each.over == SHARDS] == list(alone)
    (between,) = (each for each in replicated if each.over == REPLICAS)
    assert (between.kind, between.ranks, between.size) == ("all_reduce", 8, 4 * PARAMETERS // 8)
    assert between.when == LAST


def test_offloaded_gradients_are_summed_over_replicas_in_every_micro_step() -> None:
    run = made("fsdp", 3, shard_size=8, offload="all")
    assert [each.when for each in collectives_of(run, 64) if each.over == REPLICAS] == [EVERY]


def test_muon_stays_inside_a_replica() -> None:
    sends = [
        each
        for each in collectives_of(made("fsdp", 3, optimizer="muon", shard_size=4), 64)
        if each.kind == "all_to_all"
    ]
    assert {(each.ranks, each.over) for each in sends} == {(4, SHARDS)}


def test_a_second_copy_leaves_one_gathering_over_all_ranks_in_a_step() -> None:
    run, alone = made("deepspeed", 3, shard_size=8), made("deepspeed", 3)

    def gathered(run: RunConfig, over: str, grad_accum: int) -> int:
        return sum(
            each.size * each.times(grad_accum)
            for each in collectives_of(run, 64)
            if (each.kind, each.over, each.behind == EXPOSED) == ("all_gather", over, False)
        )

    once = 4 * (PARAMETERS - VECTORS)
    for grad_accum in (1, 2, 7):
        assert gathered(run, ALL, grad_accum) == once
        assert gathered(run, SHARDS, grad_accum) == gathered(alone, ALL, grad_accum) - once


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_muon_sends_the_blocks_matrices_once_more(ranks: int) -> None:
    """Whole results are gathered; or rows, of which each rank has one in W, go to the matrices' owners and come back."""
    matrices = 4 * L * 12 * H**2  # bytes; 2, 4 and 8 ranks divide 24 layers
    for backend, stage, expected in (
        ("fsdp", 0, matrices),
        ("deepspeed", 0, matrices),
        ("fsdp", 2, 2 * matrices / ranks),
    ):
        muon, adamw = (
            sent_bytes(made(backend, stage, optimizer=name), ranks=ranks, grad_accum=3) for name in ("muon", "adamw")
        )
        assert muon - adamw == pytest.approx(expected * (ranks - 1) / ranks)
    sends = [each for each in collectives_of(made("fsdp", 3, optimizer="muon"), ranks) if each.kind == "all_to_all"]
    assert len(sends) == 4
    assert {(each.behind, each.messages) for each in sends} == {(EXPOSED, 2)}
