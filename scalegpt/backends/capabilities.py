"""The capabilities of a device: its name, dtypes, attention kernels, and whether blocks can be compiled for it."""

import os
import shutil
import warnings

import torch
from torch.nn import functional as F
from torch.nn.attention import sdpa_kernel

from scalegpt.backends.base import DTYPES
from scalegpt.config import ModelConfig
from scalegpt.config.backends import DEEPSPEED
from scalegpt.errors import InputError
from scalegpt.model.attention import SDPA_BACKENDS
from scalegpt.model.cpu.matmul_attention import ByMatmuls


def device_name(device: torch.device) -> str:
    """The card's name, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def check_precision(backend: str, precision: str, device: torch.device) -> None:
    """Refuse a compute dtype that the backend's library does not support on this device.

    Raises:
        InputError: the backend is DeepSpeed, the dtype fp16, and the device a processor without fp16 instructions.
    """
    if (backend, precision, device.type) == (DEEPSPEED.name, "fp16", "cpu") and not cpu_has_fp16():
        raise InputError(
            "precision fp16: DeepSpeed does not support it on this processor; use --precision bf16, or --backend fsdp"
        )


def cpu_has_fp16() -> bool:
    """Whether the processor has instructions for matmuls in fp16, which DeepSpeed requires for fp16 on a CPU."""
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def check_attention(name: str, precision: str, device: torch.device, head_size: int, *, dropout: bool) -> None:
    """Try the attention backend on a few tokens, forward and backward.

    Raises:
        InputError: the attention backend does not support the device, the dtype, the head size or dropout.
    """
    if name == "auto":
        return
    q = torch.zeros(1, 1, 8, head_size, device=device, dtype=DTYPES[precision], requires_grad=True)
    try:
        with warnings.catch_warnings(record=True), sdpa_kernel(SDPA_BACKENDS[name]):
            y = F.scaled_dot_product_attention(q, q, q, is_causal=True, dropout_p=0.1 if dropout else 0.0)
            torch.autograd.grad(y.sum(), q)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        if reason.startswith("No viable backend"):  # torch then lists kernels as disabled: by us, above
            reason = "torch has no kernel for it"
        with_dropout = " with dropout" if dropout else ""
        raise InputError(
            f"attention {name} does not run here ({device_name(device)}, {precision}, heads of {head_size}"
            f"{with_dropout}: {reason}); use --attention auto"
        ) from None


def attention_by_matmuls(name: str, precision: str, device: torch.device, *, dropout: bool) -> ByMatmuls:
    """The passes that :func:`~scalegpt.model.cpu.matmul_attention.matmul_attention` computes in place of torch's SDPA.

    With ``auto`` these are the passes in which it was measured to be faster than SDPA. In bf16 on a processor with
    AVX-512's bf16 instructions, it computes forward and backward. If the processor also has AMX, which SDPA's forward
    pass uses, it computes only the backward. On any other device it computes neither. Nothing is timed at run time, so
    a resumed run computes the same.

    Args:
        name: the setting ``attention``.
        precision: name of the compute dtype.
        device: the device that the model runs on.
        dropout: whether attention has dropout, which ``matmul_attention`` does not support.
    """
    fits = (name, precision, device.type) == ("auto", "bf16", "cpu") and not dropout
    if not fits or not torch.cpu._is_avx512_bf16_supported():
        return ByMatmuls.NOTHING
    return ByMatmuls.BACKWARD if torch.cpu._is_amx_tile_supported() else ByMatmuls.ALL


def expands_keys(name: str, precision: str, device: torch.device, model: ModelConfig) -> bool:
    """Whether grouped keys and values must be expanded, because the attention kernel takes no groups.

    Torch's memory-efficient kernel takes none. With ``auto`` torch uses it if the kernels that take groups cannot be
    used.
    """
    if model.kv_heads == model.n_head or device.type != "cuda":
        return False
    if name != "auto":
        return name == "mem_efficient"
    q, k = (
        torch.empty(1, heads, 8, model.head_width, device=device, dtype=DTYPES[precision], requires_grad=True)
        for heads in (model.n_head, model.kv_heads)
    )
    cuda = torch.backends.cuda
    grouped, expanded = (cuda.SDPAParams(q, keys, keys, None, model.dropout, True, keys is k) for keys in (k, q))
    if cuda.can_use_flash_attention(grouped) or cuda.can_use_cudnn_attention(grouped):
        return False
    return cuda.can_use_efficient_attention(expanded)


def resolve_compile(wanted: str, device: torch.device) -> tuple[bool, str | None]:
    """Whether to compile the blocks, and a warning if they should be compiled but cannot be.

    ``auto`` compiles on CUDA. Compiling needs a C++ compiler on the CPU, and Triton with a C compiler on CUDA.
    """
    if wanted == "off" or (wanted == "auto" and device.type != "cuda"):
        return False, None
    if device.type == "cuda":
        import importlib.util

        lacks = "Triton is not installed" if importlib.util.find_spec("triton") is None else _lacking_c_compiler()
    else:
        lacks = _lacking_compiler()
    return (True, None) if lacks is None else (False, f"compile: {lacks}; the blocks run uncompiled")


def _lacking_c_compiler() -> str | None:
    """Why Triton finds no C compiler, which it needs to build its launchers; None if it finds one."""
    named = os.environ.get("CC")
    if named is not None:
        return None if shutil.which(named) else f"the compiler CC={named} does not exist"
    return None if shutil.which("gcc") or shutil.which("clang") else "there is no C compiler (install gcc)"


def _lacking_compiler() -> str | None:
    """Why torch finds no C++ compiler; None if it finds one.

    This runs torch's own search, which starts each compiler.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler  # takes a second
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, OSError):
        named = os.environ.get("CXX")
        return (
            "there is no C++ compiler (install g++)" if named is None else f"CXX={named} is not a working C++ compiler"
        )
    return None
