"""What a run measures: FLOPs, throughput, MFU, memory, and the lines it writes."""

import json
import math
from pathlib import Path

import psutil
import pytest
import torch

from scalegpt.config import ModelConfig
from scalegpt.errors import RunError
from scalegpt.planner.time.work import flops_per_token
from scalegpt.training.metrics import Stopwatch, Throughput, mfu, peak_bytes
from scalegpt.training.runs.metrics_file import MetricsFile


def test_flops_of_gpt2() -> None:
    """6·124,439,808 + 12·12·768·1024, by hand."""
    gpt2 = ModelConfig(n_layer=12, n_embd=768, n_head=12, block_size=1024, vocab_size=50257, bias=True)
    assert flops_per_token(gpt2) == 6 * 124_439_808 + 113_246_208


def test_mfu_is_a_share_of_all_devices_and_unknown_stays_unknown() -> None:
    assert mfu(1000.0, 10**9, 1e12, 4) == pytest.approx(0.25)
    assert mfu(1000.0, 10**9, None, 4) is None


def test_the_median_is_not_moved_by_a_slow_step() -> None:
    throughput = Throughput(tokens_per_step=100, window=5)
    assert math.isnan(throughput.tokens_per_second)
    for seconds in (60.0, 2.0, 2.0, 2.0):
        throughput.add(seconds)
    assert (throughput.step_seconds, throughput.tokens_per_second) == (2.0, 50.0)
    for _ in range(5):
        throughput.add(4.0)
    assert throughput.step_seconds == 4.0  # only the last count


def test_the_peak_is_in_bytes_and_only_grows() -> None:
    before = peak_bytes(torch.device("cpu"))
    held = torch.ones(10_000_000)
    after = peak_bytes(torch.device("cpu"))
    assert after >= before
    assert held.nbytes < after < psutil.virtual_memory().total  # bytes, not kibibytes


def test_lines_are_there_at_once_and_hold_only_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    file = MetricsFile(path)
    file.log({"step": 2, "loss": float("nan"), "grad_norm": float("inf"), "mfu": None, "lr": 1e-3})
    lines = path.read_text().splitlines()
    assert lines[0] == '{"step": 1}'
    expected = {"step": 2, "loss": None, "grad_norm": None, "mfu": None, "lr": 1e-3}
    assert json.loads(lines[1], parse_constant=pytest.fail) == expected
    file.close()
    file.close()


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be written: Is a directory"):
        MetricsFile(tmp_path)
    if Path("/dev/full").exists():
        file = MetricsFile(Path("/dev/full"))
        with pytest.raises(RunError, match="/dev/full cannot be written: No space left on device"):
            file.log({"step": 1})
        file.close()


def test_laps_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([10.0, 11.0, 14.0, 20.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(moments))
    clock = Stopwatch()
    assert [clock.lap(), clock.lap(), clock.total] == [1.0, 3.0, 10.0]
