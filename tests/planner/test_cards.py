"""Cards by the names that people and drivers give them, and what is known of each."""

import re

import pytest

from scalegpt.errors import InputError
from scalegpt.planner.gpus import GIB, Card, catalogue, find_card, known_card

CALLED = {
    "a100-40gb": "A100 40GB", "A100-SXM4-40GB": "A100 40GB", "NVIDIA A100-PCIE-40GB": "A100 40GB PCIe",
    "A100 40GB": "A100 40GB", "a100_80gb": "A100 80GB", "a100-sxm4-80gb": "A100 80GB", "A100-SXM-80GB": "A100 80GB",
    "NVIDIA A100 80GB PCIe": "A100 80GB PCIe", "a100-pcie-40gb": "A100 40GB PCIe", "rtx4090": "RTX 4090", "4090": "RTX 4090",
    "RTX 4090": "RTX 4090", "rtx-4090": "RTX 4090", "GeForce RTX 4090": "RTX 4090", "rtx4090-24gb": "RTX 4090",
    "rtx2060": "RTX 2060", "2060-8gb": "RTX 2060 Super", "rtx2060super": "RTX 2060 Super", "RTX 2060 12GB": "RTX 2060 12GB",
    "rtx3060-12gb": "RTX 3060", "t4": "T4", "Tesla T4": "T4", "NVIDIA T4": "T4", "h100": "H100 SXM", "h100-pcie": "H100 PCIe",
    "NVIDIA H100 80GB HBM3": "H100 SXM", "v100-16gb": "V100 16GB SXM", "Tesla V100-PCIE-16GB": "V100 16GB PCIe",
    "a6000": "RTX A6000", "rtx6000ada": "RTX 6000 Ada", "NVIDIA RTX 6000 Ada Generation": "RTX 6000 Ada", "a10": "A10",
    "a10g": "A10G", "l4": "L4", "l40s": "L40S", "mi300x": "MI300X", "AMD Instinct MI250X": "MI250X", "h200": "H200",
    "b200": "B200", "5090": "RTX 5090", "a40": "A40",
    "L40": "L40", "NVIDIA H100 NVL": "H100 NVL", "4080 super": "RTX 4080 Super", "NVIDIA GH200 480GB": "GH200",
    "2080ti": "RTX 2080 Ti", "mi325x": "MI325X",
}  # fmt: skip

GIBIBYTES = {  # facts that others get wrong: an A10 has 24 GB, not 28, and a V100 of 16 GB is not one of 32
    "RTX 2060": 5.79, "RTX 3060": 11.75, "RTX 4090": 23.52, "T4": 14.56, "V100 16GB SXM": 15.8, "V100 32GB SXM": 31.74,
    "A10": 21.99, "A100 40GB": 39.50, "A100 80GB": 79.25, "B200": 178.35,
}  # fmt: skip


@pytest.mark.parametrize("name", CALLED)
def test_a_card_has_many_names(name: str) -> None:
    assert find_card(name).name == CALLED[name]


@pytest.mark.parametrize("card", catalogue(), ids=lambda card: card.name)
def test_every_card_is_complete_and_found_by_its_names(card: Card) -> None:
    for name in (card.name, card.name.lower(), card.name.replace(" ", "-"), card.name.replace(" ", ""), *card.aliases):
        assert find_card(name) == card
    assert set(card.sources) == {"gib", "tflops", "gbps", "host_gbps", "link_gbps", "peer"}
    assert all(len(source) > 4 for source in card.sources.values())
    assert not any(source.startswith(("/", ".")) or "gpus.yaml" in source for source in card.sources.values())
    assert card.sources["gib"].startswith(("~", "torch"))
    assert card.is_estimated == card.sources["gib"].startswith("~") == ("gib" in card.estimated)
    # GiB of so many "GB": some cards have 1024 MiB a GB, all keep some back
    assert 0.85 * card.gb <= card.gib <= card.gb
    assert card.usable_bytes == int(card.gib * GIB)
    assert card.is_amd or 7.0 <= float(card.capability) <= 12.0
    assert card.has_bf16 == card.has_flash == (card.is_amd or float(card.capability) >= 8)


def test_no_two_cards_share_a_name() -> None:
    names = [word for card in catalogue() for word in (card.name, *card.aliases)]
    assert len({find_card(name).name for name in names}) == len(catalogue())


@pytest.mark.parametrize("name", GIBIBYTES)
def test_the_memory_that_torch_reports(name: str) -> None:
    assert find_card(name).gib == GIBIBYTES[name]


@pytest.mark.parametrize("name", ["T4", "V100 16GB PCIe", "RTX 2060", "RTX 2060 Super"])
def test_turing_and_volta_have_neither_bf16_nor_flash(name: str) -> None:
    card = find_card(name)
    assert not card.has_bf16
    assert not card.has_flash


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a101", "did you mean A10"),
        ("rtx 4091", "RTX 4090"),
        ("RTX 3080 Ti", "did you mean RTX 2080 Ti, RTX 3080, RTX 5070 Ti?"),
        ("foo", "is not in the catalogue; known: RTX 2060"),
        ("", "is not in the catalogue; known"),
        ("rtx", "is not in the catalogue; known"),
        ("a100", "could be A100 40GB, A100 80GB, A100 40GB PCIe, A100 80GB PCIe; say which"),
        ("v100", "could be V100 16GB PCIe"),
        ("rtx3080-12gb", "has 10 GB; give --memory_gb 12"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "is not in the catalogue"),
    ],
)
def test_what_is_no_card_is_refused_with_the_nearest(name: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        find_card(name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_drivers_name_that_is_not_certain_is_no_card() -> None:
    assert known_card("NVIDIA GeForce RTX 3080 Ti") is None
    assert known_card("cpu") is None


BANDWIDTHS = {  # GB/s, as the vendors print them; another catalogue has an L4 of 3350
    "RTX 2060": 336, "RTX 2060 Super": 448, "RTX 3060": 360, "RTX 3090": 936, "T4": 320, "V100 32GB SXM": 900, "A10": 600,
    "L4": 300, "L40S": 864, "A40": 696, "RTX A6000": 768, "A100 40GB": 1555, "A100 80GB": 2039, "A100 80GB PCIe": 1935,
    "H100 PCIe": 2000, "H100 SXM": 3350, "H200": 4800, "B200": 7700, "MI250X": 1640, "MI300X": 5300,
}  # fmt: skip


@pytest.mark.parametrize("name", BANDWIDTHS)
def test_the_memorys_bandwidth(name: str) -> None:
    assert find_card(name).gbps == BANDWIDTHS[name]


@pytest.mark.parametrize(
    ("name", "gpus", "expected"),
    [
        ("a100-40gb", 8, ("nvlink", 600, True)), ("h100", 8, ("nvlink", 900, True)), ("b200", 2, ("nvlink", 1800, True)),
        ("v100-16gb", 8, ("nvlink", 300, True)), ("a100-pcie-80gb", 2, ("pcie", 64, True)),
        ("h100-pcie", 8, ("pcie", 128, True)),
        ("t4", 4, ("pcie", 32, True)), ("3090", 2, ("nvlink", 112.5, True)), ("3090", 4, ("pcie", 64, False)),
        ("a6000", 4, ("pcie", 64, True)), ("4090", 2, ("pcie", 64, False)), ("5090", 8, ("pcie", 128, False)),
        ("mi300x", 8, ("xgmi", 896, True)), ("gh200", 1, ("pcie", 128, True)),
    ],
)  # fmt: skip
def test_what_joins_the_cards_of_a_machine(name: str, gpus: int, expected: tuple[str, float, bool]) -> None:
    link = find_card(name).link_of(gpus)
    assert (link.kind, link.gbps, link.peer) == expected


@pytest.mark.parametrize("card", catalogue(), ids=lambda card: card.name)
def test_links_are_of_their_kinds_speed(card: Card) -> None:
    assert card.host_gbps in {32, 64, 128, 900}
    if card.link == "pcie":
        assert card.link_gbps in {32, 64, 128}
    else:
        assert card.link_gbps > card.host_gbps
    assert card.link_cards in {None, 2}
    assert card.is_amd == (card.link == "xgmi") or card.link == "pcie"
    if re.match(r"RTX [2-5]0[6-9]0", card.name):
        assert not card.peer
