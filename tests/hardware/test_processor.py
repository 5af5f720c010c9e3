"""The rates of a processor that are kept for plans and runs."""

import json
import os
import stat
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import processors
from scalegpt.config.machine import MachineConfig
from scalegpt.hardware import processor
from scalegpt.hardware.detect import planned_machine
from scalegpt.hardware.processor import Kept, Measured, Processor, ProcessorRates, keep, kept, processors_path

HERE = Processor("Some CPU (model 1)", 4, "2.13.0")
OTHER = replace(HERE, threads=2)
MEASURED = processors.MEASURED


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SCALEGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SCALEGPT_PROCESSORS")
    monkeypatch.setattr(processor, "_remembered", {})
    return tmp_path / "cache"


def read_anew(monkeypatch: pytest.MonkeyPatch, which: Processor) -> Kept:
    """What another process would read."""
    monkeypatch.setattr(processor, "_remembered", {})
    return kept(which)


def test_rates_are_kept_by_processor_threads_and_torch(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kept(HERE) == Kept()
    assert keep(HERE, MEASURED) is None
    second = replace(MEASURED, quiet=False)
    assert keep(OTHER, second) is None
    assert [path.name for path in cache.iterdir()] == ["processors.json"]  # and no temporary file
    assert read_anew(monkeypatch, HERE) == Kept(MEASURED)
    assert read_anew(monkeypatch, OTHER) == Kept(second)
    for stranger in (replace(HERE, torch="2.14.0"), replace(HERE, model="Some CPU (model 2)")):
        assert read_anew(monkeypatch, stranger) == Kept()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[]", "does not hold a JSON object"),
        ('{"format": "other"}', "its format is not scalegpt-processors 1"),
        ('{"format": "scalegpt-processors", "version": 1}', "it has no list of processors"),
    ],
)
def test_a_damaged_file_is_said_and_replaced(
    cache: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    cache.mkdir()
    processors_path().write_text(text)
    found = kept(HERE)
    assert found.measured is None
    assert found.warning is not None
    assert said in found.warning
    assert "the stored rates of processors cannot be used" in found.warning
    assert str(processors_path()) in found.warning
    assert keep(HERE, MEASURED) is None
    assert read_anew(monkeypatch, HERE) == Kept(MEASURED)


@pytest.mark.parametrize("value", [0, -1.0, "fast", None, True, float("inf")])
def test_impossible_rates_are_refused(value: object) -> None:
    rates = asdict(processors.FP32)
    assert ProcessorRates.parse(rates) == processors.FP32
    with pytest.raises(ValueError, match="matmul must be"):
        ProcessorRates.parse({**rates, "matmul": value})


def test_where_nothing_can_be_written_this_process_still_knows(cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    problem = keep(HERE, MEASURED)
    assert problem is not None
    assert str(cache) in problem
    assert kept(HERE) == Kept(MEASURED)


def test_the_user_can_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALEGPT_PROCESSORS", str(tmp_path / "mine.json"))
    keep(HERE, MEASURED)
    assert json.loads((tmp_path / "mine.json").read_text())["processors"][0]["threads"] == 4
    assert stat.S_ISREG(os.stat(tmp_path / "mine.json").st_mode)  # noqa: PTH116


def test_the_machine_at_hand_has_the_rates_measured_with_its_torch() -> None:
    settings = MachineConfig(gpu="cpu")
    assert planned_machine(settings, torch="2.13.0").measured is None
    keep(Processor.here("2.13.0"), MEASURED)
    assert planned_machine(settings, torch="2.13.0").measured == MEASURED
    assert planned_machine(settings, torch="2.12.0").measured is None
    assert planned_machine(settings).measured is None


def test_a_plan_says_what_is_wrong_with_the_rates(cache: Path) -> None:
    settings = MachineConfig(gpu="cpu")
    keep(Processor.here("2.13.0"), MEASURED)
    assert planned_machine(settings, torch="2.13.0").notes == ()
    keep(Processor.here("2.13.0"), replace(MEASURED, quiet=False))
    (note,) = planned_machine(settings, torch="2.13.0").notes
    assert "while the machine was busy" in note
    (cache / "processors.json").write_text("{")
    (note,) = planned_machine(settings, torch="2.12.0").notes
    assert note.endswith("the next run measures them again")


def test_threads_are_the_users_or_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    alone = processor.threads_alone()
    monkeypatch.setenv("OMP_NUM_THREADS", "77")
    assert processor.threads_alone() == 77
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")  # torchrun sets both
    assert processor.threads_alone() == alone


def test_fp16_is_not_measured() -> None:
    assert MEASURED.rates("fp16") is None
    assert MEASURED.rates("bf16") == processors.BF16
    assert Measured.parse(asdict(MEASURED)) == MEASURED
