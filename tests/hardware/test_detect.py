"""The machine at hand: what is planned for, and what is said of it."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from amdgpu_fake import lay_out
from nvml_fake import DRIVER_NOT_LOADED, Fake, Gpu, a100
from scalegpt.config.machine import MachineConfig
from scalegpt.errors import InputError
from scalegpt.hardware import detect
from scalegpt.hardware.detect import cpu_card, planned_machine
from scalegpt.hardware.gpus import find_card
from scalegpt.hardware.machine import Machine

GIB = 2**30
HOST, CORES = 48 * GIB, 6


@pytest.fixture
def at_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Machine]:
    """The machine that settings mean on one with these cards, 48 GiB of host memory and 6 cores."""
    monkeypatch.setattr(detect, "available_bytes", lambda root: HOST)
    monkeypatch.setattr(detect, "usable_cores", lambda root: CORES)
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)

    def look(gpus: list[Gpu], settings: dict[str, Any] | None = None, **others: Any) -> Machine:
        monkeypatch.setitem(sys.modules, "pynvml", Fake(gpus, **others))
        return planned_machine(MachineConfig(**(settings or {})), torch="2.13.0", root=tmp_path)

    return look


def test_all_cards_are_planned_for(at_hand: Any) -> None:
    machine = at_hand([a100(number) for number in range(8)], {"nodes": 2, "network_gbps": 400}, nvlink="all")
    assert (machine.name, machine.card) == ("NVIDIA A100-SXM4-40GB", find_card("a100-40gb"))
    assert (machine.gpus, machine.nodes, machine.ranks, machine.is_gpu) == (8, 2, 16, True)
    assert machine.usable_bytes == (40960 - 512) * 2**20
    assert (machine.link.kind, machine.link.gbps, machine.host_gbps) == ("nvlink", 600, 64)
    assert (machine.host_bytes, machine.cores, machine.network_gbps) == (HOST, CORES, 400)
    assert (machine.driver, machine.torch, machine.capability) == ("580.65.06", "2.13.0", "8.0")
    assert machine.notes == ()


def test_fewer_cards_are_the_first_and_have_their_own_link(at_hand: Any) -> None:
    bridged = {frozenset((0, 1))}
    cards = [Gpu(name="NVIDIA GeForce RTX 3090", held=number * GIB) for number in range(4)]
    two = at_hand(cards, {"gpus": 2}, nvlink=bridged)
    assert (two.gpus, two.link.kind) == (2, "nvlink")
    assert [note.split(";")[0] for note in two.notes] == ["other processes hold 1.00 GiB of GPU 1"]
    assert at_hand(cards, nvlink=bridged, peer=False).link.kind == "pcie"


def test_more_cards_than_there_are_is_allowed_and_said(at_hand: Any) -> None:
    cards = [Gpu(name="NVIDIA GeForce RTX 3090")] * 2
    machine = at_hand(cards, {"gpus": 8}, nvlink="all")
    assert machine.gpus == 8
    assert machine.notes == ("planned for 8 GPUs, but this machine has 2",)
    assert (machine.link.kind, machine.link.peer) == ("pcie", False)  # a bridge joins two


def test_one_card_has_its_kinds_link(at_hand: Any) -> None:
    assert at_hand([a100(0)]).link == find_card("a100-40gb").link_of(1)
    assert at_hand([a100(0, pcie=None)]).host_gbps == 64  # the catalogue's


def test_memory_that_others_hold_is_not_planned_for(at_hand: Any) -> None:
    machine = at_hand([Gpu(), Gpu(processes={1: 6 * GIB, 2: 4 * GIB})])
    whole = (24564 - 482) * 2**20
    assert machine.usable_bytes == whole - 10 * GIB
    assert machine.notes == (
        "other processes hold 10.00 GiB of GPU 1 (2 processes); planned for the 13.52 GiB that are free",
    )  # fmt: skip


def test_of_mixed_cards_the_smallest_is_planned_for(at_hand: Any) -> None:
    machine = at_hand(
        [Gpu(), Gpu(name="NVIDIA GeForce RTX 3080", total_mib=10240, reserved_mib=225, capability=(8, 6)), Gpu()]
    )
    assert (machine.name, machine.card, machine.gpus) == ("NVIDIA GeForce RTX 3080", find_card("3080"), 3)
    assert machine.usable_bytes == (10240 - 225) * 2**20
    assert machine.notes == (
        "the GPUs differ (NVIDIA GeForce RTX 4090, NVIDIA GeForce RTX 3080); planned for the smallest, GPU 1, 9.78 GiB",
    )
    full = at_hand([Gpu(held=20 * GIB), Gpu(name="NVIDIA GeForce RTX 3080", total_mib=10240)])
    assert full.name == "NVIDIA GeForce RTX 4090"  # it has the least left


def test_a_card_that_is_not_known_is_said_and_has_no_rates(at_hand: Any) -> None:
    machine = at_hand([Gpu(name="NVIDIA TITAN V", capability=(7, 0), total_mib=12288)])
    assert (machine.card, machine.capability) == (None, "7.0")
    assert machine.usable_bytes == (12288 - 482) * 2**20
    assert machine.notes == (
        "NVIDIA TITAN V is not in the catalogue; see `scalegpt gpus --help` for how to add a card",
    )


def test_a_mig_device_is_of_no_known_kind(at_hand: Any) -> None:
    part = Gpu(name="NVIDIA A100-SXM4-40GB MIG 3g.20gb", uuid="MIG-1", total_mib=19968, reserved_mib=0, is_part=True)
    machine = at_hand([a100(0, parts=[part])])
    assert (machine.card, machine.usable_bytes, machine.gpus) == (None, 19968 * 2**20, 1)


@pytest.mark.parametrize("fails", [None, DRIVER_NOT_LOADED])
def test_without_a_gpu_it_is_the_processor(at_hand: Any, fails: int | None) -> None:
    machine = at_hand([], {"gpus": 3}, fails=fails)
    assert (machine.name, machine.is_gpu, machine.capability) == ("cpu, 6 cores", False, "cpu")
    assert (machine.gpus, machine.ranks, machine.usable_bytes, machine.host_bytes) == (3, 3, HOST // 3, HOST)
    assert machine.card == cpu_card(CORES, HOST, 3)
    assert machine.link.kind == "host"
    assert machine.notes == (() if fails is None else ("NVIDIA's driver does not answer (Driver Not Loaded)",))
    assert at_hand([], fails=fails).gpus == 1


def test_amds_cards_are_found_where_there_are_none_of_nvidias(at_hand: Any, tmp_path: Path) -> None:
    lay_out(tmp_path, 2)
    machine = at_hand([])
    assert (machine.name, machine.gpus, machine.capability) == ("AMD Instinct MI300X OAM", 2, "gfx942")
    assert machine.usable_bytes == 192 * GIB
    assert machine.link.kind == "xgmi"


def test_the_processor_can_be_asked_for(at_hand: Any) -> None:
    assert at_hand([Gpu()], {"gpu": "cpu"}).name == "cpu, 6 cores"
    part = at_hand([Gpu()], {"gpu": "cpu", "gpus": 2, "memory_gb": 8.0})
    assert (part.usable_bytes, part.host_bytes) == (8 * 10**9, HOST)
    with pytest.raises(
        InputError, match=r"memory_gb 30: each of 2 ranks on the cpu has 25.77 GB; give less, or omit it"
    ):
        at_hand([], {"gpu": "cpu", "gpus": 2, "memory_gb": 30.0})


@pytest.mark.parametrize("settings", [{"gpu": "4090"}, {"memory_gb": 12.0}, {"gpu": "4090", "memory_gb": 12.0}])
def test_what_is_named_is_not_looked_for(at_hand: Any, settings: dict[str, Any]) -> None:
    expected = Machine.of(MachineConfig(**settings), torch="2.13.0")
    assert at_hand([a100(0)] * 4, settings) == expected
    assert expected.gpus == 1


def test_a_processor_as_a_card() -> None:
    card = cpu_card(4, 32 * GIB)
    assert (card.tflops, card.gbps, card.usable_bytes, card.gb) == (0.2, 40, 32 * GIB, 34)
    assert set(card.estimated) == {"tflops", "gbps", "host_gbps", "link_gbps", "peer"}
    assert card.is_cpu
    assert not card.is_amd
    half = cpu_card(4, 32 * GIB, 2)
    assert (half.name, half.tflops, half.usable_bytes) == (card.name, 0.1, 16 * GIB)
    assert cpu_card(1, GIB).name == "cpu, 1 core"
    assert replace(card, capability="8.0").is_cpu is False
