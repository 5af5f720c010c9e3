# ruff: noqa: N802 - the names are NVML's
"""NVML as its C interface is documented, over a machine that a test describes; put in pynvml's place.

Every call that :mod:`scalegpt.hardware.nvml` makes is answered as the driver does: by value, or with the error that it
raises.
"""

from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

MIB = 2**20
NOT_SUPPORTED, NOT_FOUND, DRIVER_NOT_LOADED, LIBRARY_NOT_FOUND, GPU_IS_LOST = 3, 6, 9, 12, 15


WORDS = {
    NOT_SUPPORTED: "Not Supported",
    NOT_FOUND: "Not Found",
    DRIVER_NOT_LOADED: "Driver Not Loaded",
    LIBRARY_NOT_FOUND: "NVML Shared Library Not Found",
    GPU_IS_LOST: "GPU is lost",
}


class FakeNVMLError(Exception):
    """``NVMLError`` with its code."""

    def __init__(self, value: int) -> None:
        super().__init__(WORDS[value])
        self.value = value


@dataclass(eq=False)
class Gpu:
    """A card, or a MIG device of one.

    Attributes:
        processes: pid → bytes, None where NVML does not say how many.
        held: bytes in use that no process is listed for, as seen from a container.
        links: versions of the active NVLinks.
        parts: its MIG devices; None: MIG is off, and the card may not have it.
        lost: it has fallen off the bus.
        millijoules: energy since the driver was loaded; None: an older card, which does not measure it.
    """

    name: str = "NVIDIA GeForce RTX 4090"
    uuid: str = "GPU-0"
    total_mib: int = 24564
    reserved_mib: int = 482
    capability: tuple[int, int] = (8, 9)
    processes: dict[int, int | None] = field(default_factory=dict)
    held: int = 0
    pcie: tuple[int, int] | None = (4, 16)
    links: tuple[int, ...] = ()
    parts: "list[Gpu] | None" = None
    lost: bool = False
    is_part: bool = False
    millijoules: int | None = 5_000_000

    @property
    def used(self) -> int:
        return self.held + sum(size or 0 for size in self.processes.values())


def a100(number: int, **others: Any) -> Gpu:
    """An A100 with SXM and twelve NVLinks."""
    values: dict[str, Any] = {
        "capability": (8, 0),
        "total_mib": 40960,
        "reserved_mib": 512,
        "links": (3,) * 12,
        **others,
    }
    return Gpu(name="NVIDIA A100-SXM4-40GB", uuid=f"GPU-a100-{number}", **values)


class Fake(ModuleType):
    """The module.

    Args:
        gpus: the machine's cards.
        nvlink: the pairs of cards that NVLink joins, or ``all`` or ``none``.
        peer: whether cards copy directly over PCIe; the answer is a status of the chipset's where not.
        fails: the code that the start fails with.
        old: a driver that has the first version of the memory's figures only, without the reserved part.
        driver: its version.
    """

    NVMLError = FakeNVMLError
    NVML_ERROR_LIBRARY_NOT_FOUND = LIBRARY_NOT_FOUND
    NVML_DEVICE_MIG_ENABLE = 1
    NVML_NVLINK_MAX_LINKS = 18
    nvmlMemory_v2 = 0x02000028  # noqa: N815

    def __init__(
        self,
        gpus: list[Gpu],
        *,
        nvlink: set[frozenset[int]] | str = "none",
        peer: bool = True,
        fails: int | None = None,
        old: bool = False,
        driver: str = "580.65.06",
    ) -> None:
        super().__init__("pynvml")
        self.gpus, self.nvlink, self.peer, self.fails, self.old, self.driver = gpus, nvlink, peer, fails, old, driver
        self.open = 0

    def nvmlInit(self) -> None:
        if self.fails is not None:
            raise FakeNVMLError(self.fails)
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return self.driver

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Gpu:
        if self.gpus[index].lost:
            raise FakeNVMLError(GPU_IS_LOST)
        return self.gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Gpu:
        found = [gpu for gpu in self.gpus if gpu.uuid == uuid]
        if not found:
            raise FakeNVMLError(NOT_FOUND)
        return found[0]

    def nvmlDeviceGetName(self, gpu: Gpu) -> str:
        return gpu.name

    def nvmlDeviceGetUUID(self, gpu: Gpu) -> str:
        return gpu.uuid

    def nvmlDeviceGetMemoryInfo(self, gpu: Gpu, version: int | None = None) -> SimpleNamespace:
        total, reserved = gpu.total_mib * MIB, gpu.reserved_mib * MIB
        if version is None:
            return SimpleNamespace(total=total - reserved, free=total - reserved - gpu.used, used=gpu.used)
        if self.old:
            raise FakeNVMLError(NOT_SUPPORTED)
        return SimpleNamespace(total=total, reserved=reserved, free=total - reserved - gpu.used, used=gpu.used)

    def nvmlDeviceGetCudaComputeCapability(self, gpu: Gpu) -> tuple[int, int]:
        if gpu.is_part:
            raise FakeNVMLError(NOT_SUPPORTED)
        return gpu.capability

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: Gpu) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in gpu.processes.items()]

    def nvmlDeviceGetGraphicsRunningProcesses(self, gpu: Gpu) -> list[SimpleNamespace]:
        return []

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu: Gpu) -> int:
        if gpu.millijoules is None:
            raise FakeNVMLError(NOT_SUPPORTED)
        return gpu.millijoules

    def nvmlDeviceGetMigMode(self, gpu: Gpu) -> tuple[int, int]:
        if gpu.parts is None:
            raise FakeNVMLError(NOT_SUPPORTED)
        return 1, 1

    def nvmlDeviceGetMaxMigDeviceCount(self, gpu: Gpu) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, gpu: Gpu, index: int) -> Gpu:
        if index >= len(gpu.parts or []):
            raise FakeNVMLError(NOT_FOUND)
        return (gpu.parts or [])[index]

    def nvmlDeviceGetP2PStatus(self, one: Gpu, other: Gpu, what: int) -> int:
        assert isinstance(what, int)
        pair = frozenset((self.gpus.index(one), self.gpus.index(other)))
        joined = self.nvlink == "all" or (not isinstance(self.nvlink, str) and pair in self.nvlink)
        return 0 if joined or (what == 0 and self.peer) else 1

    def nvmlDeviceGetMaxPcieLinkGeneration(self, gpu: Gpu) -> int:
        return self._pcie(gpu)[0]

    def nvmlDeviceGetMaxPcieLinkWidth(self, gpu: Gpu) -> int:
        return self._pcie(gpu)[1]

    def nvmlDeviceGetNvLinkState(self, gpu: Gpu, link: int) -> int:
        if not gpu.links:
            raise FakeNVMLError(NOT_SUPPORTED)
        return int(link < len(gpu.links))

    def nvmlDeviceGetNvLinkVersion(self, gpu: Gpu, link: int) -> int:
        return gpu.links[link]

    def _pcie(self, gpu: Gpu) -> tuple[int, int]:
        if gpu.pcie is None or gpu.is_part:
            raise FakeNVMLError(NOT_SUPPORTED)
        return gpu.pcie
