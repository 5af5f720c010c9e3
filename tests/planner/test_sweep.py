"""One run on more and more GPUs, and what runs cost."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from scalegpt.errors import InputError
from scalegpt.hardware.gpus import find_card
from scalegpt.hardware.machine import Machine
from scalegpt.planner.cost import Cost, cost_as_dict
from scalegpt.planner.query import Asked, answer
from scalegpt.planner.sweep import PAYS, Point, Sweep, sweep

H100 = find_card("h100 sxm")
SHAPE = {"n_layer": 4, "n_embd": 512, "n_head": 8, "block_size": 256, "vocab_size": 1024}


def asked(card: str = "h100 sxm", *, gpus: int = 1, nodes: int = 1, price: float | None = None, **flags: Any) -> Asked:
    machine = replace(Machine.with_card(find_card(card), gpus=gpus, nodes=nodes), price_per_gpu_hour=price)
    given = {**SHAPE, "tokens_per_step": 256 * 512, "max_tokens": 10**9, **flags}
    return Asked.of(preset=None, config_file=None, flags=given, machine=machine)


def counts(found: Sweep) -> list[tuple[int, int]]:
    return [(point.row.asked.machine.gpus, point.row.asked.machine.nodes) for point in found.points]


# --- the numbers of GPUs ---------------------------------------------------------------------------------------------


def test_a_machine_is_filled_before_there_are_more() -> None:
    assert counts(sweep(asked(), 64)) == [(1, 1), (2, 1), (4, 1), (8, 1), (8, 2), (8, 4), (8, 8)]
    assert counts(sweep(asked(gpus=4), 16)) == [(1, 1), (2, 1), (4, 1), (4, 2), (4, 4)]
    assert counts(sweep(asked(gpus=1), 4, gpus_given=True)) == [(1, 1), (1, 2), (1, 4)]
    assert counts(sweep(asked(), 3)) == [(1, 1), (2, 1), (3, 1)]
    assert counts(sweep(asked(), 24)) == [(1, 1), (2, 1), (4, 1), (8, 1), (8, 2), (8, 3)]


def test_a_step_keeps_its_tokens_and_accumulates_less() -> None:
    found = sweep(asked(), 512)
    plans = [point.row.plan for point in found.points]
    assert {plan.batch.tokens for plan in plans if plan} == {256 * 512} == {found.tokens}
    per_gpu = [plan.batch.micro_batch * plan.batch.grad_accum for plan in plans if plan]
    assert per_gpu == [512 // point.gpus for point in found.points]
    assert all(
        plan is not None and plan.machine.ranks == point.gpus for plan, point in zip(plans, found.points, strict=True)
    )


def test_a_run_without_tokens_per_step_keeps_those_of_one_full_machine() -> None:
    found = sweep(asked(tokens_per_step=None, micro_batch=4), 16)
    assert found.tokens == 4 * 8 * 256
    assert [point.gpus for point in found.points] == [1, 2, 4, 8, 16]


def test_the_curve_ends_where_gpus_would_have_no_sequence() -> None:
    found = sweep(asked(tokens_per_step=256 * 96), 1024)
    assert [point.gpus for point in found.points] == [1, 2, 4, 8, 16, 32, 64]
    assert "96 sequences, so at most 96 GPUs have one each" in found.ended
    undivided = found.points[-1]
    assert (undivided.efficiency, undivided.cost) == (None, None)
    assert "is not a multiple of ranks 64" in (undivided.row.why_not or "")
    assert sweep(asked(), 8).ended == ""


# --- speed and where to stop -----------------------------------------------------------------------------------------


def test_efficiencies_are_those_of_the_plans() -> None:
    found = sweep(asked(), 512)
    each = [point.row.plan.tokens_per_second / point.gpus for point in found.points if point.row.plan]
    assert [point.efficiency for point in found.points] == pytest.approx([speed / each[0] for speed in each])
    assert [point.kept for point in found.points[1:]] == pytest.approx([now / before for before, now in pairwise(each)])
    assert found.points[0].kept is None


def curve(*kept: float | None) -> Sweep:
    """A sweep whose GPUs keep these shares of their speed from point to point; None: the run does not fit there."""
    start, points, efficiency = asked(), [], 1.0
    for place, share in enumerate((1.0, *kept)):
        other = replace(start, machine=start.machine.with_cards(gpus=2**place, nodes=1))
        row = sweep(start, 1).points[0].row
        efficiency *= share or 1.0
        points.append(Point(replace(row, asked=other), None if share is None else efficiency, share if place else None))
    return Sweep(start, tuple(points))


def test_adding_stops_paying_where_the_next_step_keeps_too_little() -> None:
    found = curve(0.9, PAYS, PAYS - 0.05, 0.9)
    assert found.best is not None
    assert found.best.gpus == 4
    assert found.stops == (
        "adding GPUs stops paying at 4: on 8 each GPU keeps 70% of its speed, less than the 75% that count as worth it"
    )
    assert curve(0.9, 0.8).stops == "adding GPUs pays up to 4, the most here"
    assert curve(0.9, 0.8, None).stops == "adding GPUs pays up to 4, the most here that have a plan"


def test_a_run_that_fits_nowhere_stops_at_once() -> None:
    found = sweep(asked("rtx2060", n_layer=48, n_embd=8192, n_head=64, backend="plain"), 1)
    assert found.best is None
    assert found.stops == "the run fits on none of these numbers of GPUs"
    assert found.as_dict()["pays_up_to"] is None


def test_a_slow_network_stops_earlier_than_a_fast_one() -> None:
    def stops(gbps: float) -> int:
        question = asked(**{**SHAPE, "n_layer": 24, "n_embd": 1024})
        best = sweep(replace(question, machine=replace(question.machine, network_gbps=gbps)), 512).best
        assert best is not None
        return best.gpus

    assert stops(1) < stops(3200)


def test_a_sweep_needs_one_machine_of_known_gpus() -> None:
    with pytest.raises(InputError, match="chooses the number of machines"):
        sweep(asked(gpus=8, nodes=2))
    unknown = replace(asked(), machine=Machine(usable_bytes=10**10))
    with pytest.raises(InputError, match="give --gpu NAME"):
        sweep(unknown)


# --- cost ------------------------------------------------------------------------------------------------------------


def test_a_run_costs_its_hours_on_all_gpus_at_their_price() -> None:
    plan = answer(asked(gpus=8, price=2.5), explain=False).choice
    cost = Cost.of(plan)
    assert cost is not None
    steps = -(-(10**9) // plan.batch.tokens)
    assert cost.tokens == steps * plan.batch.tokens
    assert cost.hours == pytest.approx(steps * plan.seconds / 3600)
    assert cost.money == pytest.approx(8 * cost.hours * 2.5)
    assert cost.money_per_million == pytest.approx(cost.money / (cost.tokens / 1e6))
    values = cost_as_dict(plan)
    assert values["cost_low"] < values["cost"] < values["cost_high"]
    low, high = plan.tokens_per_second_range
    assert values["cost_high"] / values["cost_low"] == pytest.approx(high / low)


def test_without_a_price_there_are_hours_but_no_money() -> None:
    values = cost_as_dict(answer(asked(gpus=2), explain=False).choice)
    assert values["gpu_hours"] == pytest.approx(2 * values["run_hours"])
    assert values["cost"] is values["cost_per_million_tokens"] is values["price_per_gpu_hour"] is None


def test_a_card_has_the_price_of_its_catalogue_unless_one_is_given() -> None:
    priced = Machine.with_card(replace(H100, price_per_gpu_hour=3.0), gpus=8)
    assert priced.gpu_price == 3.0
    assert replace(priced, price_per_gpu_hour=2.0).gpu_price == 2.0
    assert Machine.with_card(H100).gpu_price is None  # our own catalogue has no prices
    other = replace(priced, price_per_gpu_hour=2.0).with_other_card(find_card("4090"))
    assert other.gpu_price is None  # the price was that of an H100
    assert replace(Machine(), price_per_gpu_hour=2.0).with_other_card(H100).gpu_price == 2.0


def test_more_gpus_cost_more_where_each_is_slower() -> None:
    found = sweep(asked(price=2.0), 256)
    for point in found.points:
        assert point.cost is not None
        assert point.efficiency is not None
        first = found.points[0].cost
        assert first is not None
        assert point.cost.money == pytest.approx((first.money or 0) / point.efficiency)
