"""How long a run is, and what is said of a length that may surprise."""

import pytest

from scalegpt.config import TrainConfig
from scalegpt.planner.length import length_notes, total_steps


@pytest.mark.parametrize(
    ("iters", "tokens", "steps"), [(7, None, 7), (None, 501, 6), (7, 501, 6), (3, 501, 3), (0, 501, 0), (None, 1, 1)]
)
def test_the_shorter_length_counts(iters: int | None, tokens: int | None, steps: int) -> None:
    assert total_steps(TrainConfig(max_iters=iters, max_tokens=tokens), 100) == steps


def test_two_lengths_are_reported_with_the_one_that_counts() -> None:
    (line,) = length_notes(TrainConfig(max_iters=1000, max_tokens=26 * 10**9), 524_288, {"max_tokens"})
    assert "the run ends after 1,000 steps" in line
    assert "--max_iters none trains for 49,592 steps" in line
    (line,) = length_notes(TrainConfig(max_iters=1000, max_tokens=501), 100, {"max_tokens"})
    assert "the run ends after 6 steps" in line
    assert "--max_tokens none trains for 1,000 steps" in line


def test_minutes_alone_leave_the_default_length_which_is_reported() -> None:
    train = TrainConfig(max_minutes=600)
    (line,) = length_notes(train, 100, {"max_minutes"})
    assert "1,000 steps, the default" in line
    assert not list(length_notes(train, 100, {"max_minutes", "max_iters"}))
    assert not list(length_notes(TrainConfig(), 100, ()))
    assert not list(length_notes(TrainConfig(max_iters=None, max_tokens=501), 100, {"max_tokens"}))
