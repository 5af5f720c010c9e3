"""Which ranks and machines are reported as slow, and that a rank measures its own work alone."""

import time

import pytest
import torch

from scalegpt.backends import World
from scalegpt.backends.machines import Machine
from scalegpt.training.resilience.pace import IN_A_ROW, LEAST_STEPS, Pace, own_seconds

MACHINES = (Machine("alpha", "10.0.0.1", "eth0", 0, 2), Machine("beta", "10.0.0.2", "eth0", 2, 2))


def pace_of(size: int, machines: tuple[Machine, ...] = ()) -> Pace:
    return Pace(World(0, size, 0, size, torch.device("cpu"), machines), log_every=1)


def lines_of(pace: Pace, seconds: list[float], windows: int) -> list[list[str]]:
    return [[line for _ in range(LEAST_STEPS) for line in pace.compare(seconds)] for _ in range(windows)]


def test_a_slow_rank_is_reported_once_when_it_has_been_slow_for_a_while() -> None:
    pace = pace_of(4)
    found = lines_of(pace, [1.0, 1.0, 1.4, 1.1], IN_A_ROW + 2)
    assert [len(each) for each in found] == [0] * (IN_A_ROW - 1) + [1, 0, 0]
    assert found[IN_A_ROW - 1][0].startswith("warning: rank 2 takes 1.4 times the median of the ranks for its own work")
    assert lines_of(pace, [1.0, 1.0, 1.0, 1.1], 1) == [[]]
    assert [len(each) for each in lines_of(pace, [1.0, 1.0, 1.4, 1.1], IN_A_ROW)] == [0] * (IN_A_ROW - 1) + [1]


def test_a_slow_machine_is_reported_by_its_name() -> None:
    (line,) = lines_of(pace_of(4, MACHINES), [1.0, 1.0, 1.5, 1.6], IN_A_ROW)[-1]
    assert line.startswith("warning: beta (10.0.0.2, ranks 2–3) takes 1.5 times the median of the ranks")


def test_a_slow_rank_on_a_machine_that_is_not_slow() -> None:
    (line,) = lines_of(pace_of(4, MACHINES), [1.0, 1.0, 1.0, 2.0], IN_A_ROW)[-1]
    assert line.startswith("warning: rank 3 takes 2.0 times")


@pytest.mark.parametrize("seconds", [[1.0], [1.0, 1.15], [0.0, 1.0]])
def test_nothing_is_reported_of_one_rank_of_small_differences_and_of_unknown_times(seconds: list[float]) -> None:
    assert lines_of(pace_of(len(seconds)), seconds, 2 * IN_A_ROW) == [[]] * (2 * IN_A_ROW)


def test_only_own_work_counts() -> None:
    """Time asleep, as in a collective, does not count; the time of the loader neither."""
    clock = iter([0.0, 1.0, 10.0, 12.5])
    pace = Pace(World(0, 2, 0, 2, torch.device("cpu")), log_every=1, clock=lambda: next(clock))
    assert list(pace.timed("ab")) == ["a", "b"]
    assert pace.taken() == 3.5
    start = own_seconds()
    time.sleep(0.3)
    assert own_seconds() - start < 0.15
    until = time.thread_time() + 0.2
    start = own_seconds()
    while time.thread_time() < until:
        pass
    assert own_seconds() - start >= 0.15
