"""Checks of the GPUs: driver and libraries, who uses the cards, how they reach each other, and how fast they are."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from scalegpt.doctor.checks import FAILURE, OK, WARNING, Finding, Setting, check
from scalegpt.hardware.detect import find
from scalegpt.units import gib

if TYPE_CHECKING:
    import torch

LEAST_SHARE = 0.5
"""A rate below this share of the catalogue's peak is worth a warning; training reaches more."""


@check("gpus")
def gpus(_: Setting) -> Iterator[Finding]:
    """List the cards that the driver finds, and the memory that other processes hold on them."""
    found = find()
    for remark in found.notes:
        yield Finding(WARNING, remark, "install or load the driver, or restart the machine")
    if not found.devices:
        yield Finding(OK, "no GPU: training runs on the processor")
    for each in found.devices:
        size = "" if each.usable_bytes is None else f", {gib(each.usable_bytes)}"
        name = f"GPU {each.label}: {each.name}{size}"
        if each.is_taken:
            who = f"{each.processes} other process{'es' if each.processes != 1 else ''}"
            yield Finding(
                WARNING,
                f"{name}; {who} hold {gib(each.taken_bytes)}",
                "end them (nvidia-smi lists them), or use other GPUs",
            )
        elif each.processes:
            yield Finding(WARNING, f"{name}; {each.processes} other processes use it", "end them, or use other GPUs")
        else:
            yield Finding(OK, name)


@check("cuda")
def cuda(_: Setting) -> Iterator[Finding]:
    """Report the versions of the driver, CUDA and NCCL that torch sees."""
    import torch

    if not torch.cuda.is_available():
        return
    from scalegpt.hardware.nvml import driver_version

    found: tuple[int, ...] = ()
    if torch.distributed.is_nccl_available():
        found = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    nccl = ".".join(map(str, found)) or "none"
    line = f"driver {driver_version() or 'unknown'}, CUDA {torch.version.cuda or torch.version.hip}, NCCL {nccl}"
    if nccl == "none" and torch.cuda.device_count() > 1:
        yield Finding(FAILURE, f"{line}: several GPUs need NCCL", "install torch's CUDA build for Linux")
    else:
        yield Finding(OK, line)


@check("links")
def links(_: Setting) -> Iterator[Finding]:
    """Check that each pair of GPUs copies directly, and measure how fast GPU 0 copies to GPU 1."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < 2:
        return
    apart = [
        (a, b) for a in range(count) for b in range(count) if a != b and not torch.cuda.can_device_access_peer(a, b)
    ]
    if apart:
        pairs = ", ".join(f"{a} to {b}" for a, b in apart[:4])
        yield Finding(
            WARNING,
            f"GPUs do not reach each other directly ({pairs}{', …' if len(apart) > 4 else ''}): copies go through the host",
            "check the topology (nvidia-smi topo -m), and that the IOMMU is off; or use --gpus with cards of one switch",
        )
    rate = _copied(torch.device("cuda", 0), torch.device("cuda", 1))
    yield Finding(OK, f"{rate / 1e9:,.0f} GB/s from GPU 0 to GPU 1")


@check("gpu speed")
def gpu_speed(_: Setting) -> Iterator[Finding]:
    """Compare the rates of each card's matmuls and copies with the catalogue's peaks."""
    import torch

    from scalegpt.hardware.gpus import known_card

    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device, card = torch.device("cuda", index), known_card(torch.cuda.get_device_name(index))
        flops, moved = _multiplied(device), _copied(device, device)
        line = f"GPU {index}: {flops / 1e12:,.0f} TFLOP/s in matmuls, {moved / 1e9:,.0f} GB/s in memory"
        if card is None:
            yield Finding(WARNING, f"{line}; it is not in the catalogue", "add it, see scalegpt gpus --help")
            continue
        shares = flops / card.tflops / 1e12, moved / card.gbps / 1e9
        line += f", {shares[0]:.0%} and {shares[1]:.0%} of the catalogue's peaks"
        if min(shares) < LEAST_SHARE:
            yield Finding(
                WARNING, line, "see nvidia-smi -q -d PERFORMANCE for a power limit or heat, and end other processes"
            )
        else:
            yield Finding(OK, line)


def _multiplied(device: "torch.device", size: int = 4096, times: int = 20) -> float:
    """Measure the FLOP/s of half-precision matmuls on a card."""
    import torch

    half = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    a = torch.ones(size, size, dtype=half, device=device)
    return 2.0 * size**3 * times / _timed(device, lambda: [a @ a for _ in range(times)])


def _copied(source: "torch.device", target: "torch.device", size: int = 2**28, times: int = 8) -> float:
    """Measure the bytes per second of copies between two cards, or of reading and writing on one card."""
    import torch

    a, b = (torch.empty(size, dtype=torch.uint8, device=device) for device in (source, target))
    passes = 2 if source == target else 1
    return passes * size * times / _timed(target, lambda: [b.copy_(a) for _ in range(times)])


def _timed(device: "torch.device", work: "object") -> float:
    """Measure the seconds of a function's kernels on a card, after a first call that loads them."""
    import time

    import torch

    assert callable(work)
    work()
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start
