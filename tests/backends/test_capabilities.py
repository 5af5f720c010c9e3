"""What the device can do: precision, attention kernels, a compiler."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._inductor.exc import InvalidCxxCompiler

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
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert resolve_compile("auto", CUDA) == (False, "compile: Triton is not installed; the blocks run uncompiled")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}" if name == "clang" else None)
    assert resolve_compile("auto", CUDA) == (True, None)
    monkeypatch.setenv("CC", "/no/cc")
    assert resolve_compile("auto", CUDA) == (
        False,
        "compile: the compiler CC=/no/cc does not exist; the blocks run uncompiled",
    )
    monkeypatch.delenv("CC")
    monkeypatch.setattr("shutil.which", lambda name: None)
    lacks = "compile: there is no C compiler (install gcc); the blocks run uncompiled"
    assert resolve_compile("auto", CUDA) == (False, lacks)


def test_fp16_under_deepspeed_needs_a_processor_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capabilities, "cpu_has_fp16", lambda: False)
    with pytest.raises(InputError, match="use --precision bf16, or --backend fsdp"):
        check_precision("deepspeed", "fp16", CPU)
    check_precision("fsdp", "fp16", CPU)
    check_precision("deepspeed", "bf16", CPU)
    check_precision("deepspeed", "fp16", CUDA)
    monkeypatch.setattr(capabilities, "cpu_has_fp16", lambda: True)
    check_precision("deepspeed", "fp16", CPU)


WORKS, FAILS = "#!/bin/sh\necho 12.2.0\n", "#!/bin/sh\nexit 1\n"


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        (WORKS, None),
        (FAILS, "compile: CXX={path} is not a working C++ compiler; the blocks run uncompiled"),
        (None, "compile: CXX={path} is not a working C++ compiler; the blocks run uncompiled"),
    ],
)
@pytest.mark.slow
def test_a_named_compiler_is_tried(tmp_path: Path, compiler: str | None, reason: str | None) -> None:
    """In a process of its own: torch reads CXX when it is imported."""
    path = tmp_path / "c++"
    if compiler is not None:
        path.write_text(compiler)
        path.chmod(0o755)
    code = """
import torch
from scalegpt.backends.capabilities import resolve_compile
print(resolve_compile("on", torch.device("cpu")))"""
    found = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "CXX": str(path)}, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == str((reason is None, reason and reason.format(path=path)))


def test_without_any_compiler_a_cpu_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def search() -> str:
        raise InvalidCxxCompiler

    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", search)
    assert resolve_compile("on", CPU) == (
        False,
        "compile: there is no C++ compiler (install g++); the blocks run uncompiled",
    )
