"""One run, one owner: with locks, and on a file system that has none."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from scalegpt.errors import InputError, RunError
from scalegpt.system.processes import birth_of
from scalegpt.training.runs.directory import RunDirectory
from scalegpt.training.runs.lock import LOCK, RunLock

HOLD = """
import sys
from pathlib import Path
from scalegpt.training.runs.directory import RunDirectory
if sys.argv[2] == "no locks":
    import errno, fcntl
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")
    fcntl.flock = flock
directory = RunDirectory(Path(sys.argv[1]))
directory.lock()
print("locked", flush=True)
sys.stdin.read()
"""


@contextmanager
def held(folder: Path, how: str = "locks") -> Iterator[subprocess.Popen[str]]:
    """Another process that trains the run."""
    command = [sys.executable, "-c", HOLD, str(folder), how]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "locked\n"
            yield process
        finally:
            process.kill()


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    told = pytest.raises(InputError, match=r"is being trained by process [0-9]+; wait for it")
    with held(tmp_path) as other, told as caught:
        RunDirectory(tmp_path).lock()
    assert f"process {other.pid};" in str(caught.value)
    assert RunDirectory(tmp_path).lock() == []
    assert (tmp_path / LOCK).read_text() == str(os.getpid())


def test_without_locks_a_run_is_possible_and_what_is_lost_is_told(tmp_path: Path, no_locks: None) -> None:
    directory = RunDirectory(tmp_path / "run")
    (line,) = directory.lock()
    assert "the file system has no locks (flock: Function not implemented)" in line
    directory.unlock()
    assert (tmp_path / "run" / LOCK).read_text() == ""
    assert len(directory.lock()) == 1


def test_without_locks_a_second_process_of_this_machine_is_refused(tmp_path: Path, no_locks: None) -> None:
    told = pytest.raises(InputError, match=r"is being trained by process [0-9]+; wait for it")
    with held(tmp_path, "no locks") as other, told as caught:
        RunDirectory(tmp_path).lock()
    assert f"process {other.pid};" in str(caught.value)
    assert len(RunDirectory(tmp_path).lock()) == 1, "a process that was killed holds nothing"


def test_without_locks_an_owner_on_another_machine_is_named(tmp_path: Path, no_locks: None) -> None:
    (tmp_path / LOCK).write_text("17\nelse\x1bwhere\n5.00\n")
    weakness = RunLock(tmp_path).take()
    assert weakness is not None
    assert "process 17 on else\\x1bwhere was the last to start or resume this run" in weakness


@pytest.mark.parametrize("content", ["", "x", "1\n2", f"x\n{os.uname().nodename}\ny\n", "\xff\n" * 3])
def test_what_the_lock_file_says_may_be_anything(tmp_path: Path, no_locks: None, content: str) -> None:
    (tmp_path / LOCK).write_text(content, encoding="latin-1")
    assert RunLock(tmp_path).take() is not None


def test_a_number_that_was_given_to_another_process_holds_nothing(tmp_path: Path, no_locks: None) -> None:
    parent = psutil.Process(os.getppid())
    (tmp_path / LOCK).write_text(f"{parent.pid}\n{os.uname().nodename}\n{birth_of(os.getpid())}\n")
    assert RunLock(tmp_path).take() is not None
    (tmp_path / LOCK).write_text(f"{parent.pid}\n{os.uname().nodename}\n{birth_of(parent.pid)}\n")
    with pytest.raises(InputError, match=f"process {parent.pid}"):
        RunLock(tmp_path).take()


def test_a_disk_that_fails_to_lock_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(RunError, match="cannot be locked: Input/output error"):
        RunLock(tmp_path).take()


def test_a_folder_that_is_a_link_to_nothing_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to("nowhere")
    with pytest.raises(RunError, match="cannot be written: it is a broken link; choose another"):
        RunLock(tmp_path / "run").take()


def test_a_folder_that_cannot_be_synced_is_told_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(_: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", fsync)
    (line,) = RunDirectory(tmp_path).lock()
    assert line.startswith(f"{tmp_path}: the file system cannot sync folders (fsync: Invalid argument)")


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.parametrize("error", ["ENOSYS", "ENOLCK", "EOPNOTSUPP", "EINVAL"])
@pytest.mark.slow
def test_the_systems_own_answers(tmp_path: Path, error: str) -> None:
    """A real call that the kernel refuses, as Lustre without ``-o flock`` does."""
    imports = "from pathlib import Path; from scalegpt.training.runs.directory import RunDirectory"
    program = f"{imports}; print(RunDirectory(Path({str(tmp_path)!r})).lock())"
    trace = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=flock,fsync"]
    inject = ["-e", f"inject=flock:error={error}", "-e", "inject=fsync:error=EINVAL"]
    done = subprocess.run([*trace, *inject, sys.executable, "-c", program], capture_output=True, text=True, check=False)
    if "ptrace" in done.stderr:
        pytest.skip("strace may not trace here")
    assert done.returncode == 0, done.stderr
    assert "has no locks" in done.stdout
    assert "cannot sync folders" in done.stdout
