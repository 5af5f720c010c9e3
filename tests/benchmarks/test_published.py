"""The planner beside published runs of other trainers: whether they fit, and how far off their times are predicted."""

from functools import cache
from statistics import fmean
from typing import Any

import pytest

from benchmarks.fit_throughput import cross_validate, error, fit, in_their_place, shares_of
from benchmarks.published import CARDS, PublishedRun, fused_loss, read_published
from benchmarks.suite.rows import ROOT
from scalegpt.planner.time.rates import SHARES

PUBLISHED = ROOT.parent / "shared" / "data" / "published_runs.csv"

with_runs = pytest.mark.skipif(not PUBLISHED.is_file(), reason=f"the table of published runs is not at {PUBLISHED}")

ROW = {
    "model": "mpt-125m", "n_layer": "12", "n_embd": "768", "n_head": "12", "vocab_size": "50432", "block_size": "2048",
    "gpu": "a100_40gb", "gpus": "16", "micro_batch": "8", "grad_accum": "4", "precision": "bf16", "mp_mode": "DEFAULT",
    "sharding": "FULL_SHARD", "activation_checkpointing": "True", "num_params": "125311488",
    "tokens_per_s_per_gpu": "20000",
}  # fmt: skip
"""A row as the table has them; its speed is made up."""


def parsed(**columns: str) -> PublishedRun:
    return PublishedRun.parse({**ROW, **columns})


@cache
def runs() -> list[PublishedRun]:
    """The rows whose matmuls are not in fp8."""
    return [run for run in read_published(PUBLISHED) if not run.fp8]


# --- the published runs ----------------------------------------------------------------------------------------------


@with_runs
def test_what_ran_fits_with_the_chunked_loss() -> None:
    plans = [run.plan() for run in runs()]
    assert len(plans) > 100
    assert {plan.run.train.loss for plan in plans} == {"chunked"}
    too_large = [(plan.run.name, plan.machine.name, plan.missing_bytes) for plan in plans if not plan.fits]
    assert len(too_large) <= 0.02 * len(plans), too_large


@with_runs
def test_a_published_run_that_fits_is_not_predicted_to_fill_nothing() -> None:
    """The fullest of them came near the limit, so that a prediction that fits everything would show."""
    fullest = max(plan.total_bytes / (plan.machine.usable_bytes or 1) for plan in (run.plan() for run in runs()))
    assert fullest > 0.8


@with_runs
def test_runs_left_out_of_the_fit_are_predicted_within_fifteen_percent() -> None:
    errors = cross_validate(runs())
    assert fmean(map(abs, errors)) < 0.15
    assert abs(fmean(errors)) < 0.05
    for gpu in CARDS:
        assert fmean(abs(value) for run, value in zip(runs(), errors, strict=True) if run.gpu == gpu) < 0.15


@with_runs
def test_the_shares_in_force_predict_the_runs() -> None:
    errors = [run.predicted() / run.tokens_per_second - 1 for run in runs()]
    assert fmean(map(abs, errors)) < 0.15


@with_runs
def test_the_document_counts_the_same_runs() -> None:
    assert f"of the {len(runs())} runs fit" in in_their_place(runs())


# --- reading, and fitting --------------------------------------------------------------------------------------------


def test_a_row_is_read_as_it_ran() -> None:
    run = parsed()
    assert (run.machine.gpus, run.machine.nodes, run.batch.ranks, run.batch.grad_accum) == (8, 2, 16, 4)
    assert run.batch.tokens == 16 * 8 * 4 * 2048
    assert (run.run.parallel.backend, run.run.parallel.stage, run.run.train.recompute) == ("fsdp", 3, "full")
    assert not run.pure
    assert not run.fp8
    other = parsed(sharding="SHARD_GRAD_OP", activation_checkpointing="False", mp_mode="PURE", precision="amp_fp8")
    assert (other.run.parallel.stage, other.run.train.recompute, other.pure, other.fp8) == (2, "none", True, True)


def test_their_loss_moves_less_than_ours_and_computes_as_much() -> None:
    run = parsed()
    theirs, ours = run.time(), run.plan().time
    assert theirs.parts["loss"] < ours.parts["loss"]
    assert fused_loss(run.run, 8).flops == 6 * 8 * 2048 * 50432 * 768


def test_states_in_bf16_send_less() -> None:
    assert parsed(mp_mode="PURE").predicted() > parsed().predicted()


def test_a_fit_finds_the_shares_that_made_the_runs() -> None:
    """Runs whose speeds the model itself made with other shares give those shares back."""
    made = {
        "matmul 8.0": 0.7,
        "matmul 9.0": 0.6,
        "attention 8.0": 0.3,
        "attention 9.0": 0.2,
        "memory": 0.5,
        "interference": 0.1,
    }
    rows: list[dict[str, Any]] = [
        {"gpu": gpu, "n_embd": width, "block_size": block, "gpus": gpus, "micro_batch": "2"}
        for gpu in ("a100_40gb", "h100_80gb")
        for width, block in (("768", "512"), ("2304", "4096"), ("4608", "16384"))
        for gpus in ("8", "64")
    ]
    runs_made = []
    for row in rows:
        run = parsed(**row)
        assert run.machine.card is not None
        speed = run.predicted(shares_of(made, run.machine.card.capability))
        runs_made.append(parsed(**row, tokens_per_s_per_gpu=repr(speed)))
    assert all(abs(error(run, made)) < 1e-9 for run in runs_made)
    found = fit(runs_made)
    assert max(abs(error(run, found)) for run in runs_made) < 0.02
    for name in ("matmul 8.0", "matmul 9.0"):
        assert found[name] == pytest.approx(made[name], rel=0.05)
    assert made["matmul 8.0"] != SHARES["8.0"].matmul.value
