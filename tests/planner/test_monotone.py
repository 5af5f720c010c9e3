"""Nothing better makes a plan slower: more memory, more cards, a faster card or link.

Of the fastest plan that fits this holds exactly. What is chosen may be simpler and slower by up to a tie and the margins of
the machinery that it does without, so that its time may rise within those; but through any number of improvements never by
more (see ``search.time_class``).
"""

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, pairwise

import pytest

from plans import CARDS, draw_run, space
from scalegpt.hardware.gpus import GB, find_card
from scalegpt.hardware.machine import Machine
from scalegpt.planner.plan import Plan
from scalegpt.planner.search import ranking
from scalegpt.planner.search.choose import choose
from scalegpt.planner.search.question import Question, Scheme
from scalegpt.planner.search.ranking import TIE, handicap, plan_key

SEEDS = range(int(os.environ.get("SCALEGPT_SEARCH_CASES", "24")))
EXACT = 1 + 1e-6
"""Room for rounding, and for a tie that is no more than that."""

PAIRS = 5
"""Pairs of plans that each seed gives at least, on average: chains in which nothing fits give none."""

FIGURES = ("tflops", "gbps", "host_gbps", "link_gbps")


@pytest.fixture
def no_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the fastest win, however little it is ahead."""
    monkeypatch.setattr(ranking, "TIE", 1e-7)
    monkeypatch.setattr(ranking, "ERROR", 0.0)


def drawn(seed: int) -> Question:
    """A question about one or several cards, large enough for the run or not."""
    draw = random.Random(seed)
    machine = Machine.with_card(find_card(draw.choice(CARDS)), gpus=draw.choice([1, 2, 4]), nodes=draw.choice([1, 2]))
    machine = replace(machine, network_gbps=draw.choice([1, 25, 400]), usable_bytes=int(draw.uniform(2, 24) * GB))
    run = draw_run(draw, precisions=("fp16",))
    tokens = draw.choice([24, 48, 144]) * run.model.block_size
    return Question(replace(run, train=run.train.changed(tokens_per_step=tokens)), machine)


def with_memory(question: Question) -> Iterator[Question]:
    memory = question.machine.usable_bytes or 0
    for factor in (1, 1.02, 1.1, 1.3, 1.7, 2.5, 5, 12):
        yield replace(question, machine=replace(question.machine, usable_bytes=int(memory * factor)))


def with_cards(question: Question) -> Iterator[Question]:
    machine = question.machine
    for gpus, nodes in ((1, 1), (2, 1), (2, 3), (4, 6)):
        if 24 % (machine.ranks * gpus * nodes) == 0:
            more = machine.with_cards(gpus=machine.gpus * gpus, nodes=machine.nodes * nodes)
            yield replace(question, machine=more)


def with_faster_cards(question: Question, seed: int) -> Iterator[Question]:
    draw, machine = random.Random(seed), question.machine
    for names in ((), *((name,) for name in FIGURES), FIGURES):
        card = machine.card
        assert card is not None
        faster = replace(card, **{name: getattr(card, name) * draw.uniform(1, 2) for name in names})
        machine = replace(machine, card=faster, link=faster.link_of(machine.gpus))
        yield replace(question, machine=machine)
    yield replace(question, machine=replace(machine, network_gbps=3 * (machine.network_gbps or 0)))


def improvements(seed: int) -> tuple[list[Question], ...]:
    """Chains of questions, each about something better than the one before."""
    question = drawn(seed)
    return list(with_memory(question)), list(with_cards(question)), list(with_faster_cards(question, seed))


def plans(chain: list[Question]) -> list[Plan]:
    """The plans of a chain, from the first that fits on; from there on all do."""
    found = [choose(question).best for question in chain]
    first = next((place for place, plan in enumerate(found) if plan), len(found))
    assert all(found[first:]), chain
    return [plan for plan in found if plan]


@pytest.mark.usefixtures("no_ties")
def test_the_fastest_plan_is_never_slower() -> None:
    compared = 0
    for seed in SEEDS:
        for chain in improvements(seed):
            for before, after in pairwise(plans(chain)):
                assert after.seconds <= before.seconds * EXACT, (seed, before.machine, after.machine)
                assert after.tokens_per_second * EXACT >= before.tokens_per_second
                compared += 1
    assert compared > PAIRS * len(SEEDS)


def weight(plan: Plan, question: Question) -> float:
    """The margins of a plan's machinery."""
    return handicap(Scheme.of(plan.run), Scheme.of(question.run), plan.machine.ranks)


def test_the_chosen_plan_is_never_slower_by_more_than_a_tie_and_its_margins_through_any_improvements() -> None:
    compared = 0
    for seed in SEEDS:
        for chain in improvements(seed):
            run = chain[0].run
            for before, after in combinations(plans(chain), 2):
                assert plan_key(after, run)[0] <= plan_key(before, run)[0], (seed, before.machine, after.machine)
                margins = weight(before, chain[0]) / weight(after, chain[0])
                assert after.tokens_per_second * (1 + TIE) * margins > before.tokens_per_second
                compared += 1
    assert compared > PAIRS * len(SEEDS)


def test_what_is_chosen_ties_with_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [question for seed in SEEDS for question in with_memory(drawn(seed))]
    chosen = [choose(question).best for question in questions]
    weights = [weight(plan, question) if plan else 0.0 for plan, question in zip(chosen, questions, strict=True)]
    with monkeypatch.context() as patch:
        patch.setattr(ranking, "TIE", 1e-7)
        patch.setattr(ranking, "ERROR", 0.0)
        fastest = [choose(question).best for question in questions]
    for ours, best, ours_weight, question in zip(chosen, fastest, weights, questions, strict=True):
        assert (ours is None) == (best is None)
        if ours and best:
            assert best.seconds <= ours.seconds * EXACT
            assert ours.seconds * ours_weight < best.seconds * weight(best, question) * (1 + TIE)
    assert sum(plan is not None for plan in chosen) > len(questions) // 2


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.slow
def test_no_configuration_at_all_is_slower_on_a_faster_card(seed: int) -> None:
    before, *faster = with_faster_cards(drawn(seed), seed)
    times = [each.seconds for each in space(before.run, before.machine)]
    for question in faster:
        now = [each.seconds for each in space(question.run, question.machine)]
        assert len(now) == len(times)
        assert all(after <= earlier * (1 + 1e-12) for earlier, after in zip(times, now, strict=True))
        times = now
