"""What ranks know of each other: beats, one word that ends all, and who is to blame."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from scalegpt.backends import World
from scalegpt.errors import RunError
from scalegpt.training.resilience.heartbeat import FOLDER, Beat, Halt, Heartbeats

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture
def ranks(tmp_path: Path) -> list[Heartbeats]:
    """Three ranks that see one folder, as after a collective start."""
    made = [Heartbeats(tmp_path, replace(ALONE, rank=rank, size=3)) for rank in range(3)]
    folder = made[0]._make()
    for each in made:
        each.folder = folder
    return made


def test_everyone_reads_what_everyone_wrote(ranks: list[Heartbeats]) -> None:
    for rank, each in enumerate(ranks):
        each.beat(step=7, place="loader", moves=rank)
    beats = ranks[1].read()
    assert [(beat.rank, beat.step, beat.place, beat.moves) for beat in beats.values()] == [
        (0, 7, "loader", 0), (1, 7, "loader", 1), (2, 7, "loader", 2),
    ]  # fmt: skip
    assert beats[0].pid == os.getpid()
    assert not beats[0].is_known_dead()


def test_a_machine_that_sees_no_common_folder_watches_its_own_ranks(ranks: list[Heartbeats], tmp_path: Path) -> None:
    apart = Heartbeats(tmp_path / "nowhere", replace(ALONE, rank=2, size=3))
    apart.folder, apart.watched = tmp_path / "own", (2,)
    apart.folder.mkdir()
    for each in (*ranks[:2], apart):
        each.beat(step=7, place="loader", moves=1)
    assert list(apart.read()) == [2]
    assert apart.blame(lambda seconds: apart.beat(7, "loader", 1)).endswith(f"so are all ranks on {apart._host}")
    apart.remove()
    assert not (tmp_path / "own").exists()
    assert ranks[0].read().keys() == {0, 1}


def test_half_a_file_is_no_beat(ranks: list[Heartbeats]) -> None:
    ranks[0].beat(1, "loader", 1)
    assert ranks[0].folder is not None
    (ranks[0].folder / "rank_1.json").write_text('{"rank": 1, "st')
    (ranks[0].folder / "rank_2.json").write_text("[]")
    assert list(ranks[0].read()) == [0]


def test_a_disk_that_cannot_be_written_ends_nothing(ranks: list[Heartbeats]) -> None:
    ranks[0].remove()
    ranks[0].beat(1, "loader", 1)
    assert ranks[0].read() == {}
    halt = Halt(0, 1, "failed", "x")
    assert ranks[0].halt(halt) is halt
    assert ranks[0].read_halt() is None


def test_a_start_forgets_earlier_ones(tmp_path: Path) -> None:
    first = Heartbeats(tmp_path, ALONE)
    first.open()
    first.halt(Halt(0, 1, "failed", "long ago"))
    second = Heartbeats(tmp_path, ALONE)
    second.open()
    assert second.read_halt() is None
    assert len(list((tmp_path / FOLDER).iterdir())) == 1
    second.remove()
    assert not (tmp_path / FOLDER).exists()


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be made"):
        Heartbeats(tmp_path / "file", ALONE).open()


def test_the_first_word_ends_all(ranks: list[Heartbeats]) -> None:
    assert ranks[0].read_halt() is None
    mine, theirs = Halt(2, 75, "failed", "first"), Halt(0, 1, "failed", "second")
    assert ranks[2].halt(mine) is mine
    assert ranks[0].halt(theirs) == mine
    assert ranks[1].read_halt() == mine


def test_before_the_start_nobody_is_told(tmp_path: Path) -> None:
    beats, halt = Heartbeats(tmp_path, ALONE), Halt(0, 1, "failed", "x")
    beats.beat(0, "start", 0)
    assert beats.halt(halt) is halt
    assert beats.read_halt() is None
    assert list(tmp_path.iterdir()) == []


def test_many_ranks_write_less_often(tmp_path: Path) -> None:
    assert Heartbeats(tmp_path, replace(ALONE, size=8)).seconds == 1
    assert Heartbeats(tmp_path, replace(ALONE, size=640)).seconds == 10


# --- blame -----------------------------------------------------------------------------------------------------------


def blame(ranks: list[Heartbeats], *, alive: tuple[int, ...], moves: tuple[int, ...] = (9, 9, 9)) -> str:
    """Who is blamed where all have beaten before and ``alive`` ones do again."""
    for each, moved in zip(ranks, moves, strict=True):
        each.beat(4, f"place {moved}", moved)

    def wait(_seconds: float) -> None:
        for rank in alive:
            ranks[rank].beat(4, f"place {moves[rank]}", moves[rank])

    return ranks[0].blame(wait)


def test_a_rank_that_does_not_beat_stands_still(ranks: list[Heartbeats]) -> None:
    said = blame(ranks, alive=(0, 1), moves=(3, 2, 9))
    assert said.startswith(f"rank 2 (process {os.getpid()} on ")
    assert said.endswith("step 4, place 9: the process writes no heartbeats any more")


def test_the_rank_that_came_least_far_keeps_the_others(ranks: list[Heartbeats]) -> None:
    said = blame(ranks, alive=(0, 1, 2), moves=(5, 3, 4))
    assert said.startswith("rank 1 ")
    assert "place 3: the others wait for it" in said


def test_where_all_are_at_one_place_all_are_named(ranks: list[Heartbeats]) -> None:
    assert blame(ranks, alive=(0, 1, 2)).endswith("place 9: all 3 ranks are at this point")


def test_a_rank_that_never_spoke_is_named(ranks: list[Heartbeats]) -> None:
    ranks[0].beat(1, "loader", 1)
    assert ranks[0].blame(lambda _: None).startswith("rank 1 has written no heartbeat")


@pytest.fixture
def dead() -> Beat:
    """The beat of a process that has ended, though nobody has asked for its status yet."""
    process = subprocess.Popen([sys.executable, "-c", "pass"], stdin=subprocess.DEVNULL)
    process.wait()
    beats = Heartbeats(Path(), ALONE)
    return Beat(1, 4, "loader", 3, 2, process.pid, beats._host, beats._born)


def test_a_clock_that_is_set_kills_nobody(ranks: list[Heartbeats], monkeypatch: pytest.MonkeyPatch) -> None:
    ranks[0].beat(4, "loader", 3)
    moved = psutil.Process().create_time() + 3600
    monkeypatch.setattr(psutil.Process, "create_time", lambda _self: moved)
    assert ranks[1].lost() is None
    assert not ranks[1].is_gone(0)


def test_a_process_that_has_ended_is_known_by_its_number(ranks: list[Heartbeats], dead: Beat) -> None:
    assert dead.is_known_dead()
    assert not replace(dead, host="elsewhere").is_known_dead()
    assert replace(dead, pid=os.getpid(), born=f"{dead.born}1").is_known_dead()  # the number is another's now
    folder = ranks[0].folder
    assert folder is not None
    for rank in (0, 2):
        ranks[rank].beat(4, "loader", 3)
    (folder / "rank_1.json").write_text(json.dumps(dead.__dict__))

    def wait(_seconds: float) -> None:
        ranks[0].beat(4, "loader", 3)  # rank 2 stands still, but rank 1 is dead: that is worse

    assert "rank 1" in ranks[0].blame(wait)
    assert ranks[0].blame(wait).endswith("the process has ended")
    assert ranks[0].lost() == dead
    assert [ranks[0].is_gone(rank) for rank in range(4)] == [False, True, False, False]
