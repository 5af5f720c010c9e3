"""AMD's cards by the kernel driver's files, laid out as Linux has them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from amdgpu_fake import GIB, lay_out, write
from scalegpt.hardware import rocm
from scalegpt.hardware.devices import FoundGpus

VARIABLES = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FoundGpus]:
    """What is found below a root, with the variables that are given."""

    def look(root: Path, most: int | None = None, **variables: str) -> FoundGpus:
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        result = rocm.find(root, most)
        assert result is not None
        return result

    return look


def test_one_card(tmp_path: Path, found: Any) -> None:
    result = found(lay_out(tmp_path))
    (device,) = result.devices
    assert (device.label, device.name, device.capability) == ("0", "AMD Instinct MI300X OAM", "gfx942")
    assert device.card is not None
    assert device.card.name == "MI300X"
    assert (device.usable_bytes, device.free_bytes, device.host_gbps) == (192 * GIB, 192 * GIB, 128)
    assert (result.link, result.driver) == (None, "6.10.5")


def test_no_card_by_amd(tmp_path: Path) -> None:
    assert rocm.find(tmp_path) is None
    assert rocm.find(lay_out(tmp_path, 0)) is None


@pytest.mark.parametrize(
    ("gfx", "name"), [(90010, "gfx90a"), (90402, "gfx942"), (110000, "gfx1100"), (90006, "gfx906"), (120001, "gfx1201")]
)
def test_architectures(gfx: int, name: str) -> None:
    assert rocm.architecture(gfx) == name


@pytest.mark.parametrize(
    ("gfx", "memory", "product", "card"),
    [
        (90402, 192, None, "MI300X"), (90402, 256, None, "MI325X"), (90402, 128, None, None), (110000, 24, None, None),
        (90010, 64, None, None),  # an MI210 has as much as one half of an MI250X
        (90010, 64, "AMD INSTINCT MI250X", "MI250X"), (90402, 192, "AMD Instinct MI308X", None),
    ],
)  # fmt: skip
def test_a_card_without_a_name_is_known_by_architecture_and_size(
    tmp_path: Path, found: Any, gfx: int, memory: int, product: str | None, card: str | None
) -> None:
    (device,) = found(lay_out(tmp_path, gfx=gfx, memory=memory * GIB, product=product)).devices
    assert (None if device.card is None else device.card.name) == card
    assert device.name == (product or f"AMD GPU {rocm.architecture(gfx)}")


@pytest.mark.parametrize(
    ("xgmi", "direct", "expected"),
    [
        (None, False, ("xgmi", 896, True)),
        ([(0, 1), (1, 2), (2, 3)], False, ("xgmi", 896, True)),  # by way of each other
        ([(0, 1), (2, 3)], False, ("pcie", 128, False)),
        ([], True, ("pcie", 128, True)),
    ],
)
def test_what_joins_the_cards(tmp_path: Path, found: Any, xgmi: Any, direct: bool, expected: Any) -> None:
    link = found(lay_out(tmp_path, 4, xgmi=xgmi, direct=direct)).link
    assert (link.kind, link.gbps, link.peer) == expected


def test_the_link_is_that_of_the_cards_that_are_wanted(tmp_path: Path, found: Any) -> None:
    lay_out(tmp_path, 4, xgmi=[(0, 1), (2, 3)])
    assert found(tmp_path, 2).link.kind == "xgmi"
    assert found(tmp_path, 1).link is None
    assert len(found(tmp_path, 1).devices) == 4


def test_a_link_that_is_not_reported_is_none(tmp_path: Path, found: Any) -> None:
    result = found(lay_out(tmp_path, 2, xgmi=[], pcie=None))
    assert result.link is None
    assert result.devices[0].host_gbps is None


@pytest.mark.parametrize(("speed", "gbps"), [("16.0 GT/s PCIe", 64), ("8.0 GT/s PCIe", 32), ("Unknown", None)])
def test_pcie(tmp_path: Path, found: Any, speed: str, gbps: float | None) -> None:
    assert found(lay_out(tmp_path, pcie=(speed, 16))).devices[0].host_gbps == gbps


def test_what_other_processes_hold(tmp_path: Path, found: Any) -> None:
    import os

    lay_out(tmp_path, 2)
    for pid, size in ((7, 3 * GIB), (8, GIB), (9, 0), (os.getpid(), GIB)):
        write(tmp_path / f"sys/class/kfd/kfd/proc/{pid}/vram_5001", size)
    first, second = found(tmp_path).devices
    assert not first.is_taken
    assert (second.taken_bytes, second.processes, second.free_bytes) == (4 * GIB, 2, 188 * GIB)


@pytest.mark.parametrize(
    ("variables", "nodes"),
    [
        ({}, "1234"), ({"HIP_VISIBLE_DEVICES": "2,0"}, "31"), ({"CUDA_VISIBLE_DEVICES": "1"}, "2"),
        ({"HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "1"}, "1"), ({"ROCR_VISIBLE_DEVICES": "1,3"}, "24"),
        ({"ROCR_VISIBLE_DEVICES": "1,3", "HIP_VISIBLE_DEVICES": "1"}, "4"), ({"HIP_VISIBLE_DEVICES": ""}, ""),
        ({"ROCR_VISIBLE_DEVICES": "GPU-00000000000000a2"}, "3"), ({"HIP_VISIBLE_DEVICES": "9"}, ""),
    ],
)  # fmt: skip
def test_the_cards_are_those_that_hip_shows(tmp_path: Path, found: Any, variables: dict[str, str], nodes: str) -> None:
    lay_out(tmp_path, 4)
    for number in range(4):
        write(tmp_path / f"sys/class/drm/card{number + 1}/device/mem_info_vram_total", (number + 1) * GIB)
    assert [device.usable_bytes // GIB for device in found(tmp_path, **variables).devices] == [
        int(node) for node in nodes
    ]
