"""Ranks wait for long work of others as long as there is progress, and no longer."""

import threading
import time
from datetime import timedelta

import pytest
from torch._C._distributed_c10d import HashStore

from scalegpt.backends import waiting
from scalegpt.backends.waiting import finish_together, next_work, reporting
from scalegpt.errors import RunError


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "BEAT_SECONDS", 0.05)


def compute(seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        sum(range(1000))


def wait_for(work_seconds: float, *, busy: bool, patience: float) -> list[BaseException]:
    """Let rank 1 of 2 wait for rank 0, which works for some time; what rank 1 raised."""
    store, name, raised = HashStore(), next_work(), []

    def other() -> None:
        try:
            finish_together(store, name, 1, 2, timedelta(seconds=patience))
        except RunError as error:
            raised.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    with reporting(store, name):
        compute(work_seconds) if busy else time.sleep(work_seconds)
    if not raised:
        finish_together(store, name, 0, 2, timedelta(seconds=60))
    thread.join()
    return raised


def test_work_with_progress_may_take_longer_than_the_patience() -> None:
    assert wait_for(6.0, busy=True, patience=3.0) == []


def test_work_without_progress_is_given_up_and_named() -> None:
    (error,) = wait_for(2.0, busy=False, patience=0.5)
    assert "rank 0 prepares the data and has made no progress for 0 s" in str(error).replace("for 1 s", "for 0 s")


def test_all_that_are_done_go_on_at_once() -> None:
    store, name = HashStore(), next_work()
    threads = [
        threading.Thread(target=finish_together, args=(store, name, rank, 3, timedelta(seconds=60)))
        for rank in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def test_works_do_not_share_a_name() -> None:
    assert next_work() != next_work()
