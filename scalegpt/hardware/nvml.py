"""Finds NVIDIA's cards through NVML, the driver's own library, without torch.

**Memory.** The second version of ``nvmlDeviceGetMemoryInfo`` reports ``total`` (all memory of the card), ``reserved``
(by the driver), ``used`` (by processes) and ``free``. CUDA, and therefore
``torch.cuda.get_device_properties().total_memory``, reports ``total`` − ``reserved``: an RTX 4090 has 24564 MiB, and
torch prints 23.52 GiB. Older drivers have only the first version, in which ``total`` does not include the reserved
memory.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from typing import Any

from scalegpt.hardware.devices import Device, FoundGpus, visible, whole_card
from scalegpt.hardware.gpus import Link

P2P_READ, P2P_NVLINK, P2P_OK = 0, 2, 0
"""Two values of ``nvmlGpuP2PCapsIndex_t`` and one of ``nvmlGpuP2PStatus_t``, from ``nvml.h``. They are not taken from pynvml
since its ``NVML_P2P_CAPS_INDEX_READ`` is a tuple by mistake."""

NVLINK_GBPS = {1: 40.0, 2: 50.0, 3: 50.0, 4: 50.0, 5: 100.0}
"""NVLink version → GB/s of one link, sum of both directions. A V100 has 6 links of version 2, 300 GB/s in total; a B200 has
18 of version 5, 1800 GB/s."""

PCIE_GBPS = {1: 0.5, 2: 1.0, 3: 2.0, 4: 4.0, 5: 8.0, 6: 16.0}
"""PCIe generation → GB/s of one lane, sum of both directions, as vendors print it: 16 lanes of PCIe 4 have 64 GB/s."""


class NoNvmlError(Exception):
    """NVML cannot be used.

    ``reason`` says why; it is None if NVML is not installed, for example without NVIDIA's GPUs.
    """

    def __init__(self, reason: str | None = None) -> None:
        super().__init__(reason or "NVML is not installed")
        self.reason = reason


@contextmanager
def session() -> Iterator[Any]:
    """Yield the module ``pynvml``, with NVML initialized until the ``with`` block ends.

    Raises:
        NoNvmlError: NVML is not installed, the driver does not work, or a card fails within the ``with`` block.
    """
    try:
        import pynvml
    except ImportError:
        raise NoNvmlError from None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        absent = error.value == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND
        raise NoNvmlError(None if absent else str(error)) from None
    try:
        yield pynvml
    except pynvml.NVMLError as error:  # such as a card that has fallen off the bus
        raise NoNvmlError(str(error)) from None
    finally:
        pynvml.nvmlShutdown()


def ask(nvml: Any, call: str, *arguments: Any) -> Any:
    """Call the NVML function ``call`` and return its result; None if the card, the driver or pynvml does not support it."""
    try:
        return getattr(nvml, call)(*arguments)
    except (AttributeError, nvml.NVMLError):
        return None


def driver_version() -> str | None:
    """The version of NVIDIA's driver; None if there is no NVML, for example with ROCm."""
    try:
        with session() as nvml:
            version: str | None = ask(nvml, "nvmlSystemGetDriverVersion")
            return version
    except NoNvmlError:
        return None


def listed_bytes(uuid: str) -> dict[int, int] | None:
    """Process id → bytes that the process holds on the card with this UUID; 0 if NVML does not report the bytes.

    The result is None if there is no NVML or no such card.
    """
    try:
        with session() as nvml:
            handle = ask(nvml, "nvmlDeviceGetHandleByUUID", uuid)
            return None if handle is None else _processes(nvml, handle, "Compute")
    except NoNvmlError:
        return None


def energy_joules(uuid: str) -> float | None:
    """The energy in joules that the card with this UUID has taken since its driver was loaded; None: not reported."""
    try:
        with session() as nvml:
            handle = ask(nvml, "nvmlDeviceGetHandleByUUID", uuid)
            millijoules = None if handle is None else ask(nvml, "nvmlDeviceGetTotalEnergyConsumption", handle)
            return None if millijoules is None else millijoules / 1000
    except NoNvmlError:
        return None


class CardGauge:
    """Reads a card's memory in use and its utilization repeatedly. NVML stays initialized while the process lives.

    Args:
        uuid: the card's UUID, such as ``GPU-…``.
    """

    def __init__(self, uuid: str) -> None:
        self._nvml: Any = None
        try:
            import pynvml

            pynvml.nvmlInit()
        except Exception:  # pynvml is missing, or the driver does not work: the gauge has no readings
            return
        self._nvml, self._handle = pynvml, ask(pynvml, "nvmlDeviceGetHandleByUUID", uuid)

    def read(self) -> dict[str, float]:
        """Return ``gpu_used_bytes`` (by all processes) and ``gpu_utilization`` (from 0 to 1), if NVML reports them."""
        if self._nvml is None or self._handle is None:
            return {}
        memory = ask(self._nvml, "nvmlDeviceGetMemoryInfo", self._handle)
        busy = ask(self._nvml, "nvmlDeviceGetUtilizationRates", self._handle)
        found: dict[str, float] = {} if memory is None else {"gpu_used_bytes": int(memory.used)}
        return found if busy is None else {**found, "gpu_utilization": busy.gpu / 100}


def find(most: int | None = None) -> FoundGpus | None:
    """Find NVIDIA's cards that ``CUDA_VISIBLE_DEVICES`` lets a process use; None if there is no NVML.

    If the driver does not work, the result has no cards and a note about it.

    Args:
        most: number of cards, from the first, whose common link (NVLink or PCIe) is looked up; None: all cards.
    """
    try:
        with session() as nvml:
            return _find(nvml, most)
    except NoNvmlError as error:
        return FoundGpus(notes=(f"NVIDIA's driver does not answer ({error.reason})",)) if error.reason else None


def _find(nvml: Any, most: int | None) -> FoundGpus:
    wholes = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    parts = [_mig_devices(nvml, handle) for handle in wholes]
    names = [
        [ask(nvml, "nvmlDeviceGetUUID", each) or "" for each in (handle, *(own or ()))]
        for handle, own in zip(wholes, parts, strict=True)
    ]
    text = os.environ.get("CUDA_VISIBLE_DEVICES")
    places = visible(text, names)
    whole = [place for place in places if parts[place] is None]
    driver = ask(nvml, "nvmlSystemGetDriverVersion")
    if whole:
        devices = tuple(_device(nvml, str(place), wholes[place]) for place in whole)
        return FoundGpus(
            devices=devices,
            link=_link(nvml, [wholes[place] for place in whole[:most]], devices[0]),
            driver=driver,
            notes=_uncertain_order(nvml, wholes, text, len(whole)),
        )
    divided = next((place for place in places if parts[place]), None)
    if divided is None:
        return FoundGpus(driver=driver)
    part = _named_part(text, names[divided])
    device = _device(nvml, f"{divided}:{part}", (parts[divided] or [])[part], of=wholes[divided])
    alone = f"planned for MIG device {device.label} alone, since CUDA shows a process only one"
    several = sum(len(each or ()) for each in parts) > 1
    return FoundGpus(devices=(device,), driver=driver, notes=(alone,) if several else ())


def _mig_devices(nvml: Any, handle: Any) -> list[Any] | None:
    """The NVML handles of a card's MIG devices; None if the card is not in MIG mode."""
    mode = ask(nvml, "nvmlDeviceGetMigMode", handle)
    if not mode or mode[0] != nvml.NVML_DEVICE_MIG_ENABLE:
        return None
    most = ask(nvml, "nvmlDeviceGetMaxMigDeviceCount", handle) or 0
    found = [ask(nvml, "nvmlDeviceGetMigDeviceHandleByIndex", handle, index) for index in range(most)]
    return [part for part in found if part is not None]


def _named_part(text: str | None, names: list[str]) -> int:
    """The index of the MIG device of a card that ``CUDA_VISIBLE_DEVICES`` names; 0 if it names none of them.

    Args:
        text: the variable's value; None: it is not set.
        names: the UUIDs of the card and of its MIG devices.
    """
    word = (text or "").split(",")[0].strip()
    return next((place for place, name in enumerate(names[1:]) if word.startswith("MIG") and name.startswith(word)), 0)


def _uncertain_order(nvml: Any, wholes: list[Any], text: str | None, shown: int) -> tuple[str, ...]:
    """A note if ``CUDA_VISIBLE_DEVICES`` may select other cards than assumed here, else nothing.

    CUDA numbers cards by speed by default, and NVML by PCI bus. That matters only if the cards differ and the variable
    selects some of them by number.

    Args:
        nvml: the module ``pynvml``.
        wholes: the handles of all cards.
        text: the value of ``CUDA_VISIBLE_DEVICES``; None: it is not set.
        shown: the number of cards that the variable selects.
    """
    if text is None or shown == len(wholes) or "GPU-" in text or os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID":
        return ()
    if len({ask(nvml, "nvmlDeviceGetName", handle) for handle in wholes}) == 1:
        return ()
    return ("the GPUs differ, and CUDA may number them differently; set CUDA_DEVICE_ORDER=PCI_BUS_ID to be sure",)


def _device(nvml: Any, label: str, handle: Any, of: Any = None) -> Device:
    """The description of the card with this NVML handle, or if ``of`` is given, of a MIG device of the card ``of``."""
    name = ask(nvml, "nvmlDeviceGetName", handle) or "unknown GPU"
    if of is not None and "MIG" not in name:
        name = f"{name} MIG"
    usable, free = _memory(nvml, handle)
    listed = {**(_processes(nvml, handle, "Graphics") or {}), **(_processes(nvml, handle, "Compute") or {})}
    ours = listed.pop(os.getpid(), 0)
    whole = handle if of is None else of
    capability = ask(nvml, "nvmlDeviceGetCudaComputeCapability", whole)
    # The maximum is read, since the current PCIe speed is lower while a card is idle.
    generation = ask(nvml, "nvmlDeviceGetMaxPcieLinkGeneration", whole)
    lanes = ask(nvml, "nvmlDeviceGetMaxPcieLinkWidth", whole)
    return Device(
        label=label,
        name=name,
        usable_bytes=usable,
        taken_bytes=0 if usable is None or free is None else max(0, usable - free - ours),
        processes=len(listed),
        capability=None if capability is None else f"{capability[0]}.{capability[1]}",
        card=whole_card(name, None, usable) if of is None else None,
        host_gbps=PCIE_GBPS[generation] * lanes if generation in PCIE_GBPS and lanes else None,
    )


def _memory(nvml: Any, handle: Any) -> tuple[int | None, int | None]:
    """The bytes of a card's memory that CUDA reports as total, and the bytes that are free; None: not reported."""
    info = ask(nvml, "nvmlDeviceGetMemoryInfo", handle, getattr(nvml, "nvmlMemory_v2", None))
    if info is not None and hasattr(info, "reserved"):
        return int(info.total - info.reserved), int(info.free)
    info = ask(nvml, "nvmlDeviceGetMemoryInfo", handle)
    return (None, None) if info is None else (int(info.total), int(info.free))


def _processes(nvml: Any, handle: Any, kind: str) -> dict[int, int] | None:
    listed = ask(nvml, f"nvmlDeviceGet{kind}RunningProcesses", handle)
    return None if listed is None else {each.pid: each.usedGpuMemory or 0 for each in listed}


def _link(nvml: Any, handles: list[Any], first: Device) -> Link | None:
    """The link between the cards: NVLink if it joins every pair, else PCIe; None for a single card, or if it is not known."""
    card, pairs = first.card, list(combinations(handles, 2))
    if not pairs:
        return None
    if all(ask(nvml, "nvmlDeviceGetP2PStatus", *pair, P2P_NVLINK) == P2P_OK for pair in pairs):
        of_kind = card.link_gbps if card is not None and card.link == "nvlink" else None
        gbps = of_kind or _nvlink_gbps(nvml, handles[0])
        return Link(kind="nvlink", gbps=gbps, peer=True) if gbps else None
    reads = [ask(nvml, "nvmlDeviceGetP2PStatus", *pair, P2P_READ) for pair in pairs]
    if first.host_gbps is None or None in reads:
        return None
    return Link(kind="pcie", gbps=first.host_gbps, peer=all(status == P2P_OK for status in reads))


def _nvlink_gbps(nvml: Any, handle: Any) -> float:
    """The bandwidth of all active NVLinks of a card together, in GB/s, sum of both directions."""
    links = range(nvml.NVML_NVLINK_MAX_LINKS)
    active = [link for link in links if ask(nvml, "nvmlDeviceGetNvLinkState", handle, link) == 1]
    return sum(NVLINK_GBPS.get(ask(nvml, "nvmlDeviceGetNvLinkVersion", handle, link), 0.0) for link in active)
