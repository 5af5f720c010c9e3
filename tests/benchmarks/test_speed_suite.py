"""The speed suite as far as a machine without a GPU can hold it: rows and their order, arithmetic, the report, dry runs."""

import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.suite import speed_child, speed_report
from benchmarks.suite.children import Child
from benchmarks.suite.configuration import Configuration
from benchmarks.suite.frame import ROOT
from benchmarks.suite.profiling import Span, busy, summary
from benchmarks.suite.session import MINUTES
from benchmarks.suite.speed_rows import (
    CHUNKS,
    LEAST_STEPS,
    LOOP,
    LOSS,
    MOST_STEPS,
    PRESETS,
    PROFILE,
    TRAIN,
    Subject,
    loss_jobs,
    subjects,
)
from benchmarks.suite.speed_trials import Trials, foreseen, need
from scalegpt.config.backends import BACKENDS
from scalegpt.config.train import LOSSES, RECOMPUTE
from scalegpt.hardware.gpus import find_card
from scalegpt.hardware.machine import Machine

SCRIPT = ROOT / "benchmarks" / "gpu_suite.py"

Values = dict[str, Any]


def suite(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), "speed", *words], capture_output=True, text=True, timeout=280)


@cache
def planned(card: str = "H100 SXM") -> tuple[Subject, ...]:
    found, unfit = subjects(Machine.with_card(find_card(card)))
    assert len(found) + len(unfit) == len(PRESETS)
    return tuple(found)


def jobs(card: str = "H100 SXM") -> list[Values]:
    return [job for kind in foreseen(planned(card)) for job in kind]


# --- the command -----------------------------------------------------------------------------------------------------


def test_without_a_gpu_it_says_so_in_a_line_and_exits_3() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    done = suite()
    assert (done.returncode, done.stdout) == (3, "")
    assert len(done.stderr.splitlines()) == 1
    assert "no CUDA device" in done.stderr


def test_a_name_that_no_row_has_exits_2() -> None:
    done = suite("--dry", "--only", "weather")
    assert done.returncode == 2
    assert done.stderr.startswith("gpu_suite speed: error: --only weather: found in no name, such as '500M_1024 plain")


DRY = "^150M_1024 (plain recompute=full|fsdp stage 2|nanoGPT-style loop .*32 .*compiled|loss alone.*chunked 1024)|^profile"


def test_dry_takes_every_kind_of_row_through_real_steps_and_writes_nothing() -> None:
    before = sorted((ROOT / "benchmarks").rglob("*.json"))
    done = suite("--dry", "--only", DRY)
    assert done.returncode == 0, done.stdout + done.stderr
    names = [job["name"] for job in jobs() if re.search(DRY, job["name"])]
    rows = [line for line in done.stdout.splitlines() if "150M_1024" in line]
    assert len(rows) == len(names) == 6
    assert all(row.startswith("stepped ") for row in rows), done.stdout
    assert "Nothing was measured" in done.stdout
    assert sorted((ROOT / "benchmarks").rglob("*.json")) == before


@pytest.mark.slow
def test_dry_takes_all_rows_of_a_preset() -> None:
    done = suite("--dry", "--only", "150M_1024")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if " 150M_1024 " in line]
    assert len(rows) == sum(" 150M_1024 " in f" {job['name']}" for job in jobs()) + 1
    others = [row for row in rows if not row.startswith("stepped ")]
    assert all("Liger" in row for row in others), done.stdout


def test_losses_agree_with_full_logits_in_fp32() -> None:
    """So that what is timed side by side computes the same."""
    child = Child("benchmarks.suite.speed_child", ["dry"])
    try:
        errors = {}
        for job in loss_jobs(planned()[0], 64):
            answer = child.ask(job, 120)
            if answer["outcome"] != "skipped":
                assert answer["outcome"] == "stepped", answer
                errors[job["name"]] = answer["gradient_error"]
    finally:
        child.close()
    assert len(errors) >= 2 + 2 * len(CHUNKS)
    assert all(0 < error < 0.01 for error in errors.values()), errors


# --- the rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("card", ["H100 SXM", "H200", "A100 80GB", "RTX 4090", "RTX 3070"])
def test_no_row_comes_twice_and_steps_of_a_preset_have_the_same_tokens(card: str) -> None:
    names = [job["name"] for job in jobs(card)]
    assert len(set(names)) == len(names)
    steps: dict[str, set[int]] = {}
    for job in jobs(card):
        if job["kind"] in {TRAIN, LOOP}:
            steps.setdefault(job["preset"], set()).add(job["flags"]["micro_batch"] * job["grad_accum"])
    assert all(len(sequences) == 1 for sequences in steps.values()), steps


def test_on_a_large_card_the_core_takes_no_longer_than_there_is_time() -> None:
    assert sum(need(kind) for kind in foreseen(planned())) <= 60 * MINUTES


def test_the_core_has_what_the_limits_speak_of_and_every_setting_once() -> None:
    core = [job for job in jobs() if job["core"]]
    trained = [job for job in core if job["kind"] == TRAIN]
    for preset in PRESETS:
        mine = [job for job in trained if job["preset"] == preset]
        assert {job["flags"]["recompute"] for job in mine} == set(RECOMPUTE)
        assert {job["backend"] for job in mine} == set(BACKENDS)
        assert {job["compiled"] for job in mine} == {True, False}
        assert ("deepspeed", 1) in {(job["backend"], job["zero_stage"]) for job in mine}
        assert len({job["flags"]["micro_batch"] for job in mine}) > 1
        assert any(job["preset"] == preset and job["compiled"] for job in core if job["kind"] == LOOP)
        ways = {(job["way"], job.get("chunk"), job["compiled"]) for job in core if job["kind"] == LOSS}
        assert {("chunked", chunk, compiled) for chunk in CHUNKS for compiled in (True, False)} < ways
    assert {job["flags"]["loss"] for job in trained} == set(LOSSES)
    assert {job["flags"].get("attention") for job in trained} >= {None, "flash", "cudnn"}
    assert sum(job["kind"] == PROFILE for job in core) == 1


def test_what_the_limits_need_most_comes_first() -> None:
    kinds = [(job["kind"], job["preset"]) for job in jobs()[:6]]
    assert kinds == [(kind, preset) for preset in PRESETS for kind in (TRAIN, LOOP)]


def test_what_runs_out_of_memory_is_followed_by_half_the_micro_batch() -> None:
    trials = Trials(planned()[:1])
    asked = []
    for job in trials.kinds()[0]:
        asked.append(job)
        over = job["kind"] in {TRAIN, LOOP} and job["flags"]["micro_batch"] > 16
        trials.take(job, {"outcome": "out of memory" if over else "ran"})
    first = [job["flags"]["micro_batch"] for job in asked if job["kind"] == TRAIN][:3]
    assert first == [64, 32, 16]
    assert [job["flags"]["micro_batch"] for job in asked if job["kind"] == LOOP][:2] == [32, 16]
    full = [job for job in asked if job["kind"] == TRAIN and job["flags"]["recompute"] == "full"]
    assert [job["flags"]["micro_batch"] for job in full] == [16]


def test_what_is_not_predicted_to_fit_is_named_and_not_tried() -> None:
    trials = Trials(planned())
    asked = []
    for kind in trials.kinds():
        for job in kind:
            asked.append(job["name"])
            trials.take(job, {"outcome": "ran"})
    left = [row for row in trials.rows if row["outcome"] == "left out"]
    assert left
    assert all("predicted, the card has" in row["reason"] and row["name"] not in asked for row in left)


def test_the_fastest_row_is_profiled_and_time_is_kept_for_it() -> None:
    trials = Trials(planned()[-1:])
    best = "150M_1024 fsdp stage 2 recompute=none loss=chunked micro_batch=128 compiled"
    for job in trials.kinds()[0]:
        rate = 2.0 if job["name"] == best else 1.0
        trials.take(job, {"outcome": "ran", "measured": {"model_flops_per_second": rate}})
    *others, last = trials.rows
    assert (last["kind"], last["name"], last["backend"]) == (PROFILE, f"profile of {best}", "fsdp")
    assert all(row["reserve"] >= last["usual_seconds"] for row in others)
    assert last["reserve"] == 0.0


def test_what_is_interrupted_is_named() -> None:
    trials = Trials(planned()[-1:])
    kind = trials.kinds()[0]
    trials.take(next(kind), {"outcome": "ran"})
    next(kind)  # asked, and never answered
    trials.give_up(kind, {"outcome": "left out", "reason": "interrupted"})
    assert len(trials.rows) == len(foreseen(planned()[-1:])[0])
    assert {row["outcome"] for row in trials.rows[1:]} == {"left out"}


@pytest.mark.parametrize(("step", "count"), [(0.001, MOST_STEPS), (0.1, 15), (2.0, LEAST_STEPS)])
def test_as_many_steps_as_take_so_long(step: float, count: int) -> None:
    assert speed_child.steps_for(1.5, step) == count


def test_what_is_timed_is_measured_and_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way that a card would go, on the CPU, with a model that takes no time."""
    monkeypatch.setattr(speed_child, "TIMED_SECONDS", 0.01)
    monkeypatch.setattr(speed_child, "LOSS_SECONDS_TIMED", 0.01)
    station = speed_child.SpeedStation(torch.device("cpu"), dry=False)
    flags = {"micro_batch": 2, "recompute": "none", "loss": "chunked", "precision": "bf16", "vocab_size": 128}
    flags |= {"n_layer": 1, "n_embd": 32, "n_head": 2, "block_size": 32}
    base = Configuration(preset="tiny", grad_accum=2, flags=flags).as_dict()
    trace = tmp_path / "deep" / "trace.json"
    before = station.release()
    for kind, tokens in ((TRAIN, 128), (LOOP, 128), (LOSS, 64), (PROFILE, 0)):
        answer = station.answer({**base, "kind": kind, "way": "chunked", "chunk": 16, "trace": str(trace)})
        assert (answer["outcome"], answer["notes"]) == ("ran", []), answer
        assert answer["left_over_bytes"] <= before, answer  # tensors of other tests of this process
        measured = json.loads(json.dumps(answer["measured"]))
        assert measured["steps"] >= 3
        assert measured.get("tokens_per_step", measured.get("tokens", 0)) == tokens
        if kind in {TRAIN, LOOP}:
            assert measured["tokens_per_second"] == pytest.approx(tokens / measured["step_seconds"])
    assert 0 <= measured["idle_share"] < 1
    assert sum(kernel["share"] for kernel in measured["kernels"]) <= 1.000001
    assert json.loads(trace.read_text())["traceEvents"]


# --- the profile -----------------------------------------------------------------------------------------------------


def test_idle_time_is_where_no_span_runs_and_overlaps_count_once() -> None:
    spans = [Span("a", 0, 10), Span("b", 5, 8), Span("a", 9, 12), Span("c", 20, 25)]
    assert busy(spans) == 17
    found = summary(spans, steps=2)
    assert found["idle_share"] == pytest.approx(8 / 25)
    assert [kernel["name"] for kernel in found["kernels"]] == ["a", "c", "b"]
    assert found["kernels"][0]["share"] == pytest.approx(13 / 21)
    assert (found["kernels_of_step"], found["kinds_of_kernels"]) == (2.0, 3)


def test_a_profile_without_kernels_is_no_result() -> None:
    with pytest.raises(RuntimeError, match="no kernel"):
        summary([], steps=3)


# --- limits and the report -------------------------------------------------------------------------------------------


def answered(rates: dict[str, float] | None = None) -> list[Values]:
    """All rows as if they had run: 1000 tokens a second, the plain loops half of that, and what is given otherwise.

    Args:
        rates: regular expression → tokens a second of rows in whose name it is found.
    """
    rows = []
    for job in jobs():
        rate = 500.0 if job["kind"] == LOOP else 1000.0
        for pattern, given in (rates or {}).items():
            rate = given if re.search(pattern, job["name"]) else rate
        measured: Values = {
            "tokens_per_second": rate, "mfu": rate / 2000, "tokens_per_step": 2**17, "step_seconds": 2**17 / rate,
            "middle_half": [0.9, 1.1], "allocated_bytes": 2**34, "reserved_bytes": 2**35,
        }  # fmt: skip
        row = {**job, "outcome": "ran", "notes": [], "measured": measured}
        if job["kind"] == LOSS:
            row |= {"measured": {**measured, "tokens": 65536, "extra_bytes": 2**30}, "gradient_error": 0.004}
        elif job["kind"] == PROFILE:
            row["measured"] = summary([Span("a|kernel", 0, 3), Span("another", 4, 5)], steps=3)
        rows.append(row)
    return rows


def kept(rows: list[Values]) -> dict[str, bool | None]:
    return {found["what"]: found["kept"] for found in speed_report.findings(rows)}


def test_each_limit_is_stated_for_each_preset() -> None:
    found = kept(answered())
    assert len(found) == 6 * len(PRESETS)
    lost = {"500M_1024: MFU", "350M_1024: MFU"}  # all rows have 50%
    assert {what for what, is_kept in found.items() if not is_kept} == lost


@pytest.mark.parametrize(
    ("pattern", "rate", "lost"),
    [
        ("^500M.*plain recompute=full", 1000 / 1.29, None),
        ("^500M.*plain recompute=full", 1000 / 1.31, "500M_1024: recompute full makes a step longer by"),
        ("^150M.*plain recompute=selective", 1000 / 1.09, None),
        ("^150M.*plain recompute=selective", 1000 / 1.11, "150M_1024: recompute selective makes a step longer by"),
        ("^350M.*fsdp stage 2", 951, None),
        ("^350M.*fsdp stage 2", 949, "350M_1024: FSDP2 over one rank is slower than plain by"),
        ("^150M.*fsdp stage 3", 949, "150M_1024: FSDP2 over one rank is slower than plain by"),
        ("^350M.*deepspeed stage 1", 949, "350M_1024: ZeRO-1 over one rank is slower than plain by"),
        ("^150M.*deepspeed stage 3", 100, None),
        ("^350M.*loop.*compiled", 1000 / 1.31, None),
        (
            "^350M.*loop.*micro_batch=16 .*compiled",
            1000 / 1.29,
            "350M_1024: tokens/s over those of the compiled plain loop",
        ),
        ("^350M.*loop.*micro_batch=32 grad_accum=4$", 2000, None),
    ],
)
def test_limits_are_kept_and_broken_where_they_should_be(pattern: str, rate: float, lost: str | None) -> None:
    before, after = kept(answered()), kept(answered({pattern: rate}))
    assert {what for what in after if before[what] and not after[what]} == ({lost} if lost else set())
    assert None not in after.values()


def test_what_was_not_measured_keeps_no_limit() -> None:
    rows = [{**row, "outcome": "left out", "reason": "no | time"} for row in answered()]
    found = speed_report.findings(rows)
    assert {each["kept"] for each in found} == {None}
    assert all("; at " in line and "kept" not in line.lower() for line in speed_report.verdicts(found))


def test_an_unknown_card_has_no_mfu() -> None:
    rows = answered()
    for row in rows:
        row["measured"] = {**row["measured"], "mfu": None}
    first = speed_report.verdicts(speed_report.findings(rows))[0]
    assert first == "500M_1024: MFU: the card's peak is not known; at least 55.0%"


def test_the_report_has_every_row_and_states_the_limits() -> None:
    rows = answered({"^500M.*plain recompute=full": 700.0})
    rows.append({**rows[0], "name": "late", "outcome": "left out", "reason": "no | time"})
    gpu = dict.fromkeys(("catalogue_entry", "driver", "cuda", "hip", "nccl", "allocator_settings"))
    record = {
        "rows": rows,
        "findings": speed_report.findings(rows),
        "gpu": {
            **gpu, "name": "Some Card", "total_bytes": 2**34, "capability": "9.0", "context_bytes": 2**29,
            "driver_bytes_are_ours": False,
        },
        "software": dict.fromkeys(("command", "date", "torch", "deepspeed", "python", "system", "commit")),
        "seconds": 12.0,
    }  # fmt: skip
    text = speed_report.markdown(record)
    assert json.loads(json.dumps(record))["findings"] == record["findings"]
    for row in rows:
        name = row["name"].removeprefix(f"{row['preset']} ") if row["kind"] == TRAIN else row["name"]
        assert name.replace(" loss alone", "") in text or name.capitalize()[:10] in text, name
    assert "- 500M_1024: recompute full makes a step longer by: 42.9%, at most 30.0%; LIMIT NOT KEPT" in text
    assert "- 500M_1024: tokens/s over those of the compiled plain loop: 2.00, at least 1.30; limit kept" in text
    assert "| a/kernel | 0.00 | 75.0% | 0 |" in text
    assert "| late | left out | no / time |" in text
