"""Peaks of cards by the driver's names: the right one, or none."""

import re
from typing import Any

import pytest

from scalegpt.planner.gpus import catalogue, find_card, known_card, peak_flops

# As torch.cuda.get_device_name gives them.
NAMES = {
    "NVIDIA GeForce RTX 2060": 26, "NVIDIA GeForce RTX 3060": 25.5, "NVIDIA GeForce RTX 3080": 59.5,
    "NVIDIA GeForce RTX 3090": 71, "NVIDIA GeForce RTX 4080": 97.5, "NVIDIA GeForce RTX 4090": 165,
    "NVIDIA GeForce RTX 5090": 209.5, "Tesla T4": 65, "Tesla V100-PCIE-16GB": 112, "Tesla V100-SXM2-32GB": 125,
    "NVIDIA A10G": 70, "NVIDIA A100-SXM4-40GB": 312, "NVIDIA A100-SXM4-80GB": 312, "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312, "Tesla V100-PCIE-32GB": 112, "Tesla V100-SXM2-16GB": 125,
    "NVIDIA GeForce RTX 2060 SUPER": 28.7, "NVIDIA GeForce RTX 2080 Ti": 53.8, "Quadro RTX 8000": 130.5,
    "NVIDIA GeForce RTX 3070": 40.6, "NVIDIA GeForce RTX 4070": 58.3, "NVIDIA GeForce RTX 4080 SUPER": 104.4,
    "NVIDIA GeForce RTX 5070 Ti": 87.9, "NVIDIA GeForce RTX 5080": 112.6, "NVIDIA A30": 165, "NVIDIA RTX A4000": 76.7,
    "NVIDIA RTX A5000": 111.1, "NVIDIA L40": 181, "NVIDIA H100 NVL": 835, "NVIDIA GH200 480GB": 989,
    "AMD Instinct MI210": 181, "AMD Instinct MI325X": 1307,
    "NVIDIA A10": 125, "NVIDIA L40S": 362,
    "NVIDIA L4": 121, "NVIDIA A40": 149.7, "NVIDIA RTX A6000": 154.8, "NVIDIA RTX 6000 Ada Generation": 364,
    "NVIDIA H200": 989, "NVIDIA H100 PCIe": 756, "NVIDIA H100 80GB HBM3": 989, "NVIDIA B200": 2250,
    "AMD Instinct MI250X": 191.5, "AMD Instinct MI300X": 1307,
}  # fmt: skip

OTHERS = (
    "cpu", "", "NVIDIA GeForce GTX 1080", "NVIDIA GeForce RTX 3080 Ti", "NVIDIA GeForce RTX 4070 Ti SUPER",
    "NVIDIA GeForce RTX 3060 Laptop GPU", "NVIDIA GeForce RTX 2060 with Max-Q Design", "NVIDIA GeForce RTX 4090 D",
    "NVIDIA RTX A2000", "NVIDIA RTX A1000", "NVIDIA L20", "NVIDIA GeForce RTX 5080 Laptop GPU", "NVIDIA H200 NVL",
    "NVIDIA GB200", "Tesla V100S-PCIE-32GB", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA T400", "Quadro RTX 6000",
    "NVIDIA H20", "NVIDIA H800",
)  # fmt: skip


def entries(name: str) -> list[Any]:
    """The entries that fit with most words: of several, none is meant."""
    words = set(re.findall("[a-z0-9]+", name.lower()))
    fitting = [card for card in catalogue() if words.issuperset(card.match)]
    return [card for card in fitting if len(card.match) == max(len(each.match) for each in fitting)]


@pytest.mark.parametrize("name", NAMES)
def test_each_card_has_its_own_peak(name: str) -> None:
    (card,) = entries(name)
    assert peak_flops(name, "fp16") == NAMES[name] * 1e12
    assert peak_flops(name, "bf16") == (NAMES[name] * 1e12 if card.has_bf16 else None)


@pytest.mark.parametrize("name", OTHERS)
def test_another_card_of_a_similar_name_is_unknown(name: str) -> None:
    assert peak_flops(name, "fp16") is None


def test_fp32_has_no_peak_here() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "fp32") is None


def test_no_name_matches_two_entries() -> None:
    assert all(len(entries(name)) <= 1 for name in (*NAMES, *OTHERS))


def test_every_entry_is_named_sourced_and_matched() -> None:
    assert len({card.name for card in catalogue()}) == len(catalogue())
    for card in catalogue():
        assert 10 < card.tflops < 5000
        assert all(isinstance(word, str) and re.fullmatch("[a-z0-9]+", word) for word in card.match)
    assert {known_card(name) for name in NAMES} == set(catalogue()) - {find_card("RTX 2060 12GB")}


def test_a_variant_that_the_catalogue_has_is_not_its_plain_sister() -> None:
    assert [card.name for card in entries("NVIDIA GeForce RTX 2060 SUPER")] == ["RTX 2060 Super"]
    assert [card.name for card in entries("NVIDIA GeForce RTX 2060")] == ["RTX 2060"]
    assert peak_flops("NVIDIA GeForce RTX 2060 SUPER Laptop GPU", "fp16") is None
