"""Dynamic loss scaling, and clipping that removes the scale in the same stroke."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scalegpt.backends.base import LossScaler, clip_factor, is_finite, local_square_norm


def test_only_fp16_is_scaled() -> None:
    for precision in ("fp32", "bf16"):
        scaler = LossScaler.for_precision(precision)
        for overflow in (True, False) * 3:
            scaler.update(overflow)
        assert (scaler.scale, scaler.good_steps) == (1.0, 0)
    assert LossScaler.for_precision("fp16").scale == 65536.0


def test_an_overflow_halves_and_enough_good_steps_double() -> None:
    scaler = LossScaler(scale=16.0, interval=3, dynamic=True)
    scales = []
    for overflow in (True, False, False, True, False, False, False, False):
        scaler.update(overflow)
        scales.append((scaler.scale, scaler.good_steps))
    assert scales == [(8, 0), (8, 1), (8, 2), (4, 0), (4, 1), (4, 2), (8, 0), (8, 1)]


@given(st.lists(st.booleans(), max_size=60))
def test_the_scale_is_a_power_of_two_and_never_below_its_floor(overflows: list[bool]) -> None:
    scaler = LossScaler(scale=8.0, interval=2, dynamic=True)
    for overflow in overflows:
        scaler.update(overflow)
        assert scaler.scale >= 1.0
        assert math.log2(scaler.scale).is_integer()
        assert 0 <= scaler.good_steps < scaler.interval


@given(st.floats(0, 1e6), st.floats(0.01, 100), st.sampled_from([1.0, 2.0**16]))
def test_clipping_bounds_the_norm_and_removes_the_scale(norm: float, limit: float, scale: float) -> None:
    after = norm * scale * clip_factor(norm, limit, scale)
    assert after <= limit * (1 + 1e-9)
    if norm < 0.99 * limit:
        assert after == pytest.approx(norm)


def test_a_limit_of_zero_clips_nothing() -> None:
    assert clip_factor(1e9, 0.0, 4.0) == 0.25


def test_the_square_norm_is_summed_in_fp32() -> None:
    gradients = [torch.full((3, 5), 2.0), torch.full((4,), -300.0, dtype=torch.float16)]
    square = local_square_norm(gradients, torch.device("cpu"))
    assert square.dtype == torch.float32
    assert square.item() == pytest.approx(15 * 4 + 4 * 90_000)  # more than fp16 holds
    assert local_square_norm([], torch.device("cpu")).item() == 0.0
    broken = local_square_norm([torch.tensor([1.0, math.inf])], torch.device("cpu")).sqrt().item()
    assert not is_finite(broken)
    assert not is_finite(math.nan)
    assert is_finite(3.0)
