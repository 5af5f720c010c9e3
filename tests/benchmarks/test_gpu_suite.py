"""The GPU suites as far as a machine without a GPU can hold them: set-up, arithmetic, child processes, exit statuses."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.suite import plan_report
from benchmarks.suite.children import Child, ChildGoneError, work_through
from benchmarks.suite.frame import ROOT, Budget, write_results
from benchmarks.suite.plan_rows import FAKE_RANKS, deepspeed_rows, torch_rows
from scalegpt.config.presets import resolve

SCRIPT = ROOT / "benchmarks" / "gpu_suite.py"

CHILD = """
import os, sys, time
from benchmarks.suite.children import serve
def greet():
    print("a library that prints")
    return {"arguments": sys.argv[1:]}
def answer(job):
    print("working", file=sys.stderr)
    if job["do"] == "die":
        print("so long", file=sys.stderr, flush=True)
        os._exit(7)
    time.sleep(60 if job["do"] == "hang" else 0)
    return {"outcome": "done", "process": os.getpid(), "restart": job["do"] == "restart"}
serve(greet, answer)
"""


def suite(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=280)


# --- the command -----------------------------------------------------------------------------------------------------


def test_without_a_gpu_it_says_so_in_a_line_and_exits_3() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    done = suite("plan")
    assert (done.returncode, done.stdout) == (3, "")
    assert len(done.stderr.splitlines()) == 1
    assert "no CUDA device" in done.stderr


@pytest.mark.parametrize(
    "words",
    [("weather",), (), ("plan", "--minutes", "0"), ("plan", "--only", "("), ("plan", "--only", "nothing so named")],
)
def test_bad_arguments_exit_2(words: tuple[str, ...]) -> None:
    done = suite(*words)
    assert done.returncode == 2
    assert "error:" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_dry_takes_every_kind_of_configuration_through_real_steps() -> None:
    """The rows of one preset hold every setting of the suite, and in a dry run all presets have the same shape."""
    before = sorted((ROOT / "benchmarks").rglob("*.json"))
    done = suite("plan", "--dry", "--only", "^150M_1024")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if " 150M_1024 " in line]
    assert len(rows) == sum(row.preset == "150M_1024" for row in torch_rows() + deepspeed_rows())
    assert all(row.startswith("stepped ") for row in rows), done.stdout
    assert "Nothing was measured" in done.stdout
    assert sorted((ROOT / "benchmarks").rglob("*.json")) == before


def test_nothing_of_a_configuration_stays_in_the_process() -> None:
    """Else the next one's peak would hold it too. DeepSpeed's engines do not go by themselves."""
    rows = [row for row in deepspeed_rows() if row.preset == "150M_1024" and not row.flags and row.zero_stage in {1, 3}]
    child = Child("benchmarks.suite.plan_child", ["dry"])
    try:
        for row in [*rows, *(row for row in torch_rows() if row.backend == "plain")][:4]:
            answer = child.ask(row.as_dict(), 120)
            assert (answer["outcome"], answer["left_over_bytes"]) == ("stepped", 0), row.name
    finally:
        child.close()


# --- configurations --------------------------------------------------------------------------------------------------


def test_configurations_have_names_of_their_own_and_can_be_resolved() -> None:
    rows = torch_rows() + deepspeed_rows()
    names = [row.name for row in rows]
    assert 55 <= len(set(names)) == len(names) <= 80
    for row in rows:
        layout = {"backend": row.backend, "zero_stage": row.zero_stage, "ds_config": None}
        assert resolve(preset=row.preset, flags={**layout, **row.flags}).parallel.stage == row.zero_stage
        assert row.ranks in {1, FAKE_RANKS}


def test_every_kind_that_was_asked_for_is_there() -> None:
    rows = torch_rows() + deepspeed_rows()
    assert {(row.backend, row.zero_stage, row.ranks) for row in rows} == {
        ("plain", 0, 1),
        *(("fsdp", stage, ranks) for stage in (0, 2, 3) for ranks in (1, FAKE_RANKS)),
        *(("deepspeed", stage, 1) for stage in (0, 1, 2, 3)),
    }
    assert {row.grad_accum for row in rows} == {1, 2}
    assert {row.compiled for row in rows} == {False, True}
    varied = {key for row in rows for key in row.flags}
    assert {"recompute", "loss", "micro_batch", "fused", "attention", "residual_dtype", "dropout"} <= varied


# --- child processes -------------------------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "some_child.py").write_text(CHILD, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "some_child"


def work(module: str, *orders: str, minutes: float = 1.0, most: float = 20.0) -> list[dict[str, Any]]:
    jobs = [{"do": order} for order in orders]
    answers = work_through(
        jobs,
        lambda seconds: Child(module, [], seconds),
        Budget(minutes),
        usual_seconds=lambda job: 0.1,
        most_seconds=lambda job: 2.0 if job["do"] == "hang" else most,
    )
    return [answer for _, answer in answers]


def test_a_child_greets_and_its_libraries_may_print(module: str) -> None:
    child = Child(module, ["cuda"])
    assert child.greeting == {"arguments": ["cuda"]}
    assert child.ask({"do": "work"}, 20)["outcome"] == "done"
    child.close()


def test_one_process_does_all_the_work_until_it_asks_to_be_replaced(module: str) -> None:
    processes = [answer["process"] for answer in work(module, "work", "restart", "work", "work")]
    assert processes[0] == processes[1] != processes[2] == processes[3]


def test_a_child_that_dies_or_hangs_costs_its_own_job_only(module: str) -> None:
    found = work(module, "work", "die", "work", "hang", "work")
    assert [answer["outcome"] for answer in found] == ["done", "failed", "done", "failed", "done"]
    assert "status 7" in found[1]["reason"]
    assert "so long" in found[1]["reason"]
    assert "no answer after 2 s" in found[3]["reason"]


def test_what_is_not_begun_in_time_is_left_out_and_named(module: str) -> None:
    found = work(module, "work", "work", minutes=0.0001)
    assert [answer["outcome"] for answer in found] == ["left out", "left out"]


def test_a_child_that_does_not_start_fails_every_job() -> None:
    with pytest.raises(ChildGoneError, match="no_such_module"):
        Child("no_such_module", [])
    assert [answer["outcome"] for answer in work("no_such_module", "work", "work")] == ["failed", "failed"]


# --- errors and the report -------------------------------------------------------------------------------------------


def row(name: str, *, peak: int, reserved: int, driver: int, apart: str = "") -> dict[str, Any]:
    """A row with 100, 200 and 400 GiB measured."""
    gib = 2**30
    held = {"allocated_bytes": 0, "reserved_bytes": 0, "driver_bytes": 0}
    made = {
        "name": name,
        "apart": apart,
        "outcome": "measured",
        "seconds": 1.0,
        "notes": [],
        "predicted": {
            "peak_bytes": (peak - 1) * gib,
            "workspace_bytes": gib,
            "reserved_bytes": reserved * gib,
            "total_bytes": driver * gib,
            "fits": True,
            "binding_phase": "loss",
            "phases": {"loss": (peak - 1) * gib},
            "breakdown": {"activations": (peak - 1) * gib},
            "overheads": {"CUDA context": gib},
        },
        "measured": {
            "allocated_bytes": 100 * gib,
            "reserved_bytes": 200 * gib,
            "driver_bytes": 400 * gib,
            "outside_bytes": 200 * gib,
            "allocated_by_part": {"micro steps": 100 * gib},
            "allocation_retries": 0,
            "before": held,
            "after": held,
        },
    }
    plan_report.add_errors(made)
    return made


def test_errors_are_signed_and_workspaces_belong_to_the_peak() -> None:
    compared = row("x", peak=103, reserved=190, driver=400)["compared"]
    assert {figure: round(found["error"], 6) for figure, found in compared.items()} == {
        "peak": 0.03,
        "reserved": -0.05,
        "driver": 0.0,
    }


def test_too_little_counts_for_more_than_too_much() -> None:
    over = row("over", peak=100, reserved=212, driver=400)
    under = row("under", peak=100, reserved=194, driver=400)
    assert plan_report.badness(over) == pytest.approx(0.06 / 0.08)
    assert plan_report.badness(under) == pytest.approx(0.03 / 0.02)
    assert plan_report.worst_first([over, under]) == [under, over]


@pytest.mark.parametrize(
    ("peaks", "kept"), [((101, 99), True), ((103, 100), True), ((103, 103), False), ((106, 100, 100, 100), False)]
)
def test_the_limits_hold_for_mean_and_worst(peaks: tuple[int, ...], kept: bool) -> None:
    summary = plan_report.summarise(row(str(peak), peak=peak, reserved=200, driver=400) for peak in peaks)
    assert summary["peak"]["keeps_limits"] is kept
    assert summary["reserved"]["keeps_limits"] is True


def test_never_more_than_two_percent_under() -> None:
    summary = plan_report.summarise([row("x", peak=100, reserved=195, driver=394)])
    assert summary["reserved"]["keeps_limits"] is False
    assert summary["driver"]["keeps_limits"] is True


def test_running_out_of_memory_is_held_against_the_prediction() -> None:
    rows = [{"outcome": "out of memory", "predicted": {"fits": fits}} for fits in (True, False, False)]
    counted = plan_report.verdicts([*rows, {"outcome": "left out"}, row("x", peak=100, reserved=200, driver=400)])
    assert counted == {
        "fits, ran": 1,
        "does not fit, out of memory": 2,
        "fits, out of memory": 1,
        "does not fit, ran": 0,
    }


def test_the_report_names_the_worst_and_what_was_not_measured() -> None:
    rows = [
        row("mild", peak=101, reserved=200, driver=400),
        row("grave", peak=110, reserved=200, driver=400),
        row("set apart", peak=150, reserved=200, driver=400, apart="compiled"),
    ]
    left = {"name": "late", "apart": "", "outcome": "left out", "reason": "the minutes were used up"}
    gpu = dict.fromkeys(("catalogue_entry", "driver", "cuda", "hip", "nccl", "allocator_settings"))
    record = {
        "rows": [*plan_report.worst_first(rows), left],
        "summary": plan_report.summarise(rows[:2]),
        "gpu": {
            **gpu, "name": "Some Card", "total_bytes": 2**34, "capability": "9.0", "context_bytes": 2**29,
            "driver_bytes_are_ours": False,
        },
        "software": dict.fromkeys(("command", "date", "torch", "deepspeed", "python", "system", "commit")),
        "seconds": 12.0,
    }  # fmt: skip
    text = plan_report.markdown(record)
    assert "all that is in use on the card" in text
    worst = text[text.index("## The worst") : text.index("## All")]
    assert worst.index("grave") < worst.index("mild")
    assert "set apart" not in worst
    assert "Not counted above (compiled)" in text
    assert "| late | left out |  | the minutes were used up |" in text


def test_results_are_named_by_date_and_card_and_never_replaced(tmp_path: Path) -> None:
    record = {"software": {"date": "2026-11-25T10:00:00+00:00"}}
    for stem in ("plan_2026-11-25_NVIDIA-H200", "plan_2026-11-25_NVIDIA-H200_2"):
        files = write_results("plan", "NVIDIA H200", record, "# Report\n", tmp_path)
        assert [file.name for file in files] == [f"{stem}.json", f"{stem}.md"]
    assert json.loads(files[0].read_text()) == record
    assert len(list(tmp_path.iterdir())) == 4
