"""The memory of a run: the machine's memory, the prediction printed at the start, and the measurement at the end."""

import os
import resource
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch

from scalegpt.backends import World
from scalegpt.backends.capabilities import device_name
from scalegpt.config.machine import MachineConfig
from scalegpt.hardware import nvml
from scalegpt.hardware.detect import cpu_machine, machine_at_hand
from scalegpt.hardware.gpus import known_card
from scalegpt.hardware.machine import Machine
from scalegpt.planner.plan import Plan
from scalegpt.planner.time import calibration
from scalegpt.planner.time.calibration import Measurement
from scalegpt.units import gib

ALLOCATOR, RESIDENT = "peak of the CUDA allocator", "peak of the process's resident memory"


def machine_of(world: World) -> Machine:
    """Describe this machine for the planner; all ranks must call it together.

    Card and memory are those of this rank's device, as the driver reports them. Memory that other processes hold on the
    card is not subtracted: they may be ranks of this run.
    """
    settings = MachineConfig(gpus=world.local_size, nodes=max(1, world.size // world.local_size))
    if world.device.type != "cuda":
        first = world.rank - world.local_rank
        held = world.gather(own_bytes())[first : first + world.local_size]  # bytes of each rank on this machine
        return cpu_machine(settings, torch=torch.__version__, held=sum(held))
    name = device_name(world.device)
    major, minor = torch.cuda.get_device_capability(world.device)
    return replace(
        machine_at_hand(settings, torch=torch.__version__),
        name=name,
        usable_bytes=torch.cuda.get_device_properties(world.device).total_memory,
        card=known_card(name),
        capability=f"{major}.{minor}",
        is_gpu=True,
        driver=nvml.driver_version(),
        notes=(),
    )


def predicted_line(plan: Plan) -> str:
    """The line on the predicted memory that a run prints at its start, with a warning if the card is too small."""
    phase = plan.prediction.phase.replace("_", " ")
    if not plan.machine.is_gpu:
        whose = "each process" if plan.machine.ranks > 1 else "the process"
        return (
            f"memory   {gib(plan.total_bytes)} predicted for {whose}, of {gib(plan.machine.usable_bytes or 0)} "
            f"available: {gib(plan.peak_bytes)} peak of the step (phase {phase}), {_listed(plan)}"
        )
    host = f", {gib(plan.host_bytes)} in host memory" if plan.host_bytes else ""
    usable, peak = plan.machine.usable_bytes, f"{gib(plan.peak_bytes)} predicted peak per GPU (phase {phase})"
    line = f"memory   {peak}, {gib(plan.total_bytes)} with overheads{host}"
    if usable is None or plan.fits:
        return line
    return f"{line}\nwarning: that is {gib(plan.missing_bytes)} more than the {gib(usable)} of this card"


def _listed(plan: Plan) -> str:
    """List in words the memory that a CPU process holds besides the peak of its step."""
    parts = {**plan.overheads.parts(plan.peak_bytes), "offloaded": plan.host_bytes}
    return ", ".join(f"{gib(size)} {name}" for name, size in parts.items() if size)


@dataclass(frozen=True)
class Measured:
    """The measured memory of a process, in bytes.

    Attributes:
        peak: peak of the bytes allocated by the CUDA allocator, or on a CPU of the resident memory.
        by: what ``peak`` counts: ``ALLOCATOR`` (CUDA allocator) or ``RESIDENT`` (resident memory).
        reserved: peak of the bytes reserved by the CUDA allocator; None on a CPU.
        driver: bytes in use on the card at the time of the measurement, as the driver counts them; None on a CPU.
        driver_is_ours: whether ``driver`` is known to count this process alone.
    """

    peak: int
    by: str
    reserved: int | None = None
    driver: int | None = None
    driver_is_ours: bool = False

    def as_status(self) -> dict[str, Any]:
        """The measurement as entries of ``run_status.json``."""
        return {
            "measured_peak_bytes": self.peak,
            "measured_by": self.by,
            "measured_reserved_bytes": self.reserved,
            "measured_driver_bytes": self.driver,
        }


def measure(device: torch.device) -> Measured:
    """Measure this process's memory so far: the device's on CUDA, the resident memory on a CPU."""
    if device.type != "cuda":
        return Measured(largest_resident(), RESIDENT)
    peak, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return Measured(peak, ALLOCATOR, reserved, *_driver_bytes(device))


def largest_resident() -> int:
    """The largest resident memory of this process so far, in bytes.

    On Linux the kernel's ``VmHWM`` gives it: ``getrusage`` would also count memory that the process held before ``exec``.
    """
    if (peak := _status_bytes("VmHWM")) is not None:
        return peak
    unit = 1 if psutil.MACOS else 1024  # macOS counts bytes, Linux kibibytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def own_bytes() -> int:
    """The resident bytes of this process that are neither shared nor backed by a file (``RssAnon``).

    On a system without ``RssAnon``, all resident bytes of this process.
    """
    held = _status_bytes("RssAnon")
    return int(psutil.Process().memory_info().rss) if held is None else held


def _status_bytes(key: str) -> int | None:
    """The value of an entry of ``/proc/self/status``, in bytes; None where the file or the entry is missing."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


def planned_peak(plan: Plan) -> int:
    """The prediction for :func:`scalegpt.training.metrics.peak_bytes`, in bytes: of the allocator, or of a process."""
    return plan.peak_bytes if plan.machine.is_gpu else plan.total_bytes


def memory_status(plan: Plan, measured: Measured) -> dict[str, Any]:
    """The predicted and the measured memory as entries of ``run_status.json``.

    The entry that predicts the measured peak is ``predicted_total_bytes`` on a CPU, ``predicted_peak_bytes`` on a card.
    """
    return {
        "predicted_peak_bytes": plan.peak_bytes,
        "predicted_total_bytes": plan.total_bytes,
        **measured.as_status(),
    }


def comparison(plan: Plan, measured: Measured) -> str:
    """The predicted and the measured memory that a run prints at its end: one line for a CPU, two for a card."""
    if measured.reserved is None or measured.driver is None:
        error = plan.total_bytes / max(1, measured.peak) - 1
        both = f"{gib(plan.total_bytes)} predicted, {gib(measured.peak)} measured"
        return f"memory   {both} ({measured.by}, prediction {error:+.1%})"
    line = f"memory   {gib(plan.peak_bytes)} predicted, {gib(measured.peak)} measured ({measured.by}"
    off = f", prediction {plan.peak_bytes / measured.peak - 1:+.1%}" if measured.peak else ""
    whose = "" if measured.driver_is_ours else ", other processes included"
    return (
        f"{line}{off})\n"
        f"         reserved {gib(plan.reserved_bytes)} predicted, {gib(measured.reserved)} measured; "
        f"driver {gib(plan.total_bytes)} predicted, {gib(measured.driver)} measured{whose}"
    )


def keep_for_later(plan: Plan, measured: Measured) -> str | None:
    """Store the measured memory of a GPU run. Later plans are calibrated with it.

    Nothing is stored if the run is on a CPU, or if the measurement includes other processes.

    Returns:
        Why the measurement could not be written; None: it was written, or was not to be stored.
    """
    machine = plan.machine
    if measured.reserved is None or measured.driver is None or not measured.driver_is_ours:
        return None
    return calibration.record(
        Measurement(
            card=str(machine.name),
            driver=str(machine.driver),
            torch=str(machine.torch),
            backend=plan.run.parallel.backend,
            ranks=machine.ranks,
            predicted_peak_bytes=plan.peak_bytes,
            allocated_bytes=measured.peak,
            reserved_bytes=measured.reserved,
            driver_bytes=measured.driver,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
        )
    )


def _driver_bytes(device: torch.device) -> tuple[int, bool]:
    """Return the bytes in use as the driver counts them, and whether this process alone holds them.

    Where NVML does not list this process, as in most containers, the bytes are those of the whole card.
    """
    used = _listed_bytes(device)
    if used and (own := used.get(os.getpid())):
        return own, True
    free, total = torch.cuda.mem_get_info(device)
    return total - free, used is not None and len(used) <= 1


def _listed_bytes(device: torch.device) -> dict[int, int] | None:
    """Return process id → bytes that the process holds on the card, 0 if unknown. None where there is no NVML."""
    uuid = card_uuid(device)
    return None if uuid is None else nvml.listed_bytes(uuid)


def card_uuid(device: torch.device) -> str | None:
    """The UUID of a CUDA device, as NVML writes it; None for a CPU, or where torch does not know it."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None) if device.type == "cuda" else None
    return None if uuid is None else f"GPU-{uuid}"
