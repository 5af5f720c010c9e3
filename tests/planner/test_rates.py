"""What a card reaches of its data sheet, and which network is assumed between machines."""

from dataclasses import fields, replace
from typing import Any

import pytest

from scalegpt.hardware.detect import cpu_card
from scalegpt.hardware.gpus import GB, Card, catalogue, find_card
from scalegpt.hardware.machine import Machine
from scalegpt.planner.memory.overheads import Figure
from scalegpt.planner.time.rates import (
    FASTEST,
    FITTED,
    FITTED_ON,
    NETWORK,
    SHARES,
    SLOWEST,
    Rates,
    Shares,
    basis,
    network_gbit,
    speed_range,
)

A100 = find_card("a100-80gb")


def rates(card: Card = A100, precision: str = "bf16", shares: Shares | None = None, **machine: Any) -> Rates:
    counts = {name: machine.pop(name) for name in ("gpus", "nodes") if name in machine}
    return Rates.of(card, replace(Machine.with_card(card, **counts), **machine), precision, shares)


def all_of_it(link: float = 1.0) -> Shares:
    """Shares by which a card reaches what its data sheet says."""
    one = Figure(1.0, "")
    return Shares(one, one, memory=one, link=Figure(link, ""), interference=Figure(0.0, ""))


# --- one card --------------------------------------------------------------------------------------------------------


def test_an_a100_with_nothing_lost_is_its_data_sheet() -> None:
    """NVIDIA's: 312 TFLOP/s dense in bf16, 2039 GB/s."""
    full = rates(shares=all_of_it())
    assert full.matmul == full.attention == full.peak == 312e12
    assert full.memory == 2039e9


@pytest.mark.parametrize("card", catalogue(), ids=lambda card: card.name)
def test_every_card_reaches_part_of_its_figures_and_attention_less_than_matmuls(card: Card) -> None:
    got = rates(card, "fp16")
    assert 0 < got.attention < got.matmul < got.peak == card.tflops * 1e12
    assert 0 < got.memory < card.gbps * 1e9
    assert card.capability in SHARES


def test_fp32_has_a_share_of_the_peak() -> None:
    """A100: 19.5 TFLOP/s without TF32, V100: 15.7, RTX 3090: 35.6; whitepapers of the three."""
    for name, tflops in (("a100-40gb", 19.5), ("v100-32gb", 15.7)):
        assert rates(find_card(name), "fp32").peak == pytest.approx(tflops * 1e12, rel=0.01)
    assert rates(find_card("rtx3090"), "fp32").peak <= 35.6e12
    assert rates(find_card("rtx3090"), "fp32").peak < rates(find_card("rtx3090"), "bf16").peak


def test_a_faster_card_is_never_slower_in_anything() -> None:
    for name in ("tflops", "gbps", "host_gbps", "link_gbps"):
        faster = replace(A100, **{name: 2 * getattr(A100, name)})
        for precision in ("bf16", "fp32"):
            before, after = rates(precision=precision, gpus=8), rates(faster, precision, gpus=8)
            for field in fields(Rates):
                if field.name != "links":
                    assert getattr(after, field.name) >= getattr(before, field.name), (name, field.name)
            assert after.links.inside >= before.links.inside
            assert after.links.latency == before.links.latency
            assert before != after


def test_a_capability_that_nobody_has_seen_counts_as_the_a100s() -> None:
    assert rates(replace(A100, capability="13.7")).matmul == rates().matmul


def test_a_processor_hides_nothing_and_updates_where_it_computes() -> None:
    card = cpu_card(4, 16 * GB)
    got = rates(card, "fp32", is_gpu=False)
    assert (got.overlap, got.fill, got.dispatch) == (0, 0, 0)
    assert got.host_update == got.memory
    assert got.peak == card.tflops * 1e12  # of a processor, that of fp32


def test_fitted_figures_say_so_and_the_others_are_marked() -> None:
    figures = {
        figure
        for shares in SHARES.values()
        for figure in (shares.matmul, shares.attention, shares.memory, shares.interference, shares.straggling)
    }
    assert all(figure.source == FITTED or figure.source.startswith("~") for figure in figures)
    assert all(0 < figure.value < 1 for figure in figures)


# --- networks --------------------------------------------------------------------------------------------------------


def test_a_network_that_nobody_names_grows_with_the_cards() -> None:
    one, eight = (network_gbit(A100, Machine.with_card(A100, gpus=gpus, nodes=2)) for gpus in (1, 8))
    assert eight == 8 * one == 8 * NETWORK["nvlink"].value
    assert network_gbit(A100, replace(Machine.with_card(A100, gpus=8, nodes=2), network_gbps=7)) == 7


@pytest.mark.parametrize("card", catalogue(), ids=lambda card: card.name)
def test_each_card_says_whether_its_rates_are_fitted_or_estimated(card: Card) -> None:
    said = basis(card)
    assert card.capability in SHARES
    fitted = SHARES[card.capability].matmul.source == FITTED
    assert fitted == (card.capability in FITTED_ON)
    assert ("rest on rates fitted to published runs" in said) == (card.name in FITTED_ON.get(card.capability, ()))
    assert ("are estimates: no published run" in said) == (not fitted)
    assert ("estimates" in said or "an estimate" in said) or not set(card.estimated) & {"tflops", "gbps"}
    assert card.name in said


def test_a_range_is_wider_where_less_is_known() -> None:
    fitted, other, cpu = (speed_range(card) for card in (A100, find_card("4090"), cpu_card(4, 16 * GB)))
    assert fitted == (SLOWEST.value, FASTEST.value)
    assert other[0] < fitted[0] < 1 < fitted[1] < other[1]
    assert cpu == (0.5, 2.0)


def test_the_cards_that_were_fitted_are_known() -> None:
    for capability, names in FITTED_ON.items():
        assert {find_card(name).capability for name in names} == {capability}
