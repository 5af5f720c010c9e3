"""Which processes above us are launchers: real trees of processes, of which some are killed, before or after a look."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from scalegpt.system.launchers import is_orphan, launchers, starter

ROOT = Path(__file__).resolve().parents[2]
LEVEL = """
import json, os, subprocess, sys
here, *rest = json.loads(os.environ["CHAIN"])
if rest:
    os.environ["CHAIN"] = json.dumps(rest)
    for name in here.get("variables", {}):
        os.environ[name] = here["variables"][name]
    subprocess.run([*rest[0]["words"]], start_new_session=rest[0].get("session", False))
else:
    sys.path.insert(0, os.environ["ROOT"])
    from scalegpt.system.launchers import launchers
    print(os.getpid(), flush=True)
    found = None
    for line in sys.stdin:
        found = launchers() if found is None else found
        print(json.dumps([lives() for lives in found]), flush=True)
"""
PYTHON = [sys.executable, "-c", LEVEL]
RANK = {"words": PYTHON}
RUNNER = {"words": [*PYTHON, "deepspeed"]}
LAUNCH = {"words": [*PYTHON, "deepspeed.launcher.launch"], "variables": {"CROSS_SIZE": "1", "RANK": "0"}}
AGENT = {"words": [*PYTHON, "torchrun"], "variables": {"TORCHELASTIC_RUN_ID": "x", "RANK": "0"}}
PROGRAM = {"words": [*PYTHON, "my_launcher.py"], "variables": {"TORCHELASTIC_RUN_ID": "x"}}
WRAPPED = {"words": ["sh", "-c", '"$@"; exit 0', "train.sh", *PYTHON]}
"""A rank below a shell script."""


class Tree:
    """A chain of processes, the first a child of this one, in a session of its own."""

    def __init__(self, *levels: dict[str, Any], **variables: str) -> None:
        names = ("TORCHELASTIC_RUN_ID", "CROSS_SIZE", "RANK", "SLURM_TASK_PID")
        environment = {key: value for key, value in os.environ.items() if key not in names}
        environment |= {"CHAIN": json.dumps(levels), "ROOT": str(ROOT), **variables}
        self.process = subprocess.Popen(
            levels[0]["words"], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.rank = psutil.Process(int(self.process.stdout.readline()))
        above = self.rank.parents()
        self.above = above[: [each.pid for each in above].index(self.process.pid) + 1]

    def look(self) -> list[bool]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        found: list[bool] = json.loads(self.process.stdout.readline())
        return found

    def kill(self, level: int) -> None:
        """Kill a process above the rank; 0 is its parent."""
        below = self.above[level - 1] if level else self.rank
        self.above[level].send_signal(signal.SIGKILL)
        if self.above[level].pid == self.process.pid:
            self.process.wait()
        until = time.monotonic() + 20
        while below.ppid() == self.above[level].pid:
            assert time.monotonic() < until
            time.sleep(0.01)

    def end(self) -> None:
        for process in (*self.above, self.rank):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


@pytest.fixture
def grow() -> Iterator[Callable[..., Tree]]:
    grown: list[Tree] = []

    def make(*levels: dict[str, Any], **variables: str) -> Tree:
        grown.append(Tree(*levels, **variables))
        return grown[-1]

    yield make
    for tree in grown:
        tree.end()


Grow = Callable[..., Tree]


# --- launchers that live when we look ----------------------------------------------------------------------------------


def test_deepspeeds_rank_watches_both_launchers(grow: Grow) -> None:
    tree = grow(RUNNER, LAUNCH, RANK)
    assert tree.look() == [True, True]
    tree.kill(1)
    assert tree.look() == [True, False]
    tree.kill(0)
    assert tree.look() == [False, False]


def test_torchruns_rank_watches_the_agent_and_what_is_between(grow: Grow) -> None:
    tree = grow(AGENT, {**WRAPPED, "session": True})
    assert tree.look() == [True, True]
    tree.kill(1)
    assert tree.look() == [True, False]


def test_on_several_machines_the_runner_is_elsewhere(grow: Grow) -> None:
    launch = {**LAUNCH, "variables": {"CROSS_SIZE": "2"}}
    assert grow({"words": [*PYTHON, "sshd"]}, launch, RANK).look() == [True]


def test_a_program_of_the_users_is_watched_as_the_launcher_that_it_is(grow: Grow) -> None:
    tree = grow(PROGRAM, {**RANK, "session": True})
    assert tree.look() == [True]
    tree.kill(0)
    assert tree.look() == [False]


# --- launchers that ended before we looked -----------------------------------------------------------------------------


def test_a_runner_that_ended_before_is_missed_on_one_machine(grow: Grow) -> None:
    tree = grow(RUNNER, LAUNCH, RANK)
    tree.kill(1)
    assert False in tree.look()


def test_a_launch_that_ended_before_is_missed(grow: Grow) -> None:
    tree = grow(RUNNER, LAUNCH, RANK)
    tree.kill(0)
    assert tree.look() == [False]


def test_an_agent_that_ended_before_is_missed(grow: Grow) -> None:
    tree = grow(AGENT, {**RANK, "session": True})
    tree.kill(0)
    assert tree.look() == [False]


# --- no launcher, and no false alarm -----------------------------------------------------------------------------------


@pytest.mark.parametrize("variables", [{}, {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}])
def test_an_orphan_without_a_launchers_variables_watches_nobody(grow: Grow, variables: dict[str, str]) -> None:
    """As under ``nohup … &`` once the shell has gone, ``setsid``, and ``srun``."""
    tree = grow({"words": PYTHON}, RANK, **variables)
    tree.kill(0)
    assert tree.look() == []


@pytest.mark.parametrize("variable", ["TORCHELASTIC_RUN_ID", "CROSS_SIZE"])
def test_a_shell_that_starts_a_rank_with_a_launchers_variables_is_not_a_launcher(grow: Grow, variable: str) -> None:
    assert grow(WRAPPED, **{variable: "1"}).look() == []


def test_deepspeeds_launch_may_be_started_by_hand(grow: Grow) -> None:
    by_hand = {"words": ["sh", "-c", '"$@"; exit 0', "sh", *LAUNCH["words"]], "variables": {"CROSS_SIZE": "1"}}
    assert grow(by_hand, RANK).look() == [True]


def process(number: int, name: str) -> Any:
    return SimpleNamespace(pid=number, name=lambda: name)


def test_who_takes_in_orphans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getsid", lambda number: {10: 5, 20: 5, 30: 7, 40: 40}[number])
    rank, session_leader = process(10, "python"), process(40, "python")
    assert is_orphan(rank, process(1, "sh"))
    assert is_orphan(rank, process(20, "systemd"))
    assert is_orphan(rank, process(30, "anything"))  # of another session
    assert not is_orphan(rank, process(20, "bash"))
    assert not is_orphan(session_leader, process(20, "bash"))
    assert is_orphan(session_leader, process(20, "slurmstepd"))
    monkeypatch.setenv("SLURM_TASK_PID", "40")
    assert not is_orphan(session_leader, process(20, "slurmstepd"))


def test_the_first_process_of_a_container_has_nobody_above(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getppid", lambda: 0)
    monkeypatch.setenv("CROSS_SIZE", "1")
    assert launchers() == []
    assert starter().pid == os.getpid()
