"""NVIDIA's cards as NVML reports them: memory, what others hold, links, MIG, and every way in which there are none."""

import os
import sys
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest

from nvml_fake import DRIVER_NOT_LOADED, LIBRARY_NOT_FOUND, MIB, Fake, Gpu, a100
from scalegpt.hardware import nvml
from scalegpt.hardware.devices import FoundGpus
from scalegpt.hardware.gpus import find_card

GIB = 2**30


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Fake]:
    """Put a machine behind NVML; keywords ``visible`` and ``order`` set CUDA's variables."""

    def put(gpus: list[Gpu], visible: str | None = None, order: str | None = None, **others: Any) -> Fake:
        for name, value in (("CUDA_VISIBLE_DEVICES", visible), ("CUDA_DEVICE_ORDER", order)):
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        module = Fake(gpus, **others)
        monkeypatch.setitem(sys.modules, "pynvml", module)
        return module

    return put


def found(most: int | None = None) -> FoundGpus:
    result = nvml.find(most)
    assert result is not None
    return result


def test_one_card(machine: Any) -> None:
    module = machine([Gpu()])
    (device,) = found().devices
    assert (device.label, device.name, device.capability) == ("0", "NVIDIA GeForce RTX 4090", "8.9")
    assert device.card == find_card("4090")
    assert round((device.usable_bytes or 0) / GIB, 2) == 23.52  # what torch prints, of 24564 MiB
    assert device.free_bytes == device.usable_bytes
    assert device.host_gbps == 64
    assert (found().link, found().driver, found().notes) == (None, "580.65.06", ())
    assert module.open == 0  # every session was closed


def test_eight_cards_with_nvlink(machine: Any) -> None:
    machine([a100(number) for number in range(8)], nvlink="all")
    assert len(found().devices) == 8
    link = found().link
    assert link is not None
    assert (link.kind, link.gbps, link.peer) == ("nvlink", 600, True)


def test_nvlink_between_some_pairs_is_nvlink_only_for_those(machine: Any) -> None:
    bridges = {frozenset((0, 1)), frozenset((2, 3))}
    machine([Gpu(name="NVIDIA GeForce RTX 3090") for _ in range(4)], nvlink=bridges, peer=False)
    four, two = found().link, found(2).link
    assert four is not None
    assert two is not None
    assert (four.kind, four.gbps, four.peer) == ("pcie", 64, False)
    assert (two.kind, two.gbps, two.peer) == ("nvlink", 112.5, True)
    assert found(1).link is None
    machine(
        [Gpu() for _ in range(3)], nvlink={frozenset(pair) for pair in combinations(range(3), 2)} - {frozenset((1, 2))}
    )
    assert (found().link or four).kind == "pcie"


@pytest.mark.parametrize(("links", "gbps"), [((3,) * 12, 600), ((3,) * 4, 200), ((2,) * 6, 300), ((5,) * 18, 1800)])
def test_bridges_on_a_card_that_seldom_has_them_are_counted(machine: Any, links: tuple[int, ...], gbps: float) -> None:
    machine([Gpu(name="NVIDIA A100 80GB PCIe", links=links) for _ in range(2)], nvlink="all")
    link = found().link
    assert link is not None
    assert (link.kind, link.gbps) == ("nvlink", gbps)


@pytest.mark.parametrize(("pcie", "gbps"), [((3, 16), 32), ((4, 16), 64), ((5, 16), 128), ((4, 8), 32), ((3, 4), 8)])
def test_pcie_is_what_card_and_slot_can_do(machine: Any, pcie: tuple[int, int], gbps: float) -> None:
    machine([Gpu(pcie=pcie), Gpu(pcie=pcie)])
    link = found().link
    assert link is not None
    assert (link.kind, link.gbps, link.peer) == ("pcie", gbps, True)
    assert found().devices[0].host_gbps == gbps


def test_a_link_that_is_not_reported_is_none(machine: Any) -> None:
    machine([Gpu(pcie=None), Gpu(pcie=None)])
    assert found().link is None
    assert found().devices[0].host_gbps is None


def test_what_others_hold_is_taken_off(machine: Any) -> None:
    machine(
        [Gpu(processes={7: 3 * GIB, 8: GIB, os.getpid(): 2 * GIB}), Gpu(held=5 * GIB), Gpu(processes={9: 10 * MIB})]
    )
    first, second, third = found().devices
    assert (first.taken_bytes, first.processes, first.is_taken) == (4 * GIB, 2, True)  # ours is not another's
    assert first.free_bytes == (first.usable_bytes or 0) - 4 * GIB
    assert (second.taken_bytes, second.processes) == (5 * GIB, 0)
    assert not third.is_taken
    assert third.free_bytes == third.usable_bytes


def test_an_old_drivers_figures_leave_the_reserved_part_out_by_themselves(machine: Any) -> None:
    machine([Gpu(held=GIB)], old=True, driver="470.1")
    (device,) = found().devices
    assert round((device.usable_bytes or 0) / GIB, 2) == 23.52
    assert device.taken_bytes == GIB
    assert found().driver == "470.1"


@pytest.mark.parametrize(
    ("visible", "labels"),
    [
        (None, "0123"), ("0", "0"), ("2,0", "20"), ("", ""), ("-1", ""), ("1,-1,2", "1"), ("0,9,1", "0"), ("1, 3", "13"),
        ("GPU-a100-2", "2"), ("GPU-a100-3,GPU-a100-0", "30"), ("GPU-a100", ""), ("GPU-b", ""), ("0,0", "0"), ("x", ""),
    ],
)  # fmt: skip
def test_the_cards_are_those_that_cuda_shows(machine: Any, visible: str | None, labels: str) -> None:
    machine([a100(number) for number in range(4)], visible=visible)
    assert [device.label for device in found().devices] == list(labels)


def test_an_index_among_different_cards_may_mean_another_to_cuda(machine: Any) -> None:
    mixed = [a100(0), Gpu()]
    machine(mixed, visible="1")
    assert any("CUDA_DEVICE_ORDER=PCI_BUS_ID" in note for note in found().notes)
    for certain in (
        {"visible": "1", "order": "PCI_BUS_ID"},
        {"visible": "GPU-0"},
        {"visible": None},
        {"visible": "0,1"},
    ):
        machine(mixed, **certain)
        assert found().notes == ()


def divided(number: int = 0) -> Gpu:
    parts = [
        Gpu(name=f"NVIDIA A100-SXM4-40GB MIG {size}g.{gb}gb", uuid=f"MIG-{number}{size}", total_mib=gb * 1024 - 200,
            reserved_mib=0, is_part=True)
        for size, gb in ((1, 5), (3, 20))
    ]  # fmt: skip
    return a100(number, parts=parts)


def test_a_mig_device_is_a_card_of_its_own(machine: Any) -> None:
    machine([divided()])
    (device,) = found().devices
    assert (device.label, device.name, device.card) == ("0:0", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", None)
    assert device.usable_bytes == (5 * 1024 - 200) * MIB
    assert (device.capability, device.host_gbps) == ("8.0", 64)  # the card's: the part does not report it
    assert found().notes == ("planned for MIG device 0:0 alone, since CUDA shows a process only one",)


@pytest.mark.parametrize(
    ("visible", "label"), [("MIG-03", "0:1"), ("MIG-01", "0:0"), ("0", "0:0"), ("MIG-03,MIG-01", "0:1")]
)
def test_the_mig_device_is_the_one_that_is_named(machine: Any, visible: str, label: str) -> None:
    machine([divided()], visible=visible)
    assert [device.label for device in found().devices] == [label]


def test_whole_cards_beside_a_divided_one_are_used(machine: Any) -> None:
    machine([divided(0), a100(1), a100(2)], nvlink="all")
    assert [device.label for device in found().devices] == ["1", "2"]
    assert found().notes == ()


def test_a_divided_card_without_parts_has_nothing_to_use(machine: Any) -> None:
    machine([a100(0, parts=[])])
    assert found().devices == ()


def test_there_may_be_no_device(machine: Any) -> None:
    machine([])
    assert found() == FoundGpus(driver="580.65.06")


def test_a_driver_that_does_not_work_is_reported(machine: Any) -> None:
    machine([], fails=DRIVER_NOT_LOADED)
    assert found() == FoundGpus(notes=("NVIDIA's driver does not answer (Driver Not Loaded)",))
    machine([Gpu(), Gpu(lost=True)])
    assert found() == FoundGpus(notes=("NVIDIA's driver does not answer (GPU is lost)",))


def test_without_nvml_nothing_is_found(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine([], fails=LIBRARY_NOT_FOUND)
    assert nvml.find() is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvml.find() is None
    assert nvml.driver_version() is None
    assert nvml.listed_bytes("GPU-0") is None


def test_processes_of_a_card_by_its_uuid(machine: Any) -> None:
    machine([Gpu(processes={1: 5, 2: None})])
    assert nvml.listed_bytes("GPU-0") == {1: 5, 2: 0}
    assert nvml.listed_bytes("GPU-1") is None
    assert nvml.driver_version() == "580.65.06"


def test_energy_of_a_card(machine: Any) -> None:
    machine([Gpu(), Gpu(uuid="GPU-old", millijoules=None)])
    assert nvml.energy_joules("GPU-0") == 5000
    assert nvml.energy_joules("GPU-old") is None
    assert nvml.energy_joules("GPU-none") is None
    machine([], fails=LIBRARY_NOT_FOUND)
    assert nvml.energy_joules("GPU-0") is None


def test_the_fake_has_the_calls_of_the_real_library() -> None:
    real = pytest.importorskip("pynvml")
    calls = [name for name in dir(Fake) if name.startswith(("nvml", "NVML"))]
    assert len(calls) > 20
    assert [name for name in calls if not hasattr(real, name)] == []
    assert (real.NVML_ERROR_LIBRARY_NOT_FOUND, real.NVML_ERROR_DRIVER_NOT_LOADED) == (
        LIBRARY_NOT_FOUND,
        DRIVER_NOT_LOADED,
    )
    assert (real.NVML_P2P_CAPS_INDEX_NVLINK, real.NVML_P2P_STATUS_OK) == (nvml.P2P_NVLINK, nvml.P2P_OK)
    assert (real.nvmlMemory_v2, real.NVML_DEVICE_MIG_ENABLE) == (Fake.nvmlMemory_v2, 1)
