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

from scalegpt.backends import extension_locks
from scalegpt.backends.extension_locks import build_root, clear_stale_locks

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


def test_the_lock_of_a_killed_process_is_removed_and_a_living_ones_is_not(tmp_path: Path, lock: Path) -> None:
    with holder(lock) as process:
        assert clear_stale_locks(tmp_path) == []
        assert lock.exists()
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert lock.exists()
        with pytest.warns(UserWarning, match="left by a process that was killed"):
            assert clear_stale_locks(tmp_path) == [lock]
    assert not lock.exists()


def test_a_compiler_that_is_still_at_work_is_waited_for(tmp_path: Path, lock: Path) -> None:
    lock.touch()
    compiler = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1.5)"], cwd=lock.parent)
    with pytest.warns(UserWarning, match="it is removed"):
        assert clear_stale_locks(tmp_path) == [lock]
    assert compiler.poll() == 0 or compiler.wait(5) == 0


def test_where_other_machines_may_write_the_folder_must_have_been_quiet(
    tmp_path: Path, lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extension_locks, "OF_THIS_MACHINE", frozenset())
    lock.touch()
    part = lock.parent / "shm.o"
    part.touch()
    os.utime(lock, (1.0, 1.0))
    os.utime(part, (time.time() - 2, time.time() - 2))
    begin = time.monotonic()
    with pytest.warns(UserWarning, match="it is removed"):
        assert clear_stale_locks(tmp_path, quiet=3.0) == [lock]
    assert time.monotonic() - begin > 0.5


def test_it_looks_where_torch_builds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpp_extension = pytest.importorskip("torch.utils.cpp_extension")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert Path(cpp_extension._get_build_directory("name", verbose=False)).is_relative_to(build_root())
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = Path(cpp_extension._get_build_directory("name", verbose=False))
    assert folder.parent.parent == build_root()
