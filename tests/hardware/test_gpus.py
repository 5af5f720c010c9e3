"""Peaks of cards by the driver's names: the right one, or none."""

import re
from typing import Any

import pytest

from scalegpt.hardware.gpus import catalogue, find_card, known_card, peak_flops

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
    "AMD Instinct MI250X": 191.5, "AMD Instinct MI300X": 1307, "NVIDIA GeForce RTX 3080 Ti": 68.2,
    "NVIDIA GeForce RTX 4070 Ti SUPER": 88.2, "NVIDIA GeForce RTX 4070 Ti": 80.2, "NVIDIA GeForce RTX 4090 D": 147.1,
    "NVIDIA RTX A2000": 31.9, "NVIDIA RTX A2000 12GB": 31.9, "NVIDIA L20": 118.7, "NVIDIA GB200": 2500,
    "NVIDIA H20": 148, "NVIDIA H800": 989, "NVIDIA H800 PCIe": 756, "Quadro RTX 6000": 130.5, "Quadro RTX 5000": 89.2,
    "Quadro RTX 4000": 57, "NVIDIA TITAN RTX": 130.5, "NVIDIA B300 SXM6 AC": 2250, "NVIDIA A800-SXM4-80GB": 312,
    "NVIDIA A800 80GB PCIe": 312, "NVIDIA A800 40GB Active": 312, "NVIDIA L40G": 179.9, "NVIDIA T1000": 5,
    "NVIDIA T1000 8GB": 5, "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": 504,
    "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition": 438.8, "NVIDIA RTX PRO 5000 Blackwell": 267.8,
    "NVIDIA RTX PRO 4500 Blackwell": 202.1, "NVIDIA RTX PRO 4000 Blackwell": 147.3, "NVIDIA RTX 5000 Ada Generation": 261.1,
    "NVIDIA RTX 4500 Ada Generation": 158.5, "NVIDIA RTX 4000 Ada Generation": 106.9, "NVIDIA RTX 2000 Ada Generation": 48,
    "NVIDIA RTX A5500": 136.4, "NVIDIA RTX A4500": 94.6, "NVIDIA A2": 18.1, "NVIDIA GeForce RTX 3050": 18.2,
    "NVIDIA GeForce RTX 3060 Ti": 32.4, "NVIDIA GeForce RTX 3070 Ti": 43.5, "NVIDIA GeForce RTX 3090 Ti": 80,
    "NVIDIA GeForce RTX 4060": 30.2, "NVIDIA GeForce RTX 4060 Ti": 44.1, "NVIDIA GeForce RTX 4070 SUPER": 71,
    "NVIDIA GeForce RTX 5060": 38.4, "NVIDIA GeForce RTX 5060 Ti": 47.4, "NVIDIA GeForce RTX 5070": 61.7,
    "NVIDIA GeForce RTX 2070": 29.9, "NVIDIA GeForce RTX 2070 SUPER": 36.2, "NVIDIA GeForce RTX 2080": 40.3,
    "NVIDIA GeForce RTX 2080 SUPER": 44.6, "NVIDIA GeForce GTX 1650": 5.97, "NVIDIA GeForce GTX 1650 SUPER": 8.83,
    "NVIDIA GeForce GTX 1660": 10.05, "NVIDIA GeForce GTX 1660 SUPER": 10.05, "NVIDIA GeForce GTX 1660 Ti": 10.87,
    "AMD Instinct MI250": 181, "AMD Instinct MI350X": 2306.9, "AMD Instinct MI355X": 2516.6,
}  # fmt: skip

OTHERS = (
    "cpu", "", "NVIDIA GeForce GTX 1080", "NVIDIA GeForce RTX 4070 Ti Laptop GPU", "NVIDIA GeForce RTX 5090 D",
    "NVIDIA GeForce RTX 3060 Laptop GPU", "NVIDIA GeForce RTX 2060 with Max-Q Design", "NVIDIA TITAN V",
    "NVIDIA RTX A1000", "NVIDIA GeForce RTX 5080 Laptop GPU", "NVIDIA H200 NVL",
    "Tesla V100S-PCIE-32GB", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA T400", "NVIDIA GeForce GTX 1650 Ti",
)  # fmt: skip


def entries(name: str) -> list[Any]:
    """The entries that fit with most words: where several fit, there is none."""
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
        assert 4 < card.tflops < 5000
        assert all(isinstance(word, str) and re.fullmatch("[a-z0-9]+", word) for word in card.match)
    namesakes = {"RTX 2060 12GB", "RTX 3080 12GB", "RTX 4060 Ti 16GB", "RTX 5060 Ti 16GB"}  # the driver gives no size
    assert {known_card(name) for name in NAMES} == set(catalogue()) - set(map(find_card, namesakes))


def test_a_variant_that_the_catalogue_has_is_not_its_plain_sister() -> None:
    assert [card.name for card in entries("NVIDIA GeForce RTX 2060 SUPER")] == ["RTX 2060 Super"]
    assert [card.name for card in entries("NVIDIA GeForce RTX 2060")] == ["RTX 2060"]
    assert peak_flops("NVIDIA GeForce RTX 2060 SUPER Laptop GPU", "fp16") is None
