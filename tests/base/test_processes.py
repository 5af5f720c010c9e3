"""Processes are distinguished by facts that the wall clock does not change."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from scalegpt.system.processes import birth_of, has_ended, own_birth

needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only Linux counts from the boot")


def test_a_process_is_itself_and_lives() -> None:
    assert birth_of(os.getpid()) == own_birth()
    assert not has_ended(os.getpid(), own_birth())


def test_one_that_ended_has_ended_before_and_after_its_status_is_taken() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    birth = birth_of(process.pid)
    assert birth is not None
    assert not has_ended(process.pid, birth)
    assert process.stdin is not None
    process.stdin.close()
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:  # nobody has taken its status yet
        time.sleep(0.01)
    assert has_ended(process.pid, birth)
    process.wait()
    assert has_ended(process.pid, birth)
    assert birth_of(process.pid) is None


@needs_proc
def test_another_process_of_the_same_number_is_another() -> None:
    boot, _, ticks = own_birth().partition(":")
    assert has_ended(os.getpid(), f"{boot}:{int(ticks) - 1}")


@needs_proc
def test_nothing_is_known_of_another_boot() -> None:
    assert not has_ended(2**22, f"other:{own_birth().partition(':')[2]}")
    assert not has_ended(os.getpid(), "other:1")


@needs_proc
def test_the_wall_clock_moves_no_birth(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the clock is set, Linux moves the time of the boot, and with it all times since the epoch."""
    born = own_birth()
    moved = psutil.Process().create_time() + 100
    monkeypatch.setattr(psutil.Process, "create_time", lambda _self: moved)
    assert own_birth() == born
    assert not has_ended(os.getpid(), born)


def test_without_proc_the_time_since_the_epoch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scalegpt.system.processes._stat", lambda _pid: None)
    born = own_birth()
    assert born == f"{psutil.Process().create_time():.2f}"
    assert not has_ended(os.getpid(), born)
    assert has_ended(os.getpid(), "1.00")
    assert has_ended(2**22, "1.00")
