"""``gpu_suite.py choice`` as far as a machine without a GPU can hold it: what is asked, in which order, what becomes of it.

A card is stood in for by a law that says of each trial whether there is room, and how long it takes.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from benchmarks.suite import choice_report
from benchmarks.suite.bisection import Facts, largest
from benchmarks.suite.choice_rows import (
    EMULATED,
    PRESETS,
    STEPS,
    Cell,
    at_micro_batch,
    cells,
    emulated_sizes,
    shortened,
    shortest,
)
from benchmarks.suite.choice_trials import Trials, speed
from benchmarks.suite.frame import ROOT
from scalegpt.config.presets import resolve
from scalegpt.config.train import RECOMPUTE
from scalegpt.hardware.gpus import GIB, find_card
from scalegpt.hardware.machine import Machine
from scalegpt.planner.batches import BatchPlan
from scalegpt.planner.plan import Plan, make_plan

SCRIPT = ROOT / "benchmarks" / "gpu_suite.py"

Values = dict[str, Any]


def suite(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), "choice", *words], capture_output=True, text=True, timeout=280)


@cache
def planned() -> tuple[Cell, ...]:
    return tuple(cells(Machine.with_card(find_card("H100 SXM")), compiled=True))


def chosen(cell: Cell) -> Plan:
    assert cell.found.best is not None
    return cell.found.best


# --- the command -----------------------------------------------------------------------------------------------------


def test_without_a_gpu_it_says_so_in_a_line_and_exits_3() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    done = suite()
    assert (done.returncode, done.stdout) == (3, "")
    assert len(done.stderr.splitlines()) == 1
    assert "no CUDA device" in done.stderr


def test_a_name_that_no_row_has_exits_2() -> None:
    done = suite("--dry", "--only", "weather")
    assert done.returncode == 2
    assert done.stderr == "gpu_suite choice: error: --only weather: found in no name, such as '150M on 8 GB'\n"


@pytest.mark.slow
def test_dry_takes_what_is_chosen_through_real_steps() -> None:
    """These rows hold torch's and DeepSpeed's backends, offload and every recompute, as is asserted."""
    pattern = "^(150M_1024|250M_1024|500M_1024) on (8|10) GB$"
    before = sorted((ROOT / "benchmarks").rglob("*.json"))
    done = suite("--dry", "--only", pattern)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert sum(", chosen: " in line for line in lines) == 6
    assert any(", alternative: " in line for line in lines)
    assert all(line.startswith("stepped ") for line in lines if " GB, " in line), done.stdout
    for words in (" plain ", " deepspeed ", "offload=", *(f"recompute={kind}" for kind in RECOMPUTE)):
        assert words in done.stdout, words
    assert "6 stepped" in lines
    assert sorted((ROOT / "benchmarks").rglob("*.json")) == before


# --- bisection -------------------------------------------------------------------------------------------------------


def found_by(sizes: list[int], start: int, limit: int) -> tuple[int, list[int]]:
    """What the search finds where all up to the limit run, and what it tried."""
    search = largest(sizes, start, ran=start <= limit)
    tried: list[int] = []
    try:
        size = next(search)
        while True:
            tried.append(size)
            size = search.send(size <= limit)
    except StopIteration as end:
        return end.value, tried


@pytest.mark.parametrize("sizes", [[1, 2, 3, 4, 6, 8, 12, 24], [1], [1, 5], list(range(1, 40))])
def test_bisection_finds_the_largest_from_wherever_it_starts(sizes: list[int]) -> None:
    for limit in range(sizes[-1] + 2):
        for start in [*sizes, sizes[-1] + 1][: None if limit <= sizes[-1] else -1]:
            best, tried = found_by(sizes, start, limit)
            assert best == max((size for size in sizes if size <= limit), default=0)
            assert len(set(tried)) == len(tried) <= len(sizes).bit_length() + 1
            assert start not in tried


def test_a_prediction_that_is_right_costs_one_trial() -> None:
    assert found_by([1, 2, 4, 8, 16, 32, 64], 8, 8) == (8, [16])


def test_what_follows_from_other_trials() -> None:
    facts = Facts()
    facts.add(("a",), 8, 100, ran=True, where="there")
    facts.add(("a",), 16, 100, ran=False, where="here")
    assert facts.outcome(("a",), 4, 120) == (True, "there")
    assert facts.outcome(("a",), 32, 80) == (False, "here")
    assert facts.outcome(("a",), 8, 99) is None
    assert facts.outcome(("a",), 16, 101) is None
    assert facts.outcome(("b",), 4, 120) is None


# --- what is asked ---------------------------------------------------------------------------------------------------


def test_sizes_are_those_of_real_cards_up_to_the_one_at_hand() -> None:
    every = [8, 10, 12, 16, 24, 40, 80]
    assert [find_card(name).gb for name in EMULATED] == every
    assert list(emulated_sizes(find_card("H200").usable_bytes)) == every
    assert list(emulated_sizes(find_card("RTX 4090").usable_bytes)) == every[:5]
    assert list(emulated_sizes(6 * GIB)) == []


def test_a_card_of_nearly_the_same_size_is_used_whole() -> None:
    h100 = find_card("H100 SXM").usable_bytes
    assert find_card("A100 80GB").usable_bytes > h100
    assert emulated_sizes(h100)[80] == h100


def test_every_pair_comes_once_and_the_first_round_has_all_sizes_and_presets() -> None:
    assert len({cell.name for cell in planned()}) == len(planned()) == 7 * len(PRESETS)
    for order in range(len(PRESETS)):
        round_ = [cell for cell in planned() if cell.order == order]
        assert {cell.preset for cell in round_} == set(PRESETS)
        assert len({cell.gb for cell in round_}) == 7
    assert [cell.order for cell in planned()] == sorted(cell.order for cell in planned())


def test_shortened_plans_hold_as_much_as_the_plan_itself() -> None:
    """Else running in twenty short steps would not show that the plan runs."""
    for cell in planned():
        plan = chosen(cell)
        for short in (shortened(plan, STEPS), shortest(plan)):
            assert short.peak_bytes == plan.peak_bytes, cell.name
            assert min(2, plan.batch.grad_accum) <= short.batch.grad_accum <= plan.batch.grad_accum
            assert short.batch.micro_batch == plan.batch.micro_batch


def test_the_next_best_fit_and_come_in_order() -> None:
    for cell in planned()[:7]:
        plans = cell.alternatives
        assert 2 <= len(plans) <= 3
        assert [plan.seconds for plan in plans] == sorted(plan.seconds for plan in plans)
        assert all(plan.total_bytes <= cell.question.limit for plan in plans)
        assert any(plan.run.parallel != chosen(cell).run.parallel for plan in plans)


def test_without_compiling_the_planner_reckons_with_that() -> None:
    machine = Machine.with_card(find_card("RTX 3080"))
    eager = cells(machine, compiled=False)[0]
    assert chosen(eager).run.train.compile == "off"
    assert chosen(eager).seconds > chosen(cells(machine, compiled=True)[0]).seconds


# --- what becomes of it ----------------------------------------------------------------------------------------------


def planned_again(job: Values, cell: Cell) -> Plan:
    """The plan that a job describes."""
    layout = {"backend": job["backend"], "zero_stage": job["zero_stage"], "ds_config": None}
    run = resolve(preset=job["preset"], flags={**layout, **job["flags"], "precision": "bf16"})
    batch = BatchPlan(run.train.micro_batch, job["grad_accum"], 1, run.model.block_size)
    return make_plan(run, cell.question.machine, batch)


def law(more: float = 1.0, slower: float = 1.0) -> Callable[[Values, Plan], Values]:
    """A card on which everything takes so many times the predicted memory and time."""

    def answer(job: Values, plan: Plan) -> Values:
        if plan.total_bytes * more > job["usable_bytes"]:
            return {"outcome": "out of memory", "reason": "no room", "outside_bytes": 2**29, "notes": []}
        micro = slower * plan.seconds / plan.batch.grad_accum
        measured = {
            "step_seconds": slower * plan.seconds,
            "micro_seconds": micro if plan.batch.grad_accum > 1 else None,
            "reserved_bytes": plan.reserved_bytes,
            "allocation_retries": 0,
            "steps": job["steps"],
        }
        cap = job["usable_bytes"] - 2**29
        return {"outcome": "ran", "measured": measured, "outside_bytes": 2**29, "cap_bytes": cap, "notes": []}

    return answer


def carried_out(kept: list[Cell], answer: Callable[[Values, Plan], Values]) -> tuple[list[Values], list[Values]]:
    """All rows, and all jobs."""
    trials = Trials(kept, dry=False)
    by_name = {cell.name: cell for cell in kept}
    jobs: list[Values] = []
    for _, kind in trials.kinds():
        for job in kind:
            jobs.append(job)
            trials.take(job, answer(job, planned_again(job, by_name[job["cell"]])))
    return trials.rows, jobs


@cache
def as_predicted() -> tuple[list[Values], list[Values]]:
    return carried_out(list(planned()[:21]), law())


def test_the_largest_micro_batch_is_the_one_that_brute_force_finds() -> None:
    rows, _ = as_predicted()
    for cell, row in zip(planned()[:21], rows, strict=True):
        plan = chosen(cell)
        running = [size for size in cell.sizes if at_micro_batch(plan, size).total_bytes <= cell.usable]
        assert row["outcome"] == "ran"
        assert row["largest"]["micro_batch"] == max(running), cell.name
        assert row["largest"]["ratio"] == plan.batch.micro_batch / max(running)
        single = row.get("single_sequences")
        if single is not None:
            assert max(running) <= single["micro_batch"] < row["largest"]["next"]
            above = at_micro_batch(plan, single["micro_batch"] + 1)
            assert single["micro_batch"] + 1 == row["largest"]["next"] or above.total_bytes > cell.usable


def test_the_chosen_plan_takes_twenty_steps_and_trials_of_room_two() -> None:
    rows, jobs = as_predicted()
    assert {job["steps"] for job in jobs if job["what"] == "chosen"} == {20}
    assert {job["steps"] for job in jobs if job["what"] == "is there room?"} == {2}
    assert all(job["grad_accum"] >= 2 for job in jobs if job["what"] == "chosen")
    names = [(job["name"], job["cell"]) for job in jobs if job["what"] == "is there room?"]
    assert len(set(names)) == len(names)
    assert len(rows) == 21


def test_only_the_first_job_of_a_backend_measures_what_lies_outside() -> None:
    _, jobs = as_predicted()
    first: dict[str, int | None] = {}
    for job in jobs:
        if job["backend"] in first:
            assert job["outside_bytes"] == 2**29
        first.setdefault(job["backend"], job["outside_bytes"])
    assert set(first.values()) == {None}


def test_deepspeed_comes_apart_from_the_others() -> None:
    _, jobs = as_predicted()
    kinds = [job["backend"] == "deepspeed" for job in jobs]
    assert kinds == sorted(kinds)
    assert True in kinds


def test_running_out_of_memory_breaks_the_limit_and_smaller_ones_are_tried() -> None:
    rows, _ = carried_out(list(planned()[:7]), law(more=1.3))
    over = [row for row in rows if row["outcome"] == "out of memory"]
    assert over
    for row in over:
        assert row["largest"]["micro_batch"] < row["chosen"]["micro_batch"]
    summary = choice_report.summarise(rows)
    assert summary["plans"]["out_of_memory"] == [row["name"] for row in over]
    assert not summary["plans"]["keeps_limits"]


def test_memory_left_on_the_table_breaks_the_limit() -> None:
    rows, _ = carried_out(list(planned()[:7]), law(more=0.4))
    summary = choice_report.summarise(rows)
    assert summary["largest"]["least_ratio"] <= 0.5
    assert not summary["largest"]["keeps_limits"]
    assert summary["plans"]["keeps_limits"]


@pytest.mark.parametrize(("slower", "kept"), [(1.0, True), (1.1, True), (1.2, False), (0.8, False)])
def test_errors_of_tokens_per_second_are_signed_and_limited(slower: float, kept: bool) -> None:
    plan = chosen(planned()[6])
    row = {"name": "x", "speed": speed(plan, plan, {"step_seconds": slower * plan.seconds, "micro_seconds": None})}
    assert row["speed"]["error"] == pytest.approx(slower - 1)
    summary = choice_report.summarise([{**row, "outcome": "ran", "chosen": {"name": "x"}, "alternatives": []}])
    assert summary["speed"]["keeps_limits"] is kept
    assert summary["speed"]["worst_error"] == pytest.approx(slower - 1)


def test_what_was_not_trained_of_a_step_is_made_up_by_micro_steps() -> None:
    plan = chosen(planned()[0])
    short = shortest(plan)
    assert plan.batch.grad_accum > short.batch.grad_accum == 2
    found = speed(plan, short, {"step_seconds": 0.7, "micro_seconds": 0.1})
    assert found["measured_step_seconds"] == pytest.approx(0.7 + 0.1 * (plan.batch.grad_accum - 2))
    assert found["short"]["measured_tokens_per_second"] == pytest.approx(short.batch.tokens / 0.7)


def test_the_order_is_wrong_where_the_faster_is_slower_by_more_than_a_tie() -> None:
    def plan(name: str, predicted: float, measured: float) -> Values:
        return {
            "name": name,
            "speed": {"predicted_step_seconds": predicted, "measured_step_seconds": measured, "error": 0.0},
        }

    first = plan("first", 1.0, 1.0)
    others = [plan("a tie", 1.01, 0.5), plan("right", 1.1, 1.2), plan("wrong", 1.2, 0.9), plan("nearly", 1.3, 1.19)]
    row = {"name": "x", "outcome": "ran", "chosen": {"name": "first"}, "speed": first["speed"], "alternatives": others}
    order = choice_report.summarise([row])["order"]
    assert order["pairs"] == 9
    assert order["wrong"] == ["x: first before wrong", "x: right before wrong"]


def test_nothing_measured_keeps_no_limit() -> None:
    rows = Trials(planned()[:3], dry=False).rows
    summary = choice_report.summarise(rows)
    assert not any(summary[part]["keeps_limits"] for part in ("plans", "largest", "speed"))
    assert any("nothing was measured" in line for line in choice_report.verdicts(summary))


def test_the_report_has_every_row_and_names_what_breaks_a_limit() -> None:
    rows, _ = carried_out(list(planned()[:7]), law(more=1.25, slower=1.3))
    left = {**rows[0], "name": "late", "outcome": "left out", "reason": "no | time", "alternatives": [], "notes": []}
    left = {key: value for key, value in left.items() if key not in {"trained", "speed", "largest", "single_sequences"}}
    gpu = dict.fromkeys(("catalogue_entry", "driver", "cuda", "hip", "nccl", "allocator_settings"))
    record = {
        "rows": [*rows, left],
        "summary": choice_report.summarise(rows),
        "gpu": {
            **gpu, "name": "Some Card", "total_bytes": 2**34, "capability": "9.0", "context_bytes": 2**29,
            "driver_bytes_are_ours": False,
        },
        "software": dict.fromkeys(("command", "date", "torch", "deepspeed", "python", "system", "commit")),
        "seconds": 12.0,
        "compiled": True,
        "rates_of": "H100 SXM",
    }  # fmt: skip
    text = choice_report.markdown(record)
    assert json.loads(json.dumps(record))["summary"] == record["summary"]
    for row in rows:
        assert f"| {row['name']} |" in text or f"**{row['name']}**" in text
    assert "LIMIT NOT KEPT" in text
    assert "- out of memory: " in text
    assert "- tokens per second off by more than 15%: " in text
    assert "| late | left out | no / time |" in text
