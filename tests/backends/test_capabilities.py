"""What the device can do: precision, attention kernels, a compiler."""

import re

import pytest
import torch

from scalegpt.backends import capabilities
from scalegpt.backends.capabilities import (
    check_attention,
    check_precision,
    device_name,
    resolve_compile,
)
from scalegpt.errors import InputError

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> object:
    """Pretend that there is a card of some compute capability."""

    def pretend(major: int, minor: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test 100")

    return pretend


def test_names_of_devices(card: object) -> None:
    card(9, 0)  # type: ignore[operator]
    assert (device_name(CPU), device_name(CUDA)) == ("cpu", "NVIDIA Test 100")


@pytest.mark.parametrize("name", ["auto", "math", "flash"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_cpu_has_some_attention_kernels(name: str, precision: str) -> None:
    check_attention(name, precision, CPU, 8, dropout=False)


@pytest.mark.parametrize(("name", "dropout"), [("cudnn", False), ("mem_efficient", False), ("flash", True)])
def test_an_attention_kernel_that_does_not_run_is_refused(name: str, dropout: bool) -> None:
    with pytest.raises(InputError) as caught:
        check_attention(name, "fp32", CPU, 8, dropout=dropout)
    line = str(caught.value)
    words = r"attention \w+ does not run here \(cpu, fp32, heads of 8( with dropout)?: .+\); use --attention auto"
    assert re.fullmatch(words, line)
    assert ("with dropout" in line) == dropout


def test_compiling_needs_its_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_compile("off", CPU) == resolve_compile("auto", CPU) == resolve_compile("off", CUDA) == (False, None)
    monkeypatch.setattr("shutil.which", lambda name: name if name == "clang++" else None)
    assert resolve_compile("on", CPU) == (True, None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    compiled, warning = resolve_compile("on", CPU)
    assert not compiled
    assert warning is not None
    assert "C++ compiler" in warning
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert resolve_compile("auto", CUDA) == (False, "compile: Triton is not installed; the blocks run uncompiled")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert resolve_compile("auto", CUDA) == (True, None)


def test_fp16_under_deepspeed_needs_a_processor_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capabilities, "cpu_has_fp16", lambda: False)
    with pytest.raises(InputError, match="use --precision bf16, or --backend fsdp"):
        check_precision("deepspeed", "fp16", CPU)
    check_precision("fsdp", "fp16", CPU)
    check_precision("deepspeed", "bf16", CPU)
    check_precision("deepspeed", "fp16", CUDA)
    monkeypatch.setattr(capabilities, "cpu_has_fp16", lambda: True)
    check_precision("deepspeed", "fp16", CPU)
