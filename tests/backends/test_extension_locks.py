"""Locks in torch's build folders: only those that nobody holds are taken away."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from scalegpt.backends import extension_locks
from scalegpt.backends.extension_locks import build_folders, clear_stale_locks

HOLD = """
import sys, time
from torch.utils.file_baton import FileBaton
baton = FileBaton(sys.argv[1])
assert baton.try_acquire()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    """Where a lock would be, of torch's own kind of path: versions, extension."""
    folder = tmp_path / "py311_cpu" / "deepspeed_shm_comm"
    folder.mkdir(parents=True)
    return folder / "lock"


@contextmanager
def holder(lock: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has torch's lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_the_lock_of_a_killed_process_is_removed_and_a_living_ones_is_not(lock: Path) -> None:
    with holder(lock) as process:
        assert clear_stale_locks([lock.parent.parent]) == []
        assert lock.exists()
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert lock.exists()
        assert clear_stale_locks([lock.parent.parent]) == [lock]
    assert not lock.exists()


def test_a_compiler_that_is_still_at_work_is_waited_for(lock: Path) -> None:
    lock.touch()
    compiler = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1.5)"], cwd=lock.parent)
    assert clear_stale_locks([lock.parent.parent]) == [lock]
    assert compiler.poll() == 0 or compiler.wait(5) == 0


def test_where_other_machines_may_write_the_folder_must_have_been_quiet(
    lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extension_locks, "OF_THIS_MACHINE", frozenset())
    lock.touch()
    part = lock.parent / "shm.o"
    part.touch()
    (lock.parent / "build.ninja").touch()
    os.utime(lock.parent / "build.ninja", (1.0, 1.0))
    os.utime(lock, (1.0, 1.0))
    os.utime(part, (time.time() - 2, time.time() - 2))
    begin = time.monotonic()
    assert clear_stale_locks([lock.parent.parent], quiet=3.0) == [lock]
    assert time.monotonic() - begin > 0.5


@pytest.mark.parametrize("content", ["", "mine"])
def test_a_file_of_that_name_that_is_not_torchs_is_left(lock: Path, content: str) -> None:
    lock.write_text(content)
    (lock.parent / "letters").touch()
    if content:
        (lock.parent / "build.ninja").touch()
    assert clear_stale_locks([lock.parent.parent]) == []
    assert lock.exists()


def test_it_looks_where_torch_builds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert Path(cpp_extension._get_build_directory("name", verbose=False)).parent in build_folders()
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Path(cpp_extension._get_build_directory("name", verbose=False)).parent in build_folders()
