"""Predicted beside measured: what is said, what is written, and what is kept for later plans."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nvml_fake import Fake, a100
from scalegpt.backends import World
from scalegpt.config.presets import resolve
from scalegpt.hardware import detect, nvml
from scalegpt.hardware.gpus import find_card
from scalegpt.hardware.machine import Machine
from scalegpt.planner.batches import BatchPlan
from scalegpt.planner.plan import Plan, make_plan
from scalegpt.planner.time import calibration
from scalegpt.training import memory
from scalegpt.training.memory import Measured, comparison, keep_for_later, machine_of, measure, predicted_line

CPU = World(0, 1, 0, 1, torch.device("cpu"))
CARD = Machine(
    name="NVIDIA A100-SXM4-40GB", usable_bytes=40 * 10**9, card=find_card("a100-40gb"), torch="2.13.0", driver="580.1"
)


def planned(machine: Machine = CARD) -> Plan:
    run = resolve(flags={"precision": "bf16", "backend": "plain"})
    return make_plan(run, machine, BatchPlan(2, 1, 1, run.model.block_size))


def held(plan: Plan, *, ours: bool = True) -> Measured:
    peak = plan.peak_bytes + 2**20
    return Measured(peak, memory.ALLOCATOR, peak + 2**24, peak + 2**29, ours)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALEGPT_CACHE", str(tmp_path / "cache"))


def test_a_cpus_plan_counts_the_process_and_leaves_no_measurement() -> None:
    plan = planned(machine_of(CPU))
    assert plan.total_bytes > plan.peak_bytes + 300 * 2**20
    line = predicted_line(plan)
    assert all(words in line for words in ("predicted for the process, of", "libraries", "freed memory", "available"))
    measured = measure(CPU.device)
    assert (measured.reserved, measured.driver) == (None, None)
    assert "peak of the process's resident memory, prediction " in comparison(plan, measured)
    assert keep_for_later(plan, measured) is None
    assert not calibration.calibration_path().exists()


def test_a_gpus_machine_has_torchs_figures_and_nvmls_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Fake([a100(0, held=2**33), a100(1)], nvlink="all"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-40GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=42_285_268_992)
    )
    machine = machine_of(World(0, 4, 0, 2, torch.device("cuda", 0)))
    assert (machine.card, machine.usable_bytes) == (find_card("a100-40gb"), 42_285_268_992)
    assert (machine.gpus, machine.nodes, machine.is_gpu, machine.notes) == (2, 2, True, ())
    assert (machine.driver, machine.torch, machine.capability) == ("580.65.06", torch.__version__, "8.0")
    assert machine.link is not None
    assert machine.link.kind == "nvlink"
    assert machine.host_bytes


def test_the_whole_process_is_measured_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "largest_resident", lambda: 5000)
    assert measure(CPU.device) == Measured(5000, memory.RESIDENT)


def test_what_the_ranks_hold_already_is_theirs_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is available leaves out what our own processes hold; the prediction counts that."""
    monkeypatch.setattr(detect, "available_bytes", lambda root: 10**10)
    monkeypatch.setattr(memory, "own_bytes", lambda: 10**9)
    assert machine_of(CPU).usable_bytes == pytest.approx(11 * 10**9, abs=10)
    assert 50 * 2**20 < memory._status_bytes("RssAnon") <= memory.largest_resident()  # type: ignore[operator]


def test_a_gpus_line_has_the_overheads_and_warns_of_too_much() -> None:
    plan = planned()
    line = predicted_line(plan)
    assert "predicted peak per GPU (phase " in line
    assert "GiB with overheads" in line
    assert "warning" not in line
    assert "more than the 0.50 GiB of this card" in predicted_line(planned(replace(CARD, usable_bytes=2**29)))


def test_a_gpus_measurement_is_shown_and_kept() -> None:
    plan = planned()
    line = comparison(plan, held(plan))
    assert "peak of the CUDA allocator, prediction -" in line
    assert "driver" in line
    assert keep_for_later(plan, held(plan)) is None
    (kept,) = calibration.load().measurements
    assert (kept.card, kept.driver, kept.torch, kept.ranks) == (CARD.name, "580.1", "2.13.0", 1)
    assert kept.predicted_peak_bytes == plan.peak_bytes
    assert make_plan(plan.run, CARD, plan.batch, calibration.load()).overheads.measured == 1


def test_a_card_that_others_use_too_is_not_measured() -> None:
    plan = planned()
    assert "other processes included" in comparison(plan, held(plan, ours=False))
    assert keep_for_later(plan, held(plan, ours=False)) is None
    assert calibration.load().measurements == ()


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ({}, (700, True)), (None, (700, False)), ({1: 300}, (700, True)), ({1: 300, 2: 300}, (700, False)),
        ({1: 300, "own": 650}, (650, True)), ({1: 300, "own": 0}, (700, False)),
    ],
)  # fmt: skip
def test_the_drivers_figure_is_ours_where_nvml_says_so(
    listed: dict[Any, int] | None, expected: tuple[int, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    seen = None if listed is None else {os.getpid() if pid == "own" else -pid: size for pid, size in listed.items()}
    monkeypatch.setattr(memory, "_listed_bytes", lambda device: seen)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (300, 1000))
    assert memory._driver_bytes(torch.device("cuda", 0)) == expected


def test_without_nvml_nothing_is_known_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    assert nvml.driver_version() is None
    assert nvml.listed_bytes("GPU-1") is None
