"""Measuring a processor: the rates follow from the times of probes, and are measured once."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import processors
from scalegpt.errors import RunError
from scalegpt.hardware import processor
from scalegpt.hardware.processor import Measured, Processor, ProcessorRates, kept, processors_path
from scalegpt.planner.time.step_time import StepTotals
from scalegpt.speed import rates
from scalegpt.speed.probes import SHAPES, Probe, Timed, probe_run, work_of
from scalegpt.speed.rates import fitted, measure_if_needed, non_negative

ROOT = Path(__file__).resolve().parents[2]
TRUE = ProcessorRates(matmul=2e11, fill=50.0, attention=3e10, memory=4e9, loss=8e9, update=1e10, kernel=3e-5)


def seconds(work: StepTotals, true: ProcessorRates) -> float:
    """The time of a pass by its definition."""
    flops, attention, moved, kernels, outputs, loss = map(sum, zip(work.forward, work.backward, strict=True))
    multiplying = (flops + 2 * true.fill * outputs) / true.matmul
    return multiplying + attention / true.attention + moved / true.memory + loss / true.loss + kernels * true.kernel


def timed_by(true: ProcessorRates) -> list[Timed]:
    """All probes, with the times that a processor of these rates would take."""
    probes = []
    for name in SHAPES:
        work = work_of(probe_run(name, "fp32"))
        taken = seconds(work, true)
        probes.append(Timed(work, taken, taken, work.update.bytes / true.update + work.update.kernels * true.kernel))
    return probes


@pytest.fixture(scope="module")
def exact() -> list[Timed]:
    return timed_by(TRUE)


def test_the_rates_behind_the_times_are_found(exact: list[Timed]) -> None:
    found = fitted(exact)
    for name in ("matmul", "fill", "attention", "memory", "loss", "update", "kernel"):
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=1e-4), name


def test_noise_in_the_times_stays_of_its_size(exact: list[Timed]) -> None:
    noisy = [replace(each, typical=each.typical * (1.05 if number % 2 else 1)) for number, each in enumerate(exact)]
    found = fitted(noisy)
    for each in exact:
        assert seconds(each.work, found) == pytest.approx(each.typical, rel=0.08)


def test_what_slow_matmuls_hide_is_taken_from_the_other_dtype(exact: list[Timed]) -> None:
    slow = replace(TRUE, matmul=TRUE.matmul / 1000, fill=0.0)
    probes = [
        replace(each, typical=seconds(each.work, slow) * (1.01 if number % 2 else 0.99))
        for number, each in enumerate(exact)
    ]
    found = fitted(probes, expected=TRUE)
    assert found.memory == pytest.approx(TRUE.memory, rel=0.3)
    assert found.matmul == pytest.approx(slow.matmul, rel=0.1)


def test_least_squares_without_negative_numbers() -> None:
    solved = non_negative([[1, 1], [1, 2], [1, 3]], [3, 2, 1], [1, 1, 1])  # x = (4, -1) without the bound
    assert solved[1] == 0
    assert solved[0] > 0
    assert non_negative([[1, 0], [0, 4]], [2, 2], [1, 1]) == pytest.approx([2, 0.5])


def test_a_probe_takes_a_real_step_and_leaves_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    probe = Probe("starting kernels", "bf16")
    weights = {name: value.clone() for name, value in probe.backend.model.named_parameters()}
    for _ in range(3):
        probe.step()
    assert any(not torch.equal(value, weights[name]) for name, value in probe.backend.model.named_parameters())
    assert torch.equal(torch.get_rng_state(), before)
    timed = probe.timed()
    assert 0 < timed.least <= timed.typical
    assert len(probe.passes) == 3


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALEGPT_PROCESSORS", str(tmp_path / "processors.json"))
    monkeypatch.setattr(processor, "_remembered", {})


@pytest.mark.usefixtures("empty")
def test_a_processor_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, whose measuring is cut down to one round of one small probe's size."""
    done = measured_quickly(monkeypatch)
    assert done is not None
    assert done.problem is None
    assert kept(Processor.here(torch.__version__)).measured == done.measured
    assert json.loads(processors_path().read_text())["processors"][0]["torch"] == torch.__version__
    monkeypatch.setattr(processor, "_remembered", {})
    monkeypatch.setattr(rates, "is_busy", lambda: True)  # so that rates measured while it was busy stay, too
    assert measure_if_needed() is None


def measured_quickly(monkeypatch: pytest.MonkeyPatch) -> "rates.Measurement | None":
    real = subprocess.run
    program = (
        "from scalegpt.speed import probes, rates; small = {name: (1, 32, 2, 16, 64, 1) for name in probes.SHAPES}; "
        "probes.SHAPES.update(small); probes.FEWER.clear(); rates.SECONDS = 0.01; rates.main()"
    )

    def run(command: list[str], **options: object) -> object:
        assert command[1:] == ["-m", "scalegpt.speed"]
        return real([command[0], "-c", program], **options)  # type: ignore[call-overload]

    monkeypatch.setattr(rates.subprocess, "run", run)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return measure_if_needed()


@pytest.mark.usefixtures("empty")
@pytest.mark.parametrize(("busy", "again"), [(False, True), (True, False)])
def test_rates_of_a_busy_machine_are_measured_again_when_it_is_idle(
    monkeypatch: pytest.MonkeyPatch, busy: bool, again: bool
) -> None:
    processor.keep(Processor.here(torch.__version__), Measured(processors.FP32, processors.BF16, quiet=False))
    measured = []
    monkeypatch.setattr(rates, "is_busy", lambda: busy)
    monkeypatch.setattr(rates, "measure_and_keep", lambda: measured.append(True))
    measure_if_needed()
    assert bool(measured) == again


def test_cores_of_other_processes_are_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    idle, own, now = iter([100.0, 103.0]), iter([5.0, 17.0]), iter([50.0, 60.0])
    monkeypatch.setattr(rates, "_idle_seconds", lambda: next(idle))
    monkeypatch.setattr(time, "process_time", lambda: next(own))
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    assert rates.Cores().available() == pytest.approx(1.5)  # 3 idle and 12 own core seconds in 10 seconds


def test_the_cores_are_watched_for_a_moment() -> None:
    start = time.process_time()
    cores = rates.Cores()
    while time.process_time() - start < 0.3:  # the kernel counts idle time in hundredths of a second
        pass
    assert 0 < cores.available() <= 1.1 * (os.cpu_count() or 1)


@pytest.mark.parametrize(("others", "busy"), [(0.1, False), (0.2, True)])
def test_the_machine_is_busy_where_others_use_cores_that_training_wants(
    monkeypatch: pytest.MonkeyPatch, others: float, busy: bool
) -> None:
    monkeypatch.setattr(rates, "GLANCE", 0)
    monkeypatch.setattr(rates.Cores, "available", lambda _: (1 - others) * processor.threads_alone())
    assert rates.is_busy() is busy


@pytest.mark.usefixtures("empty")
def test_a_failure_is_one_line_with_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])  # the process does not find the package
    monkeypatch.chdir("/")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RunError, match="the processor could not be measured: exit status 1"):
        measure_if_needed()


def test_the_planner_reads_rates_without_torch() -> None:
    program = (
        "import sys; from scalegpt.api import plan; choice = plan('demo', gpu='cpu').choice; "
        "print(choice.is_measured, choice.run.train.precision, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT, env={**os.environ}
    )
    assert done.stdout.split() == ["True", "fp32", "False"]
