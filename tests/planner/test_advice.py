"""Why a plan and not another: every alternative is what it says, and every remedy works."""

import shlex
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from scalegpt.config.presets import resolve
from scalegpt.config.run import PLANNED
from scalegpt.hardware.gpus import GB, catalogue, find_card
from scalegpt.hardware.machine import Machine
from scalegpt.planner.plan import Plan
from scalegpt.planner.search.advice import Alternative, Remedy, alternatives, differences, remedies
from scalegpt.planner.search.choose import choose
from scalegpt.planner.search.question import Question
from scalegpt.planner.search.ranking import plan_key


def question(preset: str = "350M_1024", *, gpu: str = "4090", gpus: int = 1, nodes: int = 1, **known: Any) -> Question:
    machine = replace(Machine.with_card(find_card(gpu), gpus=gpus, nodes=nodes), **known)
    return Question(resolve(preset=preset, flags={"precision": "fp16"}), machine)


QUESTIONS = {
    "one": question(),
    "one that is tight": question("500M_1024", gpu="rtx3060"),
    "four": question(gpu="a100-40gb", gpus=4),
    "more than are used": question("demo", gpus=2, nodes=4, network_gbps=1),
}


@cache
def explained(name: str) -> tuple[Question, Plan, list[Alternative]]:
    asked = QUESTIONS[name]
    chosen = choose(asked).best
    assert chosen is not None
    others = alternatives(asked, chosen)
    assert others
    return asked, chosen, others


def settings(plan: Plan) -> dict[str, Any]:
    train, parallel = plan.run.train, plan.run.parallel
    return {
        "gpus": plan.machine.gpus, "nodes": plan.machine.nodes, "backend": parallel.backend,
        "zero_stage": parallel.stage, "offload": parallel.offload, "micro_batch": plan.batch.micro_batch,
        "recompute": train.recompute, "loss": train.loss,
    }  # fmt: skip


# --- alternatives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUESTIONS)
def test_no_alternative_that_fits_is_in_a_faster_class(name: str) -> None:
    asked, chosen, others = explained(name)
    fitting = [each.plan for each in others if each.plan.total_bytes <= asked.limit and each.plan.fits_host]
    assert all(plan_key(plan, asked.run)[0] >= plan_key(chosen, asked.run)[0] for plan in fitting)
    assert len(fitting) < len(others) or name != "one that is tight"


@pytest.mark.parametrize("name", QUESTIONS)
def test_what_differs_is_said_as_flags_and_nothing_else(name: str) -> None:
    _, chosen, others = explained(name)
    for each in others:
        words = iter(shlex.split(each.differs))
        said = {flag.removeprefix("--"): value for flag, value in zip(words, words, strict=True)}
        theirs, ours = settings(each.plan), settings(chosen)
        assert said == {key: str(value) for key, value in theirs.items() if value != ours[key]}
        assert said


@pytest.mark.parametrize("name", QUESTIONS)
def test_each_is_listed_once_and_not_the_chosen_one(name: str) -> None:
    _, chosen, others = explained(name)
    seen = [settings(each.plan) for each in others]
    assert settings(chosen) not in seen
    assert all(seen.count(each) == 1 for each in seen)


@pytest.mark.parametrize("name", QUESTIONS)
def test_the_reason_is_true(name: str) -> None:
    asked, chosen, others = explained(name)
    for each in others:
        slower = each.plan.seconds / chosen.seconds - 1
        if each.why_not.startswith("takes"):
            assert each.why_not == f"takes {slower:.1%} longer"
        elif each.why_not.startswith("does not fit"):
            assert each.plan.fits is False
        elif each.why_not.startswith("fits only without"):
            assert each.plan.fits
            assert each.plan.total_bytes > asked.limit
        else:
            assert slower < 0.001
            assert plan_key(each.plan, asked.run) > plan_key(chosen, asked.run)
            if "must gain" in each.why_not:
                assert each.why_not.startswith(f"{chosen.seconds / each.plan.seconds - 1:.1%} faster")


def test_what_is_fixed_is_not_varied() -> None:
    asked = replace(QUESTIONS["four"], open=PLANNED - {"recompute", "loss"})
    chosen = choose(asked).best
    assert chosen is not None
    others = alternatives(asked, chosen)
    assert others
    assert {(each.plan.run.train.recompute, each.plan.run.train.loss) for each in others} == {
        (asked.run.train.recompute, asked.run.train.loss)
    }


def test_all_cards_are_an_alternative_where_fewer_are_used() -> None:
    asked, chosen, others = explained("more than are used")
    assert chosen.machine.ranks < asked.machine.ranks
    whole = [each for each in others if each.plan.machine.ranks == asked.machine.ranks]
    assert len(whole) == 1
    assert "longer" in whole[0].why_not


def test_every_alternative_has_the_same_step() -> None:
    """Also of a preset that names no tokens, which are then those of its micro batch on all cards."""
    asked, chosen, others = explained("more than are used")
    assert asked.run.train.tokens_per_step is None
    assert {each.plan.batch.tokens for each in others} == {chosen.batch.tokens}


def test_a_plan_does_not_differ_from_itself() -> None:
    _, chosen, _ = explained("one")
    assert differences(chosen, chosen) == ""


def test_host_memory_that_is_short_is_the_reason() -> None:
    asked = question("500M_1024", gpu="4090", host_bytes=GB)
    chosen = choose(asked).best
    assert chosen is not None
    reasons = {each.plan.run.parallel.offload: each.why_not for each in alternatives(asked, chosen)}
    assert "of host memory in each machine, of 0.93 GiB" in reasons["all"]


# --- remedies --------------------------------------------------------------------------------------------------------


def by_kind(found: list[Remedy]) -> dict[str, Remedy]:
    return {"cards" if "of these" in each.what else each.what.split()[0]: each for each in found}


def too_large() -> Question:
    """A run that its card cannot hold as it is fixed."""
    asked = replace(question("500M_1024", gpu="rtx3060"), open=frozenset({"micro_batch"}))
    run = asked.run
    asked = replace(asked, run=replace(run, train=run.train.changed(recompute="none", loss="full")))
    assert choose(asked).best is None
    return asked


def test_every_remedy_fits_where_the_run_does_not() -> None:
    asked = too_large()
    found = by_kind(remedies(asked))
    assert set(found) == {"with", "cards", "on"}
    for each in found.values():
        assert each.plan.fits
        assert each.plan.total_bytes <= each.plan.machine.usable_bytes * (1 - asked.margin)
    freed = found["with"].plan
    assert freed.machine == asked.machine
    assert settings(freed) != settings(choose(asked).closest or freed)
    more, larger = found["cards"].plan.machine, found["on"].plan.machine
    assert more.card == asked.machine.card
    assert more.ranks > 1
    assert (larger.usable_bytes or 0) > (asked.machine.usable_bytes or 0)


def test_the_card_is_the_smallest_that_holds_it() -> None:
    asked = too_large()
    asked = replace(asked, machine=replace(asked.machine, usable_bytes=5 * GB))
    held = by_kind(remedies(asked))["on"].plan.machine.usable_bytes or 0
    smaller = [card for card in catalogue() if (asked.machine.usable_bytes or 0) < card.usable_bytes < held]
    assert smaller
    for card in smaller:
        assert choose(replace(asked, machine=Machine.with_card(card))).best is None, card.name


def test_nothing_is_set_free_that_is_free_already() -> None:
    nothing = question("500M_1024", gpu="rtx3060", usable_bytes=GB // 2)
    assert choose(nothing).best is None
    assert "with" not in by_kind(remedies(nothing))
