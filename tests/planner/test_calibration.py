"""Measurements of real runs: kept, bounded, believed only where they fit, and never at the expense of a plan."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from scalegpt.config.presets import resolve
from scalegpt.hardware.gpus import find_card
from scalegpt.planner.memory.overheads import Overheads
from scalegpt.planner.time import calibration
from scalegpt.planner.time.calibration import Calibration, Measurement, calibration_path, installed_torch, load, record
from scalegpt.structured import CONFIG_LIMIT

GB = 10**9
ONE = Measurement(
    card="NVIDIA A100-SXM4-40GB", driver="580.1", torch="2.13.0+cu130", backend="plain", ranks=1,
    predicted_peak_bytes=10 * GB, allocated_bytes=10 * GB, reserved_bytes=11 * GB, driver_bytes=12 * GB,
    date="2026-01-01T00:00:00+00:00",
)  # fmt: skip
RUN = resolve(flags={"backend": "plain"})
CARD = find_card("a100-40gb")
TABLES = Overheads.of(RUN, CARD, 1)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SCALEGPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "calibration.json"


def corrected(*measurements: Measurement, **changes: Any) -> Overheads:
    asked: dict[str, Any] = {"run": RUN, "card": CARD, "ranks": 1, "torch": "2.13.1", "driver": None, **changes}
    run, card, ranks = asked.pop("run"), asked.pop("card"), asked.pop("ranks")
    return Calibration(measurements).corrected(TABLES, run, card, ranks, **asked)


def test_what_is_recorded_is_read_back(path: Path) -> None:
    assert load() == Calibration()
    assert record(ONE) is None
    assert record(replace(ONE, driver_bytes=13 * GB)) is None
    assert load() == Calibration((ONE, replace(ONE, driver_bytes=13 * GB)))
    assert [each.name for each in path.parent.iterdir()] == ["calibration.json"]


def test_it_lies_in_the_cache(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert calibration_path() == path
    monkeypatch.delenv("SCALEGPT_CACHE")
    monkeypatch.setenv("HOME", "/home/someone")
    assert calibration_path() == Path("/home/someone/.cache/scalegpt/calibration.json")


def test_only_the_newest_are_kept(path: Path) -> None:
    path.parent.mkdir()
    old = [asdict(replace(ONE, ranks=rank)) for rank in range(1, calibration.MOST_MEASUREMENTS + 1)]
    path.write_text(json.dumps({"format": calibration.FORMAT, "version": 1, "measurements": old}))
    assert record(ONE) is None
    kept = load().measurements
    assert len(kept) == calibration.MOST_MEASUREMENTS
    assert (kept[0].ranks, kept[-1]) == (2, ONE)
    assert path.stat().st_size < CONFIG_LIMIT


BROKEN = {
    "nothing": "", "no JSON": "{", "a list": "[]", "another format": '{"format": "x", "version": 1, "measurements": []}',
    "a later version": json.dumps({"format": calibration.FORMAT, "version": 2, "measurements": []}),
    "no measurements": json.dumps({"format": calibration.FORMAT, "version": 1}),
    "deep": "[" * 100_000,
    **{
        f"{key} {value!r}": json.dumps({
            "format": calibration.FORMAT, "version": 1, "measurements": [{**asdict(ONE), key: value}],
        })
        for key, value in {
            "card": None, "ranks": "1", "allocated_bytes": 0, "reserved_bytes": 1, "driver_bytes": 10 * GB,
            "predicted_peak_bytes": 1.5, "torch": True,
        }.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_file_is_named_ignored_and_left_alone(path: Path, text: str) -> None:
    path.parent.mkdir()
    path.write_text(text)
    found = load()
    assert found.measurements == ()
    assert found.warning is not None
    assert str(path) in found.warning
    assert "\n" not in found.warning
    assert len(found.warning) < 400
    assert record(ONE) == found.warning
    assert path.read_text() == text


def test_what_is_no_text_or_too_large_is_ignored(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"\xff\xfe")
    assert load().warning
    path.write_bytes(b" " * (CONFIG_LIMIT + 1))
    assert "has more than 1,048,576 bytes" in str(load().warning)
    path.unlink()
    path.mkdir()
    assert load().warning


def test_a_cache_that_cannot_be_written_costs_no_run(path: Path) -> None:
    path.parent.write_text("a file where the folder would be")
    assert load() == Calibration()
    assert "not saved" in str(record(ONE))


def test_nonsense_is_not_recorded(path: Path) -> None:
    assert "not saved" in str(record(replace(ONE, driver_bytes=0)))
    assert not path.exists()


def test_a_run_like_it_corrects_what_lies_outside_the_peak() -> None:
    after = corrected(ONE)
    assert after.measured == 1
    assert after.total_bytes(10 * GB) == pytest.approx(12 * GB, rel=0.01)
    assert after.reserved_bytes(10 * GB) == pytest.approx(11 * GB, rel=0.01)
    assert after.context + after.nccl == GB


def test_of_several_runs_the_most_demanding_counts() -> None:
    more = replace(ONE, driver_bytes=13 * GB)
    assert corrected(ONE, more).context == corrected(more, ONE).context == 2 * GB
    assert corrected(more, *[ONE] * calibration.NEWEST).context == GB  # it is long ago


@pytest.mark.parametrize(
    "changes",
    [
        {"card": find_card("a100-80gb")}, {"card": None}, {"ranks": 2}, {"torch": "2.14.0"}, {"torch": None},
        {"driver": "590.0"}, {"run": resolve(flags={"backend": "fsdp"})},
    ],
)  # fmt: skip
def test_a_run_unlike_it_corrects_nothing(changes: dict[str, Any]) -> None:
    assert corrected(ONE, **changes) == TABLES


def test_the_same_driver_fits() -> None:
    assert corrected(ONE, driver="580.1").measured == 1


def test_the_allocators_peak_is_never_corrected() -> None:
    wrong = replace(ONE, predicted_peak_bytes=5 * GB)
    assert corrected(wrong) == corrected(ONE)


def test_torch_is_known_without_importing_it() -> None:
    import torch

    assert installed_torch() == torch.__version__
