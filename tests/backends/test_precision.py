"""Which precision ``auto`` takes."""

from dataclasses import replace

import pytest
import torch

import processors
from scalegpt.backends.precision import card_precision
from scalegpt.config.presets import resolve
from scalegpt.errors import InputError
from scalegpt.hardware.processor import Measured
from scalegpt.speed.precision import resolve_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
QUICK = replace(processors.FP32, matmul=1e12, attention=1e12)


@pytest.mark.parametrize("wanted", ["fp32", "bf16", "fp16"])
def test_a_cpu_takes_every_precision(wanted: str) -> None:
    assert card_precision(wanted, CPU) == wanted
    assert resolve_precision(resolve(preset="demo", flags={"precision": wanted}), CPU) == wanted


@pytest.mark.parametrize(("bf16", "expected"), [(QUICK, "bf16"), (processors.BF16, "fp32")])
def test_auto_on_a_cpu_follows_the_kept_rates(tmp_path, monkeypatch: pytest.MonkeyPatch, bf16, expected: str) -> None:
    processors.write(tmp_path / "rates.json", Measured(processors.FP32, bf16))
    monkeypatch.setenv("SCALEGPT_PROCESSORS", str(tmp_path / "rates.json"))
    assert resolve_precision(resolve(preset="demo"), CPU) == expected


def test_auto_on_a_card_is_bf16_where_there_is_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test 100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert card_precision("auto", CUDA) == "bf16"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert card_precision("auto", CUDA) == "fp16"
    assert card_precision("fp32", CUDA) == "fp32"
    with pytest.raises(InputError, match="NVIDIA Test 100 has no bf16; use --precision fp16"):
        card_precision("bf16", CUDA)
