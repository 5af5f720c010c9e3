"""The benchmark of the order of windows finds a window that is missing."""

import pytest

from benchmarks.order_speed import comes_once
from scalegpt.data.windows.sampler import Starts, WindowSampler


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("tokens", [17, 48, 1000, 4096])
def test_an_epoch_has_every_window_once(tokens: int, seed: int) -> None:
    assert comes_once(WindowSampler(tokens, 16, seed), at_once=7)


def test_a_window_that_comes_twice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = WindowSampler(1000, 16, seed=0)
    real = sampler.starts

    def starts(first: int, count: int) -> Starts:
        return real(max(0, first - 1), count)

    monkeypatch.setattr(sampler, "starts", starts)
    assert not comes_once(sampler, at_once=7)
