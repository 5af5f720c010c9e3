"""The planner beside published runs of other trainers: whether they fit, and how far off their times are predicted."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import fmean, median

import pytest

from benchmarks.fit_throughput import (
    PRIORS,
    Fit,
    cross_validate,
    fit,
    held_by_ranges_of_others,
    leave_out,
    range_of,
)
from benchmarks.published import PublishedRun, attention_with_scores, fused_loss, read_others, read_published
from benchmarks.suite.rows import ROOT
from benchmarks.tables.fit import LARGE, in_their_place, left_out, scaling_table
from benchmarks.trainers import FULL, FUSED, TRAINERS, UNFIT, trainer_of
from scalegpt.architecture.operations import ATTENTION
from scalegpt.planner.plan import Estimator
from scalegpt.planner.time.rates import DISPATCH, FASTEST, FILL, FITTED_ON, SHARES, SLOWEST, speed_range
from scalegpt.planner.time.work import LOSS, RECOMPUTE

DATA = ROOT.parent / "shared" / "data"
FOUNDRY, OTHERS = DATA / "published_runs.csv", DATA / "published_runs_other_trainers.csv"

with_runs = pytest.mark.skipif(not OTHERS.is_file(), reason=f"the table of published runs is not at {OTHERS}")

ROW = {
    "model": "mpt-125m", "n_layer": "12", "n_embd": "768", "n_head": "12", "vocab_size": "50432", "block_size": "2048",
    "gpu": "a100_40gb", "gpus": "16", "micro_batch": "8", "grad_accum": "4", "precision": "bf16", "mp_mode": "DEFAULT",
    "sharding": "FULL_SHARD", "activation_checkpointing": "True", "num_params": "125311488",
    "tokens_per_s_per_gpu": "20000",
}  # fmt: skip
"""A row as llm-foundry's table has them; its speed is made up."""

OTHER = {
    "source": "karpathy/llm.c:scripts", "model": "GPT-2", "params": "", "n_layer": "12", "hidden": "768", "heads": "12",
    "kv_heads": "12", "ffn": "3072", "vocab": "50304", "seq": "1024", "gpus": "8", "gpu_type": "A100-80GB",
    "parallelism": "DP8", "micro_batch": "16", "global_batch": "512", "recompute": "none", "precision": "bf16",
    "tokens_per_s_per_gpu": "200000", "mfu_pct": "", "peak_memory_GiB": "", "step_time_s": "", "memory_kind": "",
    "grade": "A", "notes": "",
}  # fmt: skip
"""A row as the table of other trainers has them; its speed is made up."""

NUMBERS = {name: prior.value for name, prior in PRIORS.items()}


def written(path: Path, rows: list[Mapping[str, str]]) -> Path:
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def foundry(folder: Path, **columns: str) -> PublishedRun:
    (run,) = read_published(written(folder / "foundry.csv", [{**ROW, **columns}]))
    return run


def other(folder: Path, **columns: str) -> PublishedRun:
    (run,), left = read_others(written(folder / "others.csv", [{**OTHER, **columns}]))
    assert not left
    return run


@cache
def runs() -> tuple[PublishedRun, ...]:
    """The rows of both tables that no rule leaves out."""
    return (*read_published(FOUNDRY), *read_others(OTHERS)[0])


@cache
def unseen() -> tuple[float, ...]:
    return tuple(leave_out(runs()))


# --- the published runs ----------------------------------------------------------------------------------------------


@with_runs
def test_what_ran_fits_with_its_own_loss_and_states() -> None:
    too_large = [
        (run.trainer.name, run.model, run.total_bytes, run.machine.usable_bytes) for run in runs() if not run.fits
    ]
    assert not too_large
    assert len(runs()) > 240


@with_runs
def test_what_ran_elsewhere_fits_in_ours_with_the_chunked_loss() -> None:
    plans = [run.plan for run in read_published(FOUNDRY)]
    assert len(plans) > 100
    assert {plan.run.train.loss for plan in plans} == {"chunked"}
    assert all(plan.fits for plan in plans)


@with_runs
def test_a_published_run_that_fits_is_not_predicted_to_fill_nothing() -> None:
    """The fullest of them came near the limit, so that a prediction that fits everything would show."""
    assert max(run.total_bytes / (run.machine.usable_bytes or 1) for run in runs()) > 0.9


@with_runs
@pytest.mark.slow
def test_trainers_left_out_of_the_fit_are_predicted_within_fifteen_percent() -> None:
    errors = [abs(error) for error in unseen()]
    assert median(errors) < 0.15
    assert fmean(errors) < 0.20


@with_runs
@pytest.mark.slow
def test_runs_on_16_gpus_and_more_are_predicted_without_their_trainer() -> None:
    errors = [abs(error) for run, error in zip(runs(), unseen(), strict=True) if run.batch.ranks >= LARGE]
    assert len(errors) >= 45
    assert fmean(errors) < 0.15


@with_runs
@pytest.mark.slow
def test_scaling_from_8_to_512_gpus_is_predicted_within_ten_points() -> None:
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in scaling_table(runs(), unseen()).splitlines()
        if "%" in line
    ]
    off = {tuple(row[:4]): abs(float(row[-1])) for row in rows if row[-1][0] in "+-"}
    assert off["llm-foundry", "H100 SXM", "mpt-13b", "8 to 512"] < 10
    assert len(off) >= 10
    assert fmean(off.values()) < 5


@with_runs
@pytest.mark.slow
def test_the_fitted_numbers_are_those_of_the_time_model() -> None:
    numbers = fit(runs()).numbers
    for capability in FITTED_ON:
        shares = SHARES[capability]
        for name in ("matmul", "attention"):
            assert getattr(shares, name).value == pytest.approx(numbers[f"{name} {capability}"], rel=0.003)
        for name in ("memory", "interference", "straggling"):
            assert getattr(shares, name).value == pytest.approx(numbers[name], rel=0.01)
    assert FILL.value == pytest.approx(numbers["fill"], rel=0.003)
    assert DISPATCH.value == pytest.approx(numbers["dispatch"], rel=0.003)


@with_runs
@pytest.mark.slow
def test_llm_foundrys_runs_are_still_predicted_within_five_percent() -> None:
    errors = [
        abs(error)
        for run, error in zip(runs(), cross_validate(runs()), strict=True)
        if "llm-foundry" in run.trainer.name
    ]
    assert len(errors) > 100
    assert fmean(errors) < 0.05


@with_runs
@pytest.mark.slow
def test_the_stated_range_holds_nine_of_ten_runs() -> None:
    held = []
    for run, error in zip(runs(), unseen(), strict=True):
        assert run.machine.card is not None
        low, high = speed_range(run.machine.card)
        held.append(low <= 1 / (1 + error) <= high)
    assert fmean(held) >= 0.9
    fitted = [
        (run, error)
        for run, error in zip(runs(), unseen(), strict=True)
        if run.machine.card and run.machine.card.capability in FITTED_ON
    ]
    assert held_by_ranges_of_others(*zip(*fitted, strict=True)) >= 0.9
    found = range_of(*zip(*fitted, strict=True))
    assert (SLOWEST.value, FASTEST.value) == pytest.approx(found, abs=0.05)
    assert SLOWEST.value <= found.slowest < found.fastest <= FASTEST.value


@with_runs
def test_every_row_is_predicted_or_left_out_by_a_rule() -> None:
    found, left = read_others(OTHERS)
    rows = OTHERS.read_text(encoding="utf-8").strip().splitlines()[1:]
    assert len(found) + sum(map(len, left.values())) == len(rows)
    assert set(left) <= {rule.reason for rule in UNFIT}
    assert all(row in left_out(left) for rows_of in left.values() for row in rows_of)


@with_runs
def test_the_document_counts_the_same_runs() -> None:
    assert "of the 105 runs fit" in in_their_place(read_published(FOUNDRY))


# --- reading ---------------------------------------------------------------------------------------------------------


def test_a_row_of_llm_foundry_is_read_as_it_ran(tmp_path: Path) -> None:
    run = foundry(tmp_path)
    assert (run.machine.gpus, run.machine.nodes, run.batch.ranks, run.batch.grad_accum) == (8, 2, 16, 4)
    assert run.batch.tokens == 16 * 8 * 4 * 2048
    assert (run.run.parallel.backend, run.run.parallel.stage, run.run.train.recompute) == ("fsdp", 3, "full")
    assert run.trainer.state_bytes == 16
    pure = foundry(tmp_path, sharding="SHARD_GRAD_OP", activation_checkpointing="False", mp_mode="PURE")
    assert (pure.run.parallel.stage, pure.run.train.recompute, pure.trainer.state_bytes) == (2, "none", 8)
    assert not read_published(written(tmp_path / "fp8.csv", [{**ROW, "precision": "amp_fp8"}]))


def test_a_row_of_another_trainer_is_read_as_it_ran(tmp_path: Path) -> None:
    run = other(tmp_path)
    assert (run.trainer.name, run.trainer.compiled, run.run.train.compile) == ("llm.c", True, "on")
    assert (run.batch.ranks, run.batch.grad_accum, run.machine.name) == (8, 4, "A100 80GB")
    assert (run.run.parallel.backend, run.run.parallel.stage, run.run.train.recompute) == ("fsdp", 2, "none")
    alone = other(
        tmp_path, gpus="1", parallelism="single", global_batch="16", peak_memory_GiB="9.5", memory_kind="reserved"
    )
    assert (alone.run.parallel.backend, alone.batch.grad_accum) == ("plain", 1)
    assert (alone.peak_gib, alone.peak_kind) == (9.5, "reserved")


def test_a_model_with_modern_parts_is_read_with_all_of_them(tmp_path: Path) -> None:
    run = other(
        tmp_path, source="pytorch/torchtitan:docs", heads="12", kv_heads="4", ffn="2048", notes="eager; authors"
    )
    model = run.run.model
    assert (model.n_head, model.kv_heads, model.inner_width, model.is_gated) == (12, 4, 2048, True)
    assert (model.norm, model.position, model.tie_head) == ("rmsnorm", "rope", False)
    assert not run.trainer.compiled
    assert other(tmp_path, source="pytorch/torchtitan:docs", notes="compile; authors").trainer.compiled


@pytest.mark.parametrize(
    ("text", "recompute", "share"),
    [
        ("none", "none", 1), ("none (HF default)", "none", 1), ("full", "full", 1), ("selective (recipe)", "selective", 1),
        ("not stated", "full", 1), ("selective-op", "full", 0.5),
    ],
)  # fmt: skip
def test_what_is_recomputed_is_read(tmp_path: Path, text: str, recompute: str, share: float) -> None:
    run = other(tmp_path, recompute=text)
    assert (run.run.train.recompute, run.recomputed) == (recompute, share)


@pytest.mark.parametrize(
    "columns",
    [
        {"parallelism": "TP4 FSDP2"}, {"source": "karpathy/nanochat:dev"}, {"micro_batch": ""},
        {"notes": "variable length"}, {"tokens_per_s_per_gpu": ""}, {"source": "KellerJordan/modded-nanogpt:SOAP"},
    ],
)  # fmt: skip
def test_what_the_planner_cannot_express_is_left_out_by_a_rule(tmp_path: Path, columns: dict[str, str]) -> None:
    found, left = read_others(written(tmp_path / "others.csv", [{**OTHER, **columns}]))
    assert not found
    ((reason, rows),) = left.items()
    assert reason in {rule.reason for rule in UNFIT}
    assert len(rows) == 1


def test_a_trainer_that_nobody_described_is_not_guessed() -> None:
    with pytest.raises(KeyError, match="someone/else"):
        trainer_of("someone/else:README.md")


def test_each_trainer_has_a_reason() -> None:
    assert all(each.why.endswith(".") and each.loss in {FULL, FUSED} for each in TRAINERS)
    assert len({each.name for each in TRAINERS}) == len(TRAINERS)


# --- what differs in their trainers ----------------------------------------------------------------------------------


def test_their_loss_moves_less_than_ours_and_computes_as_much(tmp_path: Path) -> None:
    run = foundry(tmp_path)
    ours = run.plan.time.parts["loss"]
    fused = run.step.work.forward[LOSS]
    assert fused == fused_loss(run.run)
    assert fused.flops == 6 * 8 * 2048 * 50432 * 768
    assert run.step.time(Estimator(run.machine).rates(run.run)).parts["loss"] < ours


def test_states_in_bf16_send_less_and_hold_less(tmp_path: Path) -> None:
    whole, pure = foundry(tmp_path), foundry(tmp_path, mp_mode="PURE")
    assert Fit(NUMBERS).predicted(pure) > Fit(NUMBERS).predicted(whole)
    assert pure.peak_bytes < whole.peak_bytes


def test_scores_in_memory_compute_what_is_masked_and_hold_it(tmp_path: Path) -> None:
    run = other(tmp_path, source="VIA-Research/vTrain:data", micro_batch="2")
    forward, backward = attention_with_scores(run.run)
    assert forward.flops == 4 * 2 * 1024**2 * 768 * 12
    assert backward.flops == 2 * forward.flops
    assert all(load.attention == 0 for loads in run.step.work for load in loads.values())
    flash = replace(run, trainer=replace(run.trainer, scores=False))
    assert flash.step.work.forward[ATTENTION].attention > 0
    assert run.peak_bytes - flash.peak_bytes == 5 * 2 * 12 * 1024**2 * 12


def test_half_of_the_recompute_takes_half_of_the_time(tmp_path: Path) -> None:
    half, full = (other(tmp_path, recompute=text).step.work.backward[RECOMPUTE] for text in ("selective-op", "full"))
    assert half == full.times(0.5)
    peaks = [other(tmp_path, recompute=text).peak_bytes for text in ("full", "selective-op", "none")]
    assert peaks == sorted(peaks)
    assert len(set(peaks)) == 3


# --- the fit ---------------------------------------------------------------------------------------------------------

MADE = {**NUMBERS, "matmul 8.0": 0.7, "matmul 9.0": 0.6, "memory": 0.5, "fill": 500.0, "dispatch": 60e-6}


def made_runs(folder: Path, made: Fit) -> list[PublishedRun]:
    """Runs of two trainers whose speeds the model itself made."""
    found = []
    for width, block in (("768", "512"), ("2304", "4096"), ("4608", "16384")):
        for gpu, card in (("a100_40gb", "A100-80GB"), ("h100_80gb", "H100-80GB")):
            found.append(foundry(folder, gpu=gpu, n_embd=width, block_size=block, micro_batch="2"))
            heads = {"hidden": width, "ffn": str(4 * int(width)), "seq": block}
            found += [other(folder, gpu_type=card, micro_batch=batch, **heads) for batch in ("1", "8")]
    return [replace(run, tokens_per_second=made.predicted(run)) for run in found]


def test_a_fit_finds_the_numbers_that_made_the_runs(tmp_path: Path) -> None:
    made = Fit(MADE, {"llm-foundry": 0.9, "llm.c": 1.1})
    found = fit(made_runs(tmp_path, made))
    assert max(abs(found.error(run)) for run in made_runs(tmp_path, made)) < 0.02
    assert found.efficiency["llm.c"] / found.efficiency["llm-foundry"] == pytest.approx(1.1 / 0.9, rel=0.05)
    assert made.numbers["matmul 8.0"] != SHARES["8.0"].matmul.value


def test_a_trainer_that_is_left_out_is_predicted_with_the_efficiency_of_the_typical_one(tmp_path: Path) -> None:
    made = Fit(NUMBERS, {"llm-foundry": 1.0, "llm.c": 0.5})
    runs_made = made_runs(tmp_path, made)
    errors = zip(runs_made, leave_out(runs_made), strict=True)
    assert all(error == pytest.approx(1.0, abs=0.3) for run, error in errors if run.trainer.name == "llm.c")


def test_one_run_that_is_far_off_does_not_decide(tmp_path: Path) -> None:
    runs_made = made_runs(tmp_path, Fit(NUMBERS))
    runs_made[0] = replace(runs_made[0], tokens_per_second=3 * runs_made[0].tokens_per_second)
    found = fit(runs_made)
    assert max(abs(found.error(run)) for run in runs_made[1:]) < 0.1


def test_a_range_counts_trainers_not_runs(tmp_path: Path) -> None:
    one, many = foundry(tmp_path), other(tmp_path)
    few, more = (range_of([one, *[many] * count], [0.25, *[0.0] * count]) for count in (1, 99))
    assert few == more
    assert few.holds(0.0)
    assert few.holds(0.25)
    assert not few.holds(2.0)


def test_a_range_is_as_wide_as_trainers_and_their_runs_differ(tmp_path: Path) -> None:
    one, two = foundry(tmp_path), other(tmp_path)
    alike = range_of([one, two], [0.1, 0.1])
    assert alike.slowest == pytest.approx(alike.fastest) == pytest.approx(1 / 1.1)
    apart = range_of([one, two], [0.1, -0.1])
    scattered = range_of([one, one, two, two], [0.2, 0.0, -0.2, 0.0])
    assert alike.fastest - alike.slowest < apart.fastest - apart.slowest < scattered.fastest - scattered.slowest
