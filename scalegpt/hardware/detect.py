"""Describes this machine without torch: its GPUs, from NVML or the files of AMD's driver, or its CPU.

Plans are made for the memory that is free on a card. If the cards differ, plans are made for the card with the least free
memory, since every rank needs the same amount.
"""

from collections.abc import Iterator
from pathlib import Path

from scalegpt.config.machine import CPU, MachineConfig
from scalegpt.errors import InputError
from scalegpt.hardware import nvml, rocm
from scalegpt.hardware.devices import Device, FoundGpus
from scalegpt.hardware.gpus import CPU_CAPABILITY, GB, GIB, Card
from scalegpt.hardware.machine import FOUND, GIVEN, Machine
from scalegpt.hardware.networks import Network
from scalegpt.hardware.processor import Kept, Processor, kept
from scalegpt.system.cores import ROOT, available_bytes, usable_cores

CORE_TFLOPS, CORE_GBPS = 0.05, 10.0
"""fp32 TFLOP/s of one CPU core, and the memory bandwidth per core in GB/s. Estimates, within a factor of 2."""


def planned_machine(settings: MachineConfig, *, torch: str | None = None, root: Path = ROOT) -> Machine:
    """The machine that the settings describe; if they name neither a card nor a memory size, this machine.

    Args:
        settings: the settings of the machine.
        torch: version of torch that will run; None: not known.
        root: the folder that contains ``proc`` and ``sys``.

    Raises:
        InputError: the card is not known, or has less memory than the settings ask for.
    """
    if not settings.at_hand:
        return Machine.of(settings, torch=torch)
    return machine_at_hand(settings, torch=torch, root=root, look_for_gpus=settings.gpu != CPU)


def machine_at_hand(
    settings: MachineConfig, *, torch: str | None = None, root: Path = ROOT, look_for_gpus: bool = True
) -> Machine:
    """This machine with the number of GPUs in the settings, by default all; if it has no GPU, its CPU.

    If ``look_for_gpus`` is false, the CPU is taken in any case. ``torch`` and ``root`` are as for :func:`planned_machine`.
    """
    found = find(root, settings.gpus) if look_for_gpus else FoundGpus()
    if not found.devices:
        return cpu_machine(settings, torch=torch, root=root, notes=found.notes)
    gpus = settings.gpus or len(found.devices)
    host, source = _host(settings, available_bytes(root))
    network = Network.of(settings)
    devices = found.devices[:gpus]
    smallest = min(devices, key=_size)
    card = smallest.card
    host_gbps = smallest.host_gbps or (None if card is None else card.host_gbps)
    return Machine(
        name=smallest.name,
        usable_bytes=smallest.free_bytes,
        card=card,
        capability=smallest.capability,
        gpus=gpus,
        nodes=settings.nodes,
        torch=torch,
        driver=found.driver,
        link=found.link if found.link and gpus <= len(found.devices) else None if card is None else card.link_of(gpus),
        host_gbps=host_gbps,
        host_bytes=host,
        host_source=source,
        cores=usable_cores(root),
        network_gbps=network.gbps,
        network_kind=network.kind,
        price_per_gpu_hour=settings.price_per_gpu_hour,
        notes=(*found.notes, *_notes(found, devices, smallest, gpus)),
    )


def find(root: Path = ROOT, most: int | None = None) -> FoundGpus:
    """The GPUs that a process on this machine can use: NVIDIA's, else AMD's.

    Args:
        root: the folder that contains ``sys``.
        most: how many cards, from the first, to examine for their common link; None: all.
    """
    nvidia = nvml.find(most)
    if nvidia is not None and nvidia.devices:
        return nvidia
    return rocm.find(root, most) or nvidia or FoundGpus()


def cpu_machine(
    settings: MachineConfig, *, torch: str | None = None, root: Path = ROOT, notes: tuple[str, ...] = (), held: int = 0
) -> Machine:
    """This machine's CPU as a machine whose ranks share the host's memory.

    ``settings.gpus`` is the number of ranks (default 1).

    It has the rates that were measured with this torch, if there are any.

    Args:
        settings: the settings of the machine.
        torch: as for :func:`planned_machine`.
        root: as for :func:`planned_machine`.
        notes: remarks for the user.
        held: bytes of host memory that the run's own processes already hold; they count as available to the run.

    Raises:
        InputError: the settings ask for more memory than there is.
    """
    ranks, cores = settings.gpus or 1, usable_cores(root)
    memory, source = _host(settings, available_bytes(root) + held)
    card, network = cpu_card(cores, memory, ranks), Network.of(settings)
    rates = kept(Processor.here(torch)) if torch is not None and root == ROOT else Kept()
    usable = card.usable_bytes if settings.memory_gb is None else int(settings.memory_gb * GB)
    if usable > card.usable_bytes:
        raise InputError(
            f"memory_gb {settings.memory_gb:g}: each of {ranks} ranks on the cpu has {card.usable_bytes / GB:.2f} GB; "
            "give less, or omit it"
        )
    return Machine(
        name=card.name,
        usable_bytes=usable,
        card=card,
        capability=card.capability,
        gpus=ranks,
        nodes=settings.nodes,
        is_gpu=False,
        torch=torch,
        link=card.link_of(ranks),
        host_gbps=card.host_gbps,
        host_bytes=memory,
        host_source=source,
        cores=cores,
        network_gbps=network.gbps,
        network_kind=network.kind,
        price_per_gpu_hour=settings.price_per_gpu_hour,
        measured=rates.measured,
        notes=(*notes, *_rate_notes(rates)),
    )


def _rate_notes(rates: Kept) -> Iterator[str]:
    """At most one remark on a processor's stored rates: that they cannot be read, or that the machine was busy."""
    if rates.warning is not None:
        yield f"{rates.warning}; the next run measures them again"
    elif rates.measured is not None and not rates.measured.quiet:
        yield (
            "the processor's rates were measured while the machine was busy, so runs may be faster than predicted; "
            "`scalegpt doctor --measure` measures them again"
        )


def _host(settings: MachineConfig, available: int) -> tuple[int, str]:
    """Bytes of host memory to plan for, and their origin: :data:`GIVEN` in the settings, or :data:`FOUND` here.

    Raises:
        InputError: the settings ask for more host memory than is available.
    """
    if settings.host_memory_gb is None:
        return available, FOUND
    if settings.host_memory_gb * GB > available:
        raise InputError(
            f"host_memory_gb {settings.host_memory_gb:g}: this machine has {available / GB:.2f} GB available; "
            "give less, or omit it"
        )
    return int(settings.host_memory_gb * GB), GIVEN


def cpu_card(cores: int, memory: int, ranks: int = 1) -> Card:
    """One rank's share of a CPU, described as a card: ``cores`` and ``memory`` (bytes) are divided among ``ranks``."""
    rate = CORE_GBPS * cores / ranks
    estimated = f"~estimated from {cores} core{'s' if cores > 1 else ''}"
    return Card(
        name=f"cpu, {cores} core{'s' if cores > 1 else ''}",
        match=(),
        gb=max(1, round(memory / ranks / GB)),
        gib=memory / ranks / GIB,
        capability=CPU_CAPABILITY,
        tflops=CORE_TFLOPS * cores / ranks,
        gbps=rate,
        host_gbps=rate,
        link="host",
        link_gbps=rate,
        peer=True,
        sources={"gib": "the kernel", **dict.fromkeys(("tflops", "gbps", "host_gbps", "link_gbps", "peer"), estimated)},
    )


def _size(device: Device) -> tuple[float, float]:
    """A sort key for cards: free memory, then speed."""
    memory = float("inf") if device.free_bytes is None else device.free_bytes
    return memory, 0.0 if device.card is None else device.card.tflops


def _notes(found: FoundGpus, devices: tuple[Device, ...], smallest: Device, gpus: int) -> list[str]:
    notes = [_taken(device) for device in devices if device.is_taken]
    kinds = list(dict.fromkeys(device.name for device in devices))
    if len(kinds) > 1:
        size = "" if smallest.usable_bytes is None else f", {smallest.usable_bytes / GIB:.2f} GiB"
        notes.append(f"the GPUs differ ({', '.join(kinds)}); planned for the smallest, GPU {smallest.label}{size}")
    if gpus > len(found.devices):
        notes.append(f"planned for {gpus} GPUs, but this machine has {len(found.devices)}")
    if smallest.usable_bytes is None:
        notes.append(f"the driver does not report the memory of {smallest.name}; give --memory_gb")
    elif smallest.card is None:
        notes.append(f"{smallest.name} is not in the catalogue; see `scalegpt gpus --help` for how to add a card")
    return notes


def _taken(device: Device) -> str:
    """A note that other processes hold some of a card's memory."""
    held = f"{device.taken_bytes / GIB:.2f} GiB of GPU {device.label}"
    who = "" if not device.processes else f" ({device.processes} process{'es' if device.processes > 1 else ''})"
    return f"other processes hold {held}{who}; planned for the {(device.free_bytes or 0) / GIB:.2f} GiB that are free"
