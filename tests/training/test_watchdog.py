"""The watchdog of one rank: its limits, what it leaves, and how it follows another rank's word."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from scalegpt.backends import World
from scalegpt.training.resilience.heartbeat import Halt, Heartbeats
from scalegpt.training.resilience.watchdog import HUNG_STATUS, Watchdog
from scalegpt.training.runs.directory import RunDirectory

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


class Clock:
    """Seconds that pass when a test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Rank:
    """A watchdog whose end is noted, not carried out; beats are 100 a second."""

    def __init__(self, folder: Path, *, rank: int = 0, size: int = 1, first: float = 100, later: float = 10) -> None:
        self.clock, self.left = Clock(), threading.Event()
        self.statuses: list[int] = []
        self.beats = Heartbeats(folder, replace(ALONE, rank=rank, size=size))
        self.beats.seconds = 0.01
        self.directory = RunDirectory(folder)
        self.dog = Watchdog(self.directory, self.beats, first=first, later=later, leave=self._leave, clock=self.clock)

    def _leave(self, status: int) -> None:
        self.statuses.append(status)
        self.left.set()

    def status(self) -> Any:
        return json.loads(self.directory.status.read_text())


@pytest.fixture
def ranks(tmp_path: Path) -> Any:
    """A factory of ranks in one run; they are stopped in the end."""
    made: list[Rank] = []

    def make(**options: Any) -> Rank:
        one = Rank(tmp_path, **options)
        if made:
            one.beats.open = lambda: setattr(one.beats, "folder", made[0].beats.folder)  # type: ignore[method-assign]
        else:
            one.beats.world = replace(one.beats.world, size=1)
            one.beats.open()
            one.beats.world = replace(one.beats.world, size=options.get("size", 1))
            one.beats.open = lambda: None  # type: ignore[method-assign]
        made.append(one)
        return one

    yield make
    for each in made:
        each.dog.stop()
        if each.dog._thread.ident:
            each.dog._thread.join(10)
            assert not each.dog._thread.is_alive()


def test_a_step_in_time_is_left_alone(ranks: Callable[..., Rank]) -> None:
    one = ranks()
    one.dog.start(0)
    for step, seconds in ((1, 99), (2, 9), (3, 9)):
        one.dog.begin_step(step)
        one.clock.now += seconds
        assert not one.left.wait(0.1)
    one.dog.outside("evaluation")
    one.clock.now += 99
    assert not one.left.wait(0.1)


@pytest.mark.parametrize(
    ("steps", "outside", "seconds", "said"),
    [
        (1, None, 101, "step 1 takes more than 100 s"),
        (2, None, 11, "step 2 takes more than 10 s"),
        (2, "saving", 101, "step 2 takes more than 100 s"),
    ],
)
def test_a_step_that_takes_too_long_ends_the_run(
    ranks: Callable[..., Rank],
    capsys: pytest.CaptureFixture[str],
    steps: int,
    outside: str | None,
    seconds: float,
    said: str,
) -> None:
    one = ranks()
    one.directory.write_status(state="running", step=0, val_loss=2.5)
    one.dog.start(0)
    for step in range(1, steps + 1):
        one.dog.begin_step(step)
    if outside:
        one.dog.outside(outside)
    one.clock.now += seconds
    assert one.left.wait(20)
    assert one.statuses == [HUNG_STATUS]
    place = outside or "loader"
    assert (one.status()["state"], one.status()["val_loss"]) == ("failed", 2.5)
    assert one.status()["step"] == (steps if outside else steps - 1)
    assert one.status()["cause"].startswith(f"{said}: rank 0 (process ")
    assert one.status()["cause"].endswith(f"step {steps}, {place}: the only rank is at this point")
    assert one.status()["cause"] in capsys.readouterr().err
    stacks = (one.directory.path / "stacks_rank_0.txt").read_text()
    assert f"step {steps}, {place}" in stacks
    assert "test_a_step_that_takes_too_long_ends_the_run" in stacks


def test_zero_is_endless(ranks: Callable[..., Rank]) -> None:
    one = ranks(first=0, later=0)
    one.dog.start(0)
    for step in (1, 2):
        one.dog.begin_step(step)
        one.clock.now += 1e9
        assert not one.left.wait(0.05)


def test_all_ranks_leave_stacks_and_one_names_the_slow_one(ranks: Callable[..., Rank]) -> None:
    pair = [ranks(rank=rank, size=2) for rank in range(2)]
    for each in pair:
        each.dog.start(3)
        each.dog.begin_step(4)
    pair[0].dog.at("forward and backward")  # and waits there for rank 1, which is in its loader
    pair[0].clock.now += 101
    assert all(each.left.wait(20) for each in pair)
    assert [each.statuses for each in pair] == [[HUNG_STATUS], [HUNG_STATUS]]
    assert "rank 1 (process" in pair[0].status()["cause"]
    assert "step 4, loader: the others wait for it" in pair[0].status()["cause"]
    assert all((pair[0].directory.path / f"stacks_rank_{rank}.txt").is_file() for rank in range(2))


def test_a_failure_of_another_rank_ends_this_one(
    ranks: Callable[..., Rank], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (ranks(rank=rank, size=2) for rank in range(2))
    first.dog.start(0)
    second.beats.open()
    told = second.dog.halt("the disk\n is full", status=1)
    assert told == Halt(1, 1, "failed", "the disk is full")
    assert first.left.wait(20)
    assert first.statuses == [1]
    assert (first.status()["state"], first.status()["cause"]) == ("failed", "the disk is full")
    assert "rank 0 ends: the disk is full" in capsys.readouterr().err
    assert first.dog.halt("a broken connection", status=1) == told  # the consequence is not told in its place
    assert first.status()["cause"] == "the disk is full"


def test_a_rank_that_ends_by_itself_is_not_ended(ranks: Callable[..., Rank]) -> None:
    first, second = (ranks(rank=rank, size=2) for rank in range(2))
    first.beats.seconds = 0.3
    first.dog.start(0)
    second.beats.open()
    second.dog.halt("out of memory", status=1)
    time.sleep(0.4)  # it has read that, and waits
    first.dog.stop()
    assert not first.left.wait(0.8)


def test_batches_pass_and_say_whose_turn_it_is(ranks: Callable[..., Rank]) -> None:
    one, seen = ranks(), []

    def batches() -> Any:
        for number in range(2):
            seen.append(one.dog.place)
            yield number

    one.dog.begin_step(1)
    seen.extend((number, one.dog.place) for number in one.dog.loading(batches()))
    assert seen == ["loader", (0, "forward and backward"), "loader", (1, "forward and backward")]
    assert (one.dog.place, one.dog.moves) == ("optimizer", 6)
