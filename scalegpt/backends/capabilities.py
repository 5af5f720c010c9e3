"""What the device can do: its name, dtypes, attention kernels, a compiler."""

import shutil
import warnings

import torch
from torch.nn import functional as F
from torch.nn.attention import sdpa_kernel

from scalegpt.backends.base import DTYPES
from scalegpt.errors import InputError
from scalegpt.model.gpt import SDPA_BACKENDS


def device_name(device: torch.device) -> str:
    """The card's name, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def resolve_precision(wanted: str, device: torch.device) -> str:
    """The compute dtype's name; ``auto`` takes what the device is fast in.

    CUDA: bf16 from compute capability 8.0 on, fp16 before. CPU: bf16 where the processor multiplies bf16 (AVX-512 or AMX),
    else fp32.

    Raises:
        InputError: bf16 on a card that has none.
    """
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
        if wanted == "bf16" and not native:
            raise InputError(f"precision bf16: {device_name(device)} has no bf16; use --precision fp16")
        return wanted if wanted != "auto" else "bf16" if native else "fp16"
    return wanted if wanted != "auto" else "bf16" if _cpu_multiplies_bf16() else "fp32"


def _cpu_multiplies_bf16() -> bool:
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # no public form exists
    return any(getattr(torch.cpu, check, bool)() for check in checks)


def check_attention(name: str, precision: str, device: torch.device, head_size: int, *, dropout: bool) -> None:
    """Try the attention backend on a few tokens, forward and backward.

    Raises:
        InputError: the device, dtype or head size is not one that it serves.
    """
    if name == "auto":
        return
    q = torch.zeros(1, 1, 8, head_size, device=device, dtype=DTYPES[precision], requires_grad=True)
    try:
        with warnings.catch_warnings(record=True), sdpa_kernel(SDPA_BACKENDS[name]):
            F.scaled_dot_product_attention(q, q, q, is_causal=True, dropout_p=0.1 if dropout else 0.0).sum().backward()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        with_dropout = " with dropout" if dropout else ""
        raise InputError(
            f"attention {name} does not run here ({device_name(device)}, {precision}, heads of {head_size}"
            f"{with_dropout}: {reason}); use --attention auto"
        ) from None


def resolve_compile(wanted: str, device: torch.device) -> tuple[bool, str | None]:
    """Whether to compile the blocks, and a warning where that was wanted and cannot be.

    ``auto`` compiles on CUDA. Compiling needs a C++ compiler on the CPU, and Triton on CUDA.
    """
    if wanted == "off" or (wanted == "auto" and device.type != "cuda"):
        return False, None
    if device.type == "cuda":
        import importlib.util

        lacks = "Triton is not installed" if importlib.util.find_spec("triton") is None else None
    else:
        lacks = "there is no C++ compiler (g++ or clang++)" if not any(map(shutil.which, ("g++", "clang++"))) else None
    return (True, None) if lacks is None else (False, f"compile: {lacks}; the blocks run uncompiled")
