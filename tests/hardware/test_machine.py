"""A machine from the catalogue."""

from typing import Any

import pytest

from scalegpt.config.machine import MachineConfig
from scalegpt.errors import InputError
from scalegpt.hardware.gpus import catalogue, find_card
from scalegpt.hardware.machine import Machine
from scalegpt.planner.checks import resolve_precision

AMBIGUOUS = {"RTX 2060", "RTX 3080", "A100 40GB", "A100 80GB"}
"""Names that cards of another memory size or form have too: a note says which was taken."""


def made(**settings: Any) -> Machine:
    return Machine.of(MachineConfig(**settings))


@pytest.mark.parametrize("card", catalogue(), ids=lambda card: card.name)
def test_a_named_card_brings_its_figures(card: Any) -> None:
    machine = made(gpu=card.name, gpus=8, nodes=2, network_gbps=200)
    assert (machine.card, machine.name, machine.usable_bytes) == (card, card.name, card.usable_bytes)
    assert (machine.link, machine.host_gbps) == (card.link_of(8), card.host_gbps)
    assert (machine.capability, machine.ranks, machine.network_gbps) == (card.capability, 16, 200)
    assert (machine.cores, machine.driver) == (None, None)
    remark = [f"gpu {card.name!r} was taken as"] if card.name in AMBIGUOUS else []
    assert [note.split(f" {card.name} ")[0] for note in machine.notes] == remark


def test_one_card_where_no_count_is_given() -> None:
    assert made(gpu="4090").gpus == 1
    assert made().gpus == 1


def test_a_card_that_is_not_named_has_memory_alone() -> None:
    machine = made(memory_gb=12)
    assert (machine.usable_bytes, machine.card, machine.link, machine.host_gbps) == (12 * 10**9, None, None, None)


@pytest.mark.parametrize(("settings", "at_hand"), [
    ({}, True), ({"gpus": 4}, True), ({"gpu": "cpu"}, True), ({"nodes": 2}, True), ({"gpu": "4090"}, False),
    ({"memory_gb": 8}, False), ({"gpu": "cpu", "memory_gb": 8}, True),
])  # fmt: skip
def test_when_the_machine_at_hand_is_meant(settings: dict[str, Any], at_hand: bool) -> None:
    assert MachineConfig(**settings).at_hand is at_hand


@pytest.mark.parametrize(("settings", "message"), [
    ({"gpus": 0}, "gpus must be at least 1, not 0"), ({"gpus": -3}, "gpus must be at least 1"),
    ({"nodes": 0}, "nodes must be at least 1, not 0"), ({"network_gbps": 0.0}, "network_gbps must be more than 0"),
    ({"network_gbps": -1.0}, "network_gbps must be more than 0"), ({"gpu": "rtx4091"}, "did you mean RTX 4090"),
])  # fmt: skip
def test_what_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        made(**settings)


@pytest.mark.parametrize(("capability", "precision"), [
    ("7.0", "fp16"), ("7.5", "fp16"), ("6.1", "fp16"), ("8.0", "bf16"), ("10.0", "bf16"), ("gfx90a", "bf16"),
    (None, "bf16"), ("cpu", "fp32"),
])  # fmt: skip
def test_the_precision_of_a_card_that_is_not_in_the_catalogue(capability: str | None, precision: str) -> None:
    assert resolve_precision("auto", None, capability) == precision
    assert resolve_precision("fp16", None, capability) == "fp16"
    if precision == "fp16":
        with pytest.raises(InputError, match="this card has no bf16; use --precision fp16"):
            resolve_precision("bf16", None, capability)


def test_the_catalogues_card_goes_before_a_capability() -> None:
    assert resolve_precision("auto", find_card("t4"), "9.0") == "fp16"


@pytest.mark.parametrize(
    ("settings", "gb", "source"),
    [
        ({"gpu": "rtx3060"}, 64, "assumed"), ({"gpu": "a100-80gb"}, 160, "assumed"),
        ({"gpu": "4090", "gpus": 8}, 384, "assumed"),
        ({"gpu": "a100-80gb", "gpus": 8}, 1280, "assumed"), ({"gpu": "h200", "gpus": 8}, 2048, "assumed"),
        ({"memory_gb": 80, "gpus": 2}, 320, "assumed"), ({"gpu": "a100-80gb", "host_memory_gb": 512}, 512, "given"),
        ({"host_memory_gb": 512}, 512, "given"), ({}, None, None),
    ],
)  # fmt: skip
def test_host_memory_is_given_or_assumed_by_the_cards(
    settings: dict[str, Any], gb: int | None, source: str | None
) -> None:
    machine = made(**settings)
    assert (machine.host_bytes, machine.host_source) == (None if gb is None else gb * 10**9, source)


def test_a_given_host_memory_stays_with_other_cards() -> None:
    given = made(gpu="a100-80gb", gpus=2, host_memory_gb=100)
    card = find_card("4090")
    assert given.with_cards(gpus=8, nodes=1).host_bytes == given.with_other_card(card).host_bytes == 100 * 10**9
    assumed = made(gpu="a100-80gb", gpus=4)
    sizes = [assumed.with_cards(gpus=gpus, nodes=1).host_bytes for gpus in (1, 4, 8)]
    assert sizes == [
        640 * 10**9,
        640 * 10**9,
        1280 * 10**9,
    ]  # fewer cards of the same machine leave its memory as it is
    assert assumed.with_other_card(card).host_bytes == 192 * 10**9
