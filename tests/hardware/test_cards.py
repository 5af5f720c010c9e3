"""Cards by the names that people and drivers give them, and what is known of each."""

import re
from typing import Any

import pytest

from scalegpt.errors import InputError
from scalegpt.hardware.devices import whole_card
from scalegpt.hardware.gpus import GIB, Card, catalogue, find_card, find_card_and_note, known_card
from scalegpt.hardware.unsupported_gpus import UNSUPPORTED, unsupported

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
    assert card.sources["gib"].startswith(("~", "torch", "CUDA"))
    assert not any(source.strip("~") == "estimated" for source in card.sources.values())
    assert card.is_estimated == card.sources["gib"].startswith("~") == ("gib" in card.estimated)
    # GiB of N "GB": some cards have 1024 MiB a GB, all reserve some
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
        (
            "RTX 4050",
            "did you mean RTX 4060, RTX 4070, RTX 4080, RTX 4090, Quadro RTX 4000? The closest card is RTX 4060 (8 GB)",
        ),
        ("RTX 4050 24GB", "The closest card is RTX 4090 (24 GB)"),
        ("RTX 5090 D", "The closest card is RTX 5090 (32 GB); or give --memory_gb N instead of --gpu"),
        (
            "foo",
            "is not in the catalogue; `scalegpt gpus` lists the known GPUs; or give --memory_gb N instead of --gpu",
        ),
        ("", "is not in the catalogue; `scalegpt gpus` lists"),
        ("rtx", "is not in the catalogue; `scalegpt gpus` lists"),
        (
            "A100 80GB 8",
            "A100 80GB is known, but not the meaning of '8'; give the card's name alone, and the number of cards as --gpus N",
        ),
        ("RTX 6000", "could be Quadro RTX 6000, RTX 6000 Ada, RTX PRO 6000 Blackwell; say which"),
        ("A100 PCIe", "could be A100 40GB PCIe, A100 80GB PCIe; say which"),
        ("a100", "could be A100 40GB, A100 80GB, A100 40GB PCIe, A100 80GB PCIe; say which"),
        ("v100", "could be V100 16GB PCIe"),
        ("rtx3080-16gb", "has 10 or 12 GB; give --memory_gb 16"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "is not in the catalogue"),
    ],
)
def test_what_is_not_a_card_is_refused_with_the_nearest(name: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        find_card(name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "taken", "others"),
    [
        ("h100", "H100 SXM", ("H100 PCIe", "H100 NVL")), ("3080", "RTX 3080 of 10 GB", ("RTX 3080 12GB",)),
        ("4060 Ti", "RTX 4060 Ti 8GB", ("RTX 4060 Ti 16GB",)), ("2060", "RTX 2060 of 6 GB", ("RTX 2060 12GB",)),
        ("a100-80gb", "A100 80GB with SXM", ("A100 80GB PCIe",)), ("h800", "H800 SXM", ("H800 PCIe",)),
    ],
)  # fmt: skip
def test_a_name_of_several_cards_says_which_was_taken(name: str, taken: str, others: tuple[str, ...]) -> None:
    _, remark = find_card_and_note(name)
    assert remark == f"gpu {name!r} was taken as {taken}; name {' or '.join(others)} if you mean that"


@pytest.mark.parametrize(
    "name",
    [
        "h100-pcie",
        "H100 NVL",
        "NVIDIA H100 80GB HBM3",
        "3080 10GB",
        "RTX 3080 12GB",
        "4090",
        "A100-SXM4-40GB",
        "quadro rtx 6000",
    ],
)
def test_a_name_of_one_card_needs_no_remark(name: str) -> None:
    assert find_card_and_note(name)[1] is None


NEW = (
    "RTX 4070 Ti", "RTX 4070 Ti Super", "RTX 5060 Ti 8GB", "RTX 5060 Ti 16GB", "RTX 3060 Ti", "RTX 3080 Ti",
    "RTX 4060 Ti 8GB", "RTX 4060 Ti 16GB", "RTX 4000 Ada", "RTX 5000 Ada", "RTX PRO 6000 Blackwell", "A800 80GB SXM",
    "H800 SXM", "H20", "GB200", "B300", "RTX 3090 Ti", "L40G", "T1000 4GB", "RTX 5070", "RTX 4070 Super",
    "RTX A4500", "TITAN RTX", "GTX 1660", "MI355X",
)  # fmt: skip


@pytest.mark.parametrize("name", NEW)
def test_cards_that_people_have_are_there(name: str) -> None:
    assert find_card(name).name == name


@pytest.mark.parametrize("kind", UNSUPPORTED, ids=lambda kind: kind.pattern)
def test_what_stands_in_for_an_unsupported_card_is_a_card(kind: Any) -> None:
    assert kind.closest is None or find_card(kind.closest).name == kind.closest


@pytest.mark.parametrize("card", catalogue(), ids=lambda card: card.name)
def test_no_card_of_the_catalogue_is_called_unsupported(card: Card) -> None:
    assert unsupported(card.name) is None


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("M2 Max", "Apple's GPUs are not supported"), ("apple m4 pro", "--gpu cpu"),
        ("gaudi2", "closest card that can be planned is A100 80GB"),
        ("TPU v5e", "Google's TPUs are not supported"), ("Jetson Orin", "closest card that can be planned is A2"),
        ("Arc A770", "Intel's GPUs"), ("trn2", "AWS's Trainium"), ("GTX 1080 Ti", "is RTX 2080 Ti"), ("P100", "is T4"),
        ("RX 7900 XTX", "is RTX 3090"), ("4090 Laptop", "is RTX 4080"), ("MI300A", "shares its memory"),
    ],
)  # fmt: skip
def test_an_unsupported_card_says_why_and_what_comes_closest(name: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        find_card(name)
    assert said in str(caught.value)
    assert "--memory_gb N" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["rtx 4051", "h101", "a600", "RTX 3000", "x" * 300, "l4000", "b2000", "1" * 5000, "x " + "9" * 5000 + " GB"]
)
def test_at_most_five_names_are_offered(name: str) -> None:
    with pytest.raises(InputError) as caught:
        find_card(name)
    offered = re.search(r"did you mean (.*)\?", str(caught.value))
    assert offered is None or 1 <= len(offered[1].split(", ")) <= 5


def test_a_card_at_hand_is_distinguished_from_its_namesake_by_its_memory() -> None:
    for name, gib, expected in (
        ("NVIDIA GeForce RTX 4060 Ti", 15.6, "RTX 4060 Ti 16GB"), ("NVIDIA GeForce RTX 4060 Ti", 7.6, "RTX 4060 Ti 8GB"),
        ("NVIDIA GeForce RTX 3080", 11.7, "RTX 3080 12GB"), ("NVIDIA GeForce RTX 3080", 9.8, "RTX 3080"),
        ("NVIDIA A100 80GB PCIe", 79.2, "A100 80GB PCIe"), ("NVIDIA A100-SXM4-40GB", 39.5, "A100 40GB"),
    ):  # fmt: skip
        card = whole_card(name, None, int(gib * GIB))
        assert card is not None
        assert card.name == expected


def test_a_drivers_name_that_is_not_certain_is_not_a_card() -> None:
    assert known_card("NVIDIA GeForce RTX 3080 Laptop GPU") is None
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
    assert card.host_gbps in {32, 64, 128, 450, 900}
    if card.link == "pcie":
        assert card.link_gbps in {32, 64, 128}
    else:
        assert card.link_gbps > card.host_gbps
    assert card.link_cards in {None, 2}
    assert card.is_amd == (card.link == "xgmi") or card.link == "pcie"
    if re.match(r"RTX [2-5]0[6-9]0", card.name):
        assert not card.peer
