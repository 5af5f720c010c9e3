"""Out of memory: known, told with what would hold, and remembered."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scalegpt.backends import World
from scalegpt.config.presets import resolve
from scalegpt.hardware.machine import Machine
from scalegpt.planner.batches import BatchPlan
from scalegpt.planner.plan import Plan, make_plan
from scalegpt.planner.search.advice import lighter
from scalegpt.planner.time.calibration import Calibration
from scalegpt.training.resilience import oom
from scalegpt.training.resilience.failure import handle_failure
from scalegpt.training.resilience.heartbeat import Heartbeats
from scalegpt.training.resilience.watchdog import Watchdog
from scalegpt.training.runs.directory import RunDirectory

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


def plan_of(micro_batch: int, grad_accum: int = 1, **train: Any) -> Plan:
    flags = {"n_layer": 2, "n_embd": 64, "n_head": 2, "block_size": 64, "vocab_size": 257, "precision": "fp32", **train}
    return make_plan(resolve(flags=flags, name="x"), Machine(), BatchPlan(micro_batch, grad_accum, 1, 64))


def failure(act: Callable[[], Any]) -> BaseException:
    with pytest.raises(Exception) as raised:
        act()
    return raised.value


def test_real_lack_of_memory_is_known() -> None:
    assert oom.is_out_of_memory(failure(lambda: torch.empty(2**50, dtype=torch.uint8)))
    assert oom.is_out_of_memory(failure(lambda: np.empty(2**56)))
    assert oom.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert oom.is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"))


def test_other_errors_are_not() -> None:
    assert not oom.is_out_of_memory(failure(lambda: torch.ones(2) @ torch.ones(3)))
    assert not oom.is_out_of_memory(OSError(28, "No space left on device"))
    assert not oom.is_out_of_memory(KeyboardInterrupt())


@pytest.mark.parametrize(
    ("micro", "accum", "smaller"), [(8, 1, 4), (4, 2, 2), (3, 4, 1), (6, 1, 3), (5, 1, 1), (1, 8, None)]
)
def test_half_the_micro_batch_divides_the_step(micro: int, accum: int, smaller: int | None) -> None:
    assert oom.smaller_micro_batch(plan_of(micro, accum)) == smaller


def test_advice_names_the_next_smaller_ones_that_hold_less() -> None:
    said = oom.advice(plan_of(8))
    assert "--micro_batch 4 (" in said
    assert "--recompute selective (" in said
    assert "no smaller layout is left" in oom.advice(plan_of(1, 8, recompute="full"))


def test_advice_fits_the_card_where_that_is_known() -> None:
    machine = replace(Machine(), usable_bytes=plan_of(2, 4).total_bytes)
    asked = replace(plan_of(8), machine=machine)
    assert lighter(asked, Calibration())[0].batch == BatchPlan(2, 4, 1, 64)


def test_the_next_start_takes_less_and_the_step_stays(tmp_path: Path) -> None:
    directory, plan = RunDirectory(tmp_path), plan_of(8)
    assert oom.shrunk(plan.run, directory, ranks=1, device="cpu") is None
    assert "micro batch 4" in oom.remember(directory, plan, "cpu")
    found = oom.shrunk(plan.run, directory, ranks=1, device="cpu")
    assert found is not None
    run, said = found
    assert (run.train.micro_batch, run.train.tokens_per_step) == (4, 8 * 64)
    assert oom.RECORD in said
    assert oom.shrunk(run, directory, ranks=1, device="cpu") is None  # small enough
    assert oom.shrunk(plan.run, directory, ranks=2, device="cpu") is None  # there each rank holds something else
    assert oom.shrunk(plan.run, directory, ranks=1, device="H100") is None
    oom.remember(directory, replace(plan, batch=BatchPlan(4, 2, 1, 64)), "cpu")
    again = oom.shrunk(plan.run, directory, ranks=1, device="cpu")
    assert again is not None
    assert again[0].train.micro_batch == 2
    assert "cannot reduce the memory further" in oom.remember(
        directory, replace(plan, batch=BatchPlan(1, 8, 1, 64)), "cpu"
    )


@pytest.mark.parametrize("note", ["", "[]", '{"micro_batch": "4"}', '{"micro_batch": 0, "ranks": 1, "device": "cpu"}'])
def test_a_damaged_note_changes_nothing(tmp_path: Path, note: str) -> None:
    (tmp_path / oom.RECORD).write_text(note)
    assert oom.shrunk(plan_of(8).run, RunDirectory(tmp_path), ranks=1, device="cpu") is None


@pytest.mark.parametrize("on_oom", ["stop", "shrink"])
def test_the_end_is_told_with_the_advice(tmp_path: Path, on_oom: str) -> None:
    directory = RunDirectory(tmp_path)
    dog = Watchdog(directory, Heartbeats(tmp_path, ALONE), first=0, later=0)
    dog.begin_step(5)
    ending = handle_failure(failure(lambda: torch.empty(2**50)), dog, plan_of(8), on_oom=on_oom)
    assert ending.is_ours
    assert str(ending.error).startswith("out of memory on rank 0 in step 5, loader (")
    assert "--micro_batch 4" in str(ending.error)
    assert (tmp_path / oom.RECORD).exists() == (on_oom == "shrink")
    status = json.loads(directory.status.read_text())
    assert (status["state"], status["step"], status["cause"]) == ("failed", 4, str(ending.error))
