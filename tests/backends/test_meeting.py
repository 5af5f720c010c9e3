"""Ranks that meet at a store which an earlier start has used."""

import threading
from datetime import timedelta

import pytest
from torch import distributed as dist

from scalegpt.backends.meeting import meet
from scalegpt.errors import RunError

SOON = timedelta(seconds=30)


def start(store: dist.Store, ranks: dict[int, float], size: int) -> dict[int, dist.Store]:
    """Let ranks come after so many seconds each; their corners."""
    corners: dict[int, dist.Store] = {}

    def come(rank: int) -> None:
        corners[rank] = meet(store, rank, size, SOON)

    timers = [threading.Timer(seconds, come, [rank]) for rank, seconds in ranks.items()]
    for timer in timers:
        timer.start()
    for timer in timers:
        timer.join()
    return corners


@pytest.mark.parametrize("order", [{0: 0.0, 1: 0.2, 2: 0.1}, {0: 0.3, 1: 0.0, 2: 0.1}])
def test_ranks_share_a_corner_that_no_earlier_start_has_used(order: dict[int, float]) -> None:
    store = dist.HashStore()
    before = start(store, {0: 0.0, 1: 0.0, 2: 0.0}, 3)
    before[1].set("address", "of the dead")
    corners = start(store, order, 3)
    assert sorted(corners) == [0, 1, 2]
    assert not any(corner.check(["address"]) for corner in corners.values())
    corners[2].set("address", "mine")
    assert corners[0].get("address") == corners[1].get("address") == b"mine"


def test_ranks_that_never_come_are_named() -> None:
    store = dist.HashStore()
    store.set("scalegpt/hello/1", "left by a dead one")
    with pytest.raises(RunError, match=r"ranks \[1, 2\] did not come"):
        meet(store, 0, 3, timedelta(seconds=0.3))
