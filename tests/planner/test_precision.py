"""The precision and the time that a plan for a processor takes from its measured rates."""

from dataclasses import replace

import pytest

import processors
from scalegpt.config.presets import resolve
from scalegpt.hardware.detect import cpu_card
from scalegpt.hardware.gpus import GB
from scalegpt.hardware.machine import Machine
from scalegpt.hardware.processor import Measured, ProcessorRates
from scalegpt.planner.batches import BatchPlan
from scalegpt.planner.plan import Plan, make_plan
from scalegpt.planner.precision import GAIN, fastest_precision
from scalegpt.planner.time.rates import Rates, basis, speed_range

FP32 = processors.FP32


def machine(measured: Measured | None, ranks: int = 1) -> Machine:
    card = cpu_card(4, 16 * GB, ranks)
    return Machine(name="cpu", card=card, usable_bytes=16 * GB // ranks, gpus=ranks, is_gpu=False, measured=measured)


def planned(measured: Measured | None, **flags: object) -> Plan:
    run = resolve(preset="demo", flags={"precision": "fp32", **flags})
    return make_plan(run, machine(measured), BatchPlan(16, 1, 1, 128))


def faster(factor: float) -> ProcessorRates:
    """Rates at which all work takes ``factor`` times as short as in fp32; bf16 moves half of the bytes besides."""
    values = {name: getattr(FP32, name) * factor for name in ("matmul", "attention", "memory", "loss", "update")}
    return replace(FP32, **values, kernel=FP32.kernel / factor)


@pytest.mark.parametrize(("bf16", "expected"), [(faster(3), "bf16"), (faster(1 / 3), "fp32")])
def test_the_precision_is_the_faster_one(bf16: ProcessorRates, expected: str) -> None:
    run = resolve(preset="demo")
    assert fastest_precision(run, machine(Measured(FP32, bf16))) == expected


def test_a_small_gain_is_none() -> None:
    """At equal rates bf16 gains the bytes that it saves; without these a gain below ``GAIN`` counts as none."""
    run = resolve(preset="demo")
    compute = replace(FP32, memory=1e30, loss=1e30, kernel=1e-12)
    for factor, expected in ((1.02 * GAIN, "bf16"), (0.98 * GAIN, "fp32")):
        bf16 = replace(compute, matmul=compute.matmul * factor, attention=compute.attention * factor)
        assert fastest_precision(run, machine(Measured(compute, bf16))) == expected


def test_unmeasured_it_is_fp32() -> None:
    assert fastest_precision(resolve(preset="demo"), machine(None)) == "fp32"


@pytest.mark.parametrize("name", ["matmul", "attention", "memory", "loss", "update"])
def test_each_rate_counts(name: str) -> None:
    slow = planned(processors.MEASURED)
    quick = planned(Measured(replace(FP32, **{name: 2 * getattr(FP32, name)}), processors.BF16))
    assert quick.seconds < slow.seconds
    assert sum(quick.time.parts.values()) == pytest.approx(quick.seconds)


def test_ranks_share_the_processor() -> None:
    card = cpu_card(4, 16 * GB, 2)
    alone = Rates.of(cpu_card(4, 16 * GB), machine(processors.MEASURED), "fp32")
    half = Rates.of(card, machine(processors.MEASURED, ranks=2), "fp32")
    assert (alone.matmul, alone.kernel) == (FP32.matmul, FP32.kernel)
    assert (half.matmul, half.memory, half.kernel) == (FP32.matmul / 2, FP32.memory / 2, FP32.kernel)


def test_a_plan_says_whether_its_times_are_measured() -> None:
    measured, guessed, fp16 = (
        planned(processors.MEASURED),
        planned(None),
        planned(processors.MEASURED, precision="fp16"),
    )
    assert (measured.is_measured, guessed.is_measured, fp16.is_measured) == (True, False, False)
    assert measured.speed()["mfu"] is None  # the peak of a processor is not known
    low, high = measured.tokens_per_second_range
    wide = guessed.tokens_per_second_range
    assert high / low < wide[1] / wide[0]
    card = cpu_card(4, 16 * GB)
    assert speed_range(card, measured=True) == (low / measured.tokens_per_second, high / measured.tokens_per_second)
    assert "measured on this processor" in basis(card, measured=True)
    assert "`scalegpt doctor`, or the first run here, measures its rates" in basis(card)
