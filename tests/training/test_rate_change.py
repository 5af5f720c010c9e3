"""What a resumed run reports of its learning rate, and that the flags it offers do what it says."""

from typing import Any

import pytest

from scalegpt.config import TrainConfig
from scalegpt.config.train import MOST_STEPS
from scalegpt.training.runs.changes import keeping, rate_change
from scalegpt.training.schedules import learning_rate

BEFORE = {"learning_rate": 1e-3, "min_lr_ratio": 0.1, "warmup_steps": 10, "schedule": "cosine", "max_iters": 100}


def lines(step: int, total: int, before: dict[str, Any] = BEFORE, steps: Any = 100, **now: Any) -> list[str]:
    train = TrainConfig(**{**before, "max_iters": total, **now})
    return rate_change({"train": {**before, "unknown": 1}}, {"steps": steps}, train, step, total)


def test_an_extended_run_reports_the_jump_in_numbers_and_how_to_keep_the_rate() -> None:
    (line,) = lines(100, 200)
    train = TrainConfig(**{**BEFORE, "max_iters": 200})
    assert line.startswith(
        "warning: the learning rate goes from 1.00e-04 in step 100 to "
        f"{learning_rate(train, 100, 200):.2e} in step 101, and is "
        "1.00e-04 in step 200, where the cosine schedule ends now; to stay at 1.00e-04, add --allow_change "
        "schedule,learning_rate --schedule constant --learning_rate 0.000100"
    )
    assert "\n" not in line


def test_the_flags_that_are_offered_keep_the_rate() -> None:
    (line,) = lines(100, 200)
    rate = float(line.partition("--learning_rate ")[2].split(";")[0])
    last = learning_rate(TrainConfig(**BEFORE), 99, 100)
    assert rate == pytest.approx(last, rel=1e-5)
    constant = TrainConfig(**{**BEFORE, "max_iters": 200, "schedule": "constant", "learning_rate": rate})
    assert {learning_rate(constant, step, 200) for step in range(100, 200)} == {rate}
    first = int(line.partition("until step ")[2].split()[0])
    wsd = constant.changed(schedule="wsd")
    rates = [learning_rate(wsd, step, 200) for step in range(100, 200)]
    assert set(rates[: first - 100]) == {rate}
    assert rates[first - 100 :] == sorted(rates[first - 100 :], reverse=True)
    assert rates[-1] < rate


def test_the_longest_run_is_answered_without_walking_through_its_steps() -> None:
    (line,) = lines(100, MOST_STEPS)
    first = int(line.partition("until step ")[2].split()[0].replace(",", ""))
    assert first == MOST_STEPS - MOST_STEPS // 5 + 1  # by default a fifth of the steps decays


@pytest.mark.parametrize(
    ("step", "total"),
    [(0, 200), (200, 200), (100, 100), (5, 200), (50, 100)],
    ids=["new", "nothing left", "finished", "in the warm-up", "unchanged"],
)
def test_where_the_rate_stays_nothing_is_said(step: int, total: int) -> None:
    assert lines(step, total) == []


def test_a_constant_rate_does_not_change() -> None:
    assert lines(100, 200, {**BEFORE, "schedule": "constant"}) == []


def test_a_schedule_that_the_user_changes_is_reported_without_advice() -> None:
    (line,) = lines(50, 100, learning_rate=5e-4)
    assert line.startswith("the learning rate goes from ")
    assert "--allow_change" not in line


@pytest.mark.parametrize("steps", [None, "100", 1.5, [100]])
def test_a_plan_that_does_not_say_how_many_steps_says_nothing(steps: Any) -> None:
    assert lines(100, 200, steps=steps) == []


@pytest.mark.parametrize("value", ["none such", None, [1]])
def test_a_configuration_of_another_release_says_nothing(value: Any) -> None:
    train = TrainConfig(**{**BEFORE, "max_iters": 200})
    assert rate_change({"train": {**BEFORE, "schedule": value}}, {"steps": 100}, train, 100, 200) == []
    assert rate_change(None, None, train, 100, 200) == []


def test_the_flags_in_words() -> None:
    assert keeping(1.23456789e-4).endswith("--learning_rate 0.000123457")
