"""The GPU suite as far as a machine without a GPU can hold it: rows, child processes, the budget, results, verdicts."""

import json
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from benchmarks.gpu_suite import rows_within
from benchmarks.gpu_wheels import FETCHED, ON_THE_MACHINE
from benchmarks.suite import child as child_module
from benchmarks.suite.child import ChildGoneError, Runner
from benchmarks.suite.report import errors, markdown, said, share_of_largest, verdicts
from benchmarks.suite.rows import (
    LOOP,
    LOSS,
    PARTS,
    PROFILE,
    ROOT,
    SPEED_PRESETS,
    TRAIN,
    Part,
    Row,
    Values,
    largest,
    settings,
)
from scalegpt.hardware.gpus import find_card
from scalegpt.hardware.machine import Machine

SCRIPT = ROOT / "benchmarks" / "gpu_suite.py"


def suite(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=280)


# --- the command -----------------------------------------------------------------------------------------------------


def test_without_a_gpu_it_exits_3_and_says_so_in_a_line() -> None:
    import torch  # not above, where each child would import it

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    done = suite("plan")
    assert (done.returncode, done.stdout) == (3, "")
    assert len(done.stderr.splitlines()) == 1
    assert "no CUDA device" in done.stderr


@pytest.mark.parametrize("words", [("weather",), (), ("plan", "--minutes", "0"), ("plan", "--only", "(")])
def test_bad_arguments_exit_2(words: tuple[str, ...]) -> None:
    done = suite(*words)
    assert done.returncode == 2
    assert "error:" in done.stderr
    assert "Traceback" not in done.stderr


A_FEW = (
    "^imports|^train, save|^fsdp 2|^deepspeed 3|^150M_1024 fsdp 3.*W=8|^200M_1024 plain micro_batch=20$"
    "|^150M_1024 (plain micro_batch=64 compile=on$|nano|loss alone.*(full|torch))|^profile|^rehearsal|^12 GB.*chosen 150M"
)


@pytest.mark.slow
def test_a_dry_run_takes_every_kind_of_row_and_writes_them(tmp_path: Path) -> None:
    done = suite("all", "--dry", "--only", A_FEW, "--results", str(tmp_path), "--trace", str(tmp_path / "trace.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = tmp_path.glob("all_*.json")
    record = json.loads(path.read_text())
    assert record["dry"]
    assert {row["part"] for row in record["rows"]} == set(PARTS)
    assert {row["kind"] for row in record["rows"]} == {"imports", "run", TRAIN, LOOP, LOSS, PROFILE}
    others = [row["name"] for row in record["rows"] if row["outcome"] != "ran" and "liger" not in row["name"]]
    assert others == []
    report = path.with_suffix(".md").read_text()
    assert "The figures mean nothing" in report
    assert all(f"| {row['name']} |" in report or row["kind"] == PROFILE for row in record["rows"])
    assert (tmp_path / "trace.json").is_file()


NOTHING_STAYS = """
import gc, torch
from benchmarks.suite.measure import make_bench
from benchmarks.suite.rows import Row
def living():
    gc.collect()
    storages = [each.untyped_storage() for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    return sum({each.data_ptr(): each.nbytes() for each in storages}.values())
bench = make_bench("dry")
for number in range(2):
    for backend, stage in (("fsdp", 3), ("deepspeed", 1), ("deepspeed", 3)):
        answer = bench.answer(Row(name="", preset="tiny", flags={"backend": backend, "zero_stage": stage, "compile": "off"}))
        assert answer["outcome"] == "ran", answer
    print("living", living())
"""


@pytest.mark.slow
def test_nothing_of_a_row_stays_in_the_process() -> None:
    """Otherwise the next row's peak would include it. DeepSpeed's engines do not go by themselves."""
    done = subprocess.run([sys.executable, "-c", NOTHING_STAYS], capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stderr
    first, second = (int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("living "))
    assert second <= first < 2**20


def test_the_wheels_include_every_dependency_that_the_suite_may_import() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {Requirement(each).name for each in declared}
    assert names - {"shtab"} <= {*FETCHED, *ON_THE_MACHINE}  # only `scalegpt completion` imports shtab


# --- rows ------------------------------------------------------------------------------------------------------------


def all_rows(part: str, card: str = "H200", answer: Values | None = None) -> list[Row]:
    """The rows of a part where every row gets the same answer."""
    generator, rows = PARTS[part](Machine.with_card(find_card(card))), []
    row = next(generator)
    try:
        while True:
            rows.append(row)
            row = generator.send(answer or {"outcome": "ran"})
    except StopIteration:
        return rows


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("card", ["H200", "RTX 4090"])
def test_rows_are_valid_configurations_and_none_comes_twice(part: str, card: str) -> None:
    rows = all_rows(part, card)
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        if row.kind in {TRAIN, LOOP, LOSS, PROFILE} and not row.skip:
            run = settings(row.preset, row.flags)
            assert run.parallel.backend == row.flags.get("backend", "plain")


def test_plan_has_every_backend_eager_and_compiled_and_two_modern_blocks() -> None:
    rows = all_rows("plan")
    assert len(rows) == 24
    assert len({row.preset for row in rows}) == 5
    assert {(row.flags["backend"], row.flags["compile"]) for row in rows} == {
        (backend, compiled) for backend in ("plain", "fsdp", "deepspeed") for compiled in ("off", "on")
    }
    assert all(row.predicted["total_bytes"] > row.predicted["peak_bytes"] for row in rows)
    modern = [settings(row.preset, row.flags).model for row in rows if "position" in row.flags]
    assert [(model.activation, model.parallel_block, model.kv_heads) for model in modern] == [
        ("swiglu", False, 2),
        ("gelu", True, 12),
    ]


def test_speed_profiles_the_best_and_times_the_same_tokens() -> None:
    rows = all_rows("speed")
    assert [(row.kind, row.preset) for row in rows[:3]] == [(TRAIN, preset) for preset in SPEED_PRESETS]
    assert [row.kind for row in rows[3:6]] == [LOOP, PROFILE, LOSS]
    assert {row.preset for row in rows if row.kind == LOOP} == set(SPEED_PRESETS)
    steps = {row.flags["micro_batch"] * row.grad_accum for row in rows if row.kind in {TRAIN, LOOP}}
    assert len(steps) == 1
    assert sum(row.kind == PROFILE for row in rows) == 1


def test_a_loop_that_runs_out_of_memory_is_tried_with_half_the_micro_batch() -> None:
    rows = all_rows("speed", answer={"outcome": "out of memory"})
    tried = [row.flags["micro_batch"] for row in rows if row.kind == LOOP and row.preset == "150M_1024"]
    assert tried == [32, 16, 8, 4, 2, 1]


@pytest.mark.parametrize("most", [0, 1, 3, 8, 12, 24])
@pytest.mark.parametrize("start", [1, 4, 24])
def test_bisection_ends_at_the_largest_that_runs_in_few_trials(most: int, start: int) -> None:
    sizes = (1, 2, 3, 4, 6, 8, 12, 24)
    search, tried = largest(sizes, start, ran=start <= most), {start}
    size = next(search, None)
    while size is not None:
        tried.add(size)
        try:
            size = search.send(size <= most)
        except StopIteration:
            break
    above = [each for each in sizes if each > most]
    assert max((each for each in tried if each <= most), default=0) == most
    assert not above or above[0] in tried
    assert len(tried) <= 5


# --- child processes and time ----------------------------------------------------------------------------------------


class FakeBench:
    """Does as a row's name says."""

    def greet(self) -> Values:
        print("a library that prints")
        return {"process": os.getpid()}

    def answer(self, row: Row) -> Values:
        if row.name == "die":
            print("last words", file=sys.stderr, flush=True)
            os._exit(7)
        time.sleep(60 if row.name == "hang" else 0)
        return {"outcome": "ran", "process": os.getpid(), "restart": row.name == "restart"}


def fake_bench(_mode: str) -> FakeBench:
    return FakeBench()


def no_bench(_mode: str) -> FakeBench:
    raise OSError("no such card")


@pytest.fixture
def runner() -> Iterator[Runner]:
    found = Runner(fake_bench, "", 100)
    yield found
    found.close()


def test_a_row_that_crashes_or_hangs_costs_that_row_alone(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_module, "ROW_SECONDS", 3)
    taken = {
        name: runner.take(Row(name=name)) for name in ("first", "die", "second", "restart", "third", "hang", "last")
    }
    outcomes = [answer["outcome"] for answer in taken.values()]
    assert outcomes == ["ran", "failed", "ran", "ran", "ran", "failed", "ran"]
    assert "status 7\n" in taken["die"]["reason"]
    assert "last words" in taken["die"]["reason"]
    assert "no answer after 3 s" in taken["hang"]["reason"]
    processes = [taken[name]["process"] for name in ("first", "second", "restart", "third", "last")]
    assert processes[0] == runner.greeting["process"]
    assert processes[1] == processes[2]
    assert len(set(processes)) == 4


def test_a_row_with_a_reason_to_skip_is_not_tried(runner: Runner) -> None:
    assert runner.take(Row(name="die", skip="too large")) == {
        "outcome": "skipped",
        "reason": "too large",
        "seconds": 0.0,
    }


def test_a_child_that_does_not_start_says_why() -> None:
    with pytest.raises(ChildGoneError, match="no such card"):
        Runner(no_bench, "", 100)


def endless() -> Part:
    number = 0
    while True:
        answer = yield Row(name=f"row {number}")
        assert answer["outcome"] == "ran"
        number += 1


def test_no_row_is_begun_after_the_time_is_up() -> None:
    start = time.monotonic()
    taken = list(rows_within(endless(), lambda row: time.sleep(0.1) or {"outcome": "ran"}, 0.55))
    assert 2 <= len(taken) <= 6
    assert time.monotonic() - start < 2
    assert list(rows_within(endless(), lambda row: {"outcome": "ran"}, 0.0)) == []


def test_a_planner_that_fails_ends_its_part_alone() -> None:
    [*_, (row, answer)] = rows_within(endless(), lambda row: {"outcome": "failed"}, 10)
    assert (row.name, answer["outcome"]) == ("planning", "failed")
    assert "AssertionError" in answer["traceback"]


def test_out_of_memory_is_a_result_and_what_else_fails_keeps_its_traceback() -> None:
    import torch  # not above, where each child would import it

    from benchmarks.suite.measure import failure, make_bench

    def raised(error: Exception, context: Exception | None = None) -> Values:
        error.__context__ = context
        return failure(error)

    over = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    assert raised(over)["outcome"] == "out of memory"
    assert not raised(over)["restart"]
    cleaning_failed = raised(RuntimeError("the engine has no optimizer"), over)
    assert (cleaning_failed["outcome"], cleaning_failed["restart"]) == ("out of memory", True)
    assert raised(RuntimeError("CUDA error: out of memory"))["restart"]
    assert raised(ValueError("wrong"))["outcome"] == "failed"
    threads = torch.get_num_threads()
    bench = make_bench("dry")
    torch.set_num_threads(threads)
    failed = bench.answer(Row(name="", kind="nonsense"))
    assert failed["outcome"] == "failed"
    assert "AttributeError" in failed["traceback"]
    flags = {"attention": "cudnn", "compile": "off"}
    skipped = bench.answer(Row(name="", preset="tiny", flags=flags))
    if not torch.cuda.is_available():
        assert (skipped["outcome"], "cudnn" in skipped["reason"]) == ("skipped", True)


# --- verdicts and the report -----------------------------------------------------------------------------------------


def measured(row: Row, **figures: Any) -> Values:
    """A row's entry in the record, measured as predicted unless given otherwise."""
    predicted = row.predicted
    exactly: Values = {
        "mfu": 0.5,
        "step_seconds": 1.0,
        "iqr_seconds": 0.1,
        "tokens_per_second": 1000.0,
        "outside_bytes": 0,
    }
    if predicted:
        exactly |= {
            "allocated_bytes": predicted["peak_bytes"] + predicted["workspace_bytes"],
            "reserved_bytes": predicted["reserved_bytes"], "driver_bytes": predicted["total_bytes"],
            "tokens_per_second": predicted["tokens_per_second"],
        }  # fmt: skip
    return {**vars(row), "outcome": "ran", "seconds": 1.0, "notes": [], "measured": {**exactly, **figures}}


def kept(rows: list[Values]) -> dict[str, bool]:
    return {what: said((what, *rest)).endswith("; kept") for what, *rest in verdicts(rows)}  # type: ignore[arg-type]


def test_memory_as_predicted_keeps_the_limits_and_too_little_predicted_does_not() -> None:
    rows = [{**measured(row), "part": "plan"} for row in all_rows("plan")]
    assert all(kept(rows).values())
    off = rows[0]["measured"]["driver_bytes"] = int(rows[0]["predicted"]["total_bytes"] * 1.03)
    assert errors(rows[0])["driver"] == pytest.approx(rows[0]["predicted"]["total_bytes"] / off - 1)
    assert [what for what, is_kept in kept(rows).items() if not is_kept] == ["plan: most under in driver"]


@pytest.mark.parametrize(
    ("kind", "flags", "rate", "broken"),
    [
        (TRAIN, {}, 1000.0, None),
        (LOOP, {}, 800.0, "tokens/s over those of the compiled plain loop"),
        (TRAIN, {"recompute": "full"}, 760.0, "a step is longer with plain recompute=full by"),
        (TRAIN, {"recompute": "full"}, 780.0, None),
        (TRAIN, {"backend": "deepspeed"}, 940.0, "a step is longer with deepspeed 1 by"),
        (TRAIN, {"backend": "fsdp"}, 960.0, None),
    ],
)
def test_speed_is_judged_beside_its_partner(kind: str, flags: Values, rate: float, broken: str | None) -> None:
    rows = []
    for row in all_rows("speed"):
        wanted = row.kind == kind and row.preset == "350M_1024" and flags.items() <= row.flags.items()
        usual = 700.0 if row.kind == LOOP else 1000.0
        rows.append(
            {
                **measured(row, mfu=0.6, tokens_per_second=rate if wanted and (flags or kind == LOOP) else usual),
                "part": "speed",
            }
        )
    lost = [what for what, is_kept in kept(rows).items() if not is_kept]
    assert lost == ([] if broken is None else [f"350M_1024: {broken}"])


def test_a_choice_is_held_against_the_largest_that_ran_within_the_card() -> None:
    rows = all_rows("choice")
    chosen = next(row for row in rows if "chosen" in row.name)
    assert chosen.usable_bytes is not None
    entries = []
    for row in rows:
        if row.name.startswith(chosen.name.split("chosen")[0]) and row.preset == chosen.preset:
            over = row.flags["micro_batch"] > 24
            entry = measured(row, reserved_bytes=chosen.usable_bytes - 10, outside_bytes=20 if over else 10)
            entries.append({**entry, "part": "choice"})
    assert chosen.flags["micro_batch"] < 24
    assert share_of_largest(entries[0], entries[:2]) is None  # 24 ran, and nothing larger was tried
    sizes = {entry["flags"]["micro_batch"] for entry in entries}
    next_larger = {**entries[-1], "flags": {**entries[-1]["flags"], "micro_batch": 32}}
    assert 32 not in sizes
    assert share_of_largest(entries[0], [*entries, next_larger]) == chosen.flags["micro_batch"] / 24
    assert kept(entries)["choice: chosen plans that ran out of memory"]
    lost = [{**entries[0], "outcome": "out of memory", "measured": {}}]
    assert not kept(lost)["choice: chosen plans that ran out of memory"]


def test_the_report_has_failures_with_their_traceback() -> None:
    row = replace(all_rows("smoke")[0], name="odd | name")
    entry = {
        **vars(row),
        "part": "smoke",
        "outcome": "failed",
        "reason": "E: a | b\nmore",
        "traceback": "TB",
        "seconds": 1.0,
    }
    text = markdown({"card": "Some Card", "dry": False, "rows": [entry]})
    assert "E: a / b" in text
    assert "## Failed: odd | name\n\n```\nTB\n```" in text
    assert "rows that failed: 1, at most 0; NOT KEPT" in text
