"""Ranks that meet at a store which an earlier start has used, and at a port which another program has."""

import os
import socket
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
from torch import distributed as dist

from ranks import free_port
from scalegpt.backends import meeting
from scalegpt.backends.meeting import _process_name, meet, meeting_store, own_store
from scalegpt.errors import InputError, RunError
from scalegpt.system.ranks import Ranks

SOON = timedelta(seconds=30)


def start(store: dist.Store, ranks: dict[int, float], size: int) -> dict[int, dist.Store]:
    """Start ranks after these seconds each; returns the stores that they agree on."""
    corners: dict[int, dist.Store] = {}

    def come(rank: int) -> None:
        corners[rank] = meet(store, Ranks(rank, size, rank, size), SOON, "here")

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
    with pytest.raises(RunError, match="ranks 1, 2 did not connect"):
        meet(store, Ranks(0, 3, 0, 3), timedelta(seconds=0.3), "here")


def meet_at(port: int, *, late: int | None = None) -> list[dist.Store]:
    """The stores of two ranks of this process, as if it were their launcher; a rank comes late."""

    def come(rank: int) -> dist.Store:
        if rank == late:
            time.sleep(0.3)
        return own_store(Ranks(rank, 2, rank, 2), port, timedelta(seconds=20))

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(come, (0, 1)))


@pytest.mark.parametrize("late", [0, 1])
def test_ranks_of_one_launcher_meet_at_another_port_where_theirs_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: int
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / f"scalegpt-{os.getuid()}"
    folder.mkdir(mode=0o700)
    (folder / f"{os.getppid()}@1000000.port").write_text("1")  # a dead one's, of the same number
    of_a_living_one = folder / f"{_process_name(os.getpid())}.port"
    of_a_living_one.write_text("1")
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        first, second = meet_at(port, late=late)
    first.set("word", "given")
    assert second.get("word") == b"given"
    assert first.port == second.port != port  # type: ignore[attr-defined]
    assert list(folder.iterdir()) == [of_a_living_one]


def test_a_folder_that_others_can_write_to_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / f"scalegpt-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(InputError, match=f"{folder} is not a folder that only you can write to"):
        own_store(Ranks(0, 2, 0, 2), 0, timedelta(seconds=1))
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(InputError, match="not a folder that only you can write to"):
        own_store(Ranks(0, 2, 0, 2), 0, timedelta(seconds=1))


def test_the_folder_is_made_for_its_owner_alone_and_rank_0_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(RunError, match="rank 0 did not connect"):
        own_store(Ranks(1, 2, 1, 2), 0, timedelta(seconds=0.1))
    assert (tmp_path / f"scalegpt-{os.getuid()}").stat().st_mode & 0o777 == 0o700


# --- one store for all -----------------------------------------------------------------------------------------------


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> int:
    """Two ranks that no launcher has started; their port."""
    for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE", "CROSS_SIZE"):
        monkeypatch.delenv(name, raising=False)
    port = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    return port


def ranks_meet(delay: float) -> list[dist.Store]:
    def come(rank: int) -> dist.Store:
        time.sleep(delay * rank)
        return meeting_store(Ranks(rank, 2, rank, 2), timedelta(seconds=20))

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(come, (0, 1)))


def test_ranks_that_were_started_by_hand_meet_at_loopback_alone(by_hand: int) -> None:
    first, second = ranks_meet(0.1)
    first.set("word", "given")
    assert second.get("word") == b"given"
    places = {each.laddr for each in psutil.Process().net_connections("tcp") if each.status == psutil.CONN_LISTEN}
    assert [place.ip for place in places if place.port == by_hand] == ["127.0.0.1"]


def test_who_is_awaited_is_said_after_some_seconds_and_where(
    by_hand: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(meeting, "NOTICE_SECONDS", 0.2)
    ranks_meet(0.6)
    said = capfd.readouterr().out
    advice = "; unset WORLD_SIZE and RANK to train in one process\n"
    assert said == f"rank 0 of 2 is waiting for rank 1 at 127.0.0.1:{by_hand}{advice}"
    with pytest.raises(RunError, match=f"rank 1 got no answer from 127.0.0.1:{by_hand}"):
        meeting_store(Ranks(1, 2, 1, 2), timedelta(seconds=0.5))
    assert capfd.readouterr().out == f"rank 1 of 2 is waiting for rank 0 at 127.0.0.1:{by_hand}{advice}"


def test_many_ranks_are_counted() -> None:
    assert meeting._named({3}) == "rank 3"
    assert meeting._named(set(range(1, 21))) == "ranks 1, 2, 3, 4, 5, 6, 7, 8 and 12 more"
