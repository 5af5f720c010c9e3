"""The learning rate's curves: where they begin, peak and end."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalegpt.config import TrainConfig
from scalegpt.config.train import SCHEDULES
from scalegpt.training.schedules import decay_start, learning_rate

PEAK = 1e-3

trains = st.builds(
    TrainConfig,
    schedule=st.sampled_from(SCHEDULES),
    warmup_steps=st.integers(0, 50),
    min_lr_ratio=st.floats(0, 1),
    decay_fraction=st.floats(0.01, 1),
    learning_rate=st.just(PEAK),
)


def curve(total: int, **settings: object) -> list[float]:
    train = TrainConfig(learning_rate=PEAK, **settings)  # type: ignore[arg-type]
    return [learning_rate(train, step, total) for step in range(total + 1)]


@given(trains, st.integers(1, 200))
def test_every_curve_rises_to_the_peak_then_never_again(train: TrainConfig, total: int) -> None:
    rates = [learning_rate(train, step, total) for step in range(total)]
    warm, after = rates[: train.warmup_steps], rates[train.warmup_steps :]
    assert all(0 < rate <= PEAK for rate in warm)
    assert all(train.min_lr_ratio * PEAK * (1 - 1e-9) <= rate <= PEAK * (1 + 1e-9) for rate in after)
    assert warm == sorted(warm)
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(after))
    if train.schedule == "constant" or train.min_lr_ratio == 1:
        assert after == pytest.approx([PEAK] * len(after))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_is_a_line_that_reaches_the_peak_where_it_ends(schedule: str) -> None:
    rates = curve(100, schedule=schedule, warmup_steps=9)
    assert rates[:10] == pytest.approx([PEAK * (step + 1) / 10 for step in range(10)])
    assert curve(100, schedule=schedule, warmup_steps=0)[0] == PEAK


def test_cosine_is_half_way_down_in_the_middle_and_ends_at_the_minimum() -> None:
    rates = curve(110, schedule="cosine", warmup_steps=10, min_lr_ratio=0.1)
    assert rates[60] == pytest.approx(PEAK * 0.55)
    assert rates[110] == pytest.approx(PEAK * 0.1)
    assert rates[109] == pytest.approx(PEAK * 0.1, rel=0.01)


def test_wsd_stays_then_falls_along_a_line() -> None:
    rates = curve(100, schedule="wsd", warmup_steps=10, min_lr_ratio=0.0, decay_fraction=0.2)
    assert rates[10:81] == [PEAK] * 71
    assert rates[80:101] == pytest.approx([PEAK * (20 - step) / 20 for step in range(21)], abs=1e-12)


@given(st.integers(1, 500), st.integers(0, 50), st.floats(0.01, 1))
def test_the_decay_starts_after_the_last_step_at_the_peak(total: int, warmup: int, fraction: float) -> None:
    settings = {"schedule": "wsd", "warmup_steps": warmup, "decay_fraction": fraction, "min_lr_ratio": 0.0}
    start = decay_start(TrainConfig(learning_rate=PEAK, **settings), total)  # type: ignore[arg-type]
    rates = curve(total, **settings)
    if start < total:
        assert rates[start] == PEAK
        assert rates[start + 1] < PEAK
    else:
        assert start == warmup


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_warm_up_as_long_as_the_run_or_longer_is_all_there_is(schedule: str) -> None:
    rates = curve(10, schedule=schedule, warmup_steps=20)
    assert rates == pytest.approx([PEAK * (step + 1) / 21 for step in range(11)])


def test_past_the_end_the_last_rate_holds() -> None:
    train = TrainConfig(learning_rate=PEAK, warmup_steps=5, min_lr_ratio=0.1)
    assert learning_rate(train, 500, 100) == pytest.approx(PEAK * 0.1)
    assert learning_rate(train, 0, 0) <= PEAK
