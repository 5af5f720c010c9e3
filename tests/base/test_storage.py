"""Small files are read whole or refused; errors that may pass are retried."""

import errno
import fcntl
import os
import shutil
import socket
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scalegpt import storage
from scalegpt.errors import InputError
from scalegpt.text import brief, visible


def test_a_file_is_read_without_its_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf{}\r\n")
    assert storage.read_text(path) == "{}\n"


def test_a_file_of_the_limit_is_read_and_a_larger_one_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert storage.read_bytes(path, 5) == b"12345"
    with pytest.raises(InputError, match="more than 4 bytes"):
        storage.read_bytes(path, 4)


def test_a_pipe_is_refused_at_once_and_a_folder_is_an_ordinary_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
    for special in ("pipe", "socket"):
        with pytest.raises(storage.NotPlainError, match="not a plain file"):
            storage.read_bytes(tmp_path / special)
    with pytest.raises(IsADirectoryError):
        storage.read_bytes(tmp_path)


def test_a_link_is_followed_only_where_it_may_be(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "link").symlink_to("a")
    with storage.open_plain(tmp_path / "link") as file:
        assert file.read() == b"1"
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        storage.open_plain(tmp_path / "link", follow_link=False)


@pytest.mark.parametrize(("code", "attempts"), [(errno.EIO, 3), (errno.ESTALE, 3), (errno.ENOENT, 1)])
def test_only_errors_that_may_pass_are_retried(code: int, attempts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "RETRY_SECONDS", (0.0, 0.0))
    tried = []

    def fail() -> None:
        tried.append(1)
        raise OSError(code, os.strerror(code))

    with pytest.raises(OSError, match=os.strerror(code)):
        storage.retried(fail)
    assert len(tried) == attempts


def test_control_characters_are_written_out() -> None:
    assert visible("a\x1b[2Jb\x9b\u202ec\r\u2028\n\té\ud800") == "a\\x1b[2Jb\\x9b\\u202ec\\r\\u2028\n\té\\ud800"


def test_home_is_meant_by_a_tilde_at_the_beginning_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert storage.user_path("~") == "/home/me"
    assert storage.user_path("~/a") == "/home/me/a"
    assert storage.user_path("~root/a").endswith("/a")
    assert not storage.user_path("~root/a").startswith("~")
    for plain in ("a", "./~", "./~/a", "a/~", "/x/~root", "a~"):
        assert storage.user_path(plain) == plain


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("~nobody_here/x", "there is no user 'nobody_here'; for a file of that name give ./~nobody_here"),
        ("", "'' is not a valid path"),
        ("a\0b", "is not a valid path"),
        ("a" * 256, "too long"),
        ("é" * 128, "too long"),
        ("a/" * 3000, "too long"),
    ],
)
def test_what_can_be_no_path_is_refused(path: str, message: str) -> None:
    with pytest.raises(InputError) as refused:
        storage.user_path(path)
    assert message in str(refused.value)
    assert len(str(refused.value)) < 200


# --- file systems that lack something --------------------------------------------------------------------------------


def failing(code: int, *, only_folders: bool = False) -> Callable[..., None]:
    """A call of the system that answers with an error; of ``fsync``, for folders alone where that is wanted."""
    real = os.fsync

    def fail(*arguments: Any, **_: Any) -> None:
        if only_folders and not stat.S_ISDIR(os.fstat(arguments[0]).st_mode):
            real(arguments[0])
            return
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF])
def test_a_folder_that_cannot_be_synced_is_told_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    assert storage.sync_folder(tmp_path) is None
    monkeypatch.setattr(os, "fsync", failing(code, only_folders=True))
    assert storage.sync_folder(tmp_path) == os.strerror(code)
    storage.write_atomic(tmp_path / "a", "new", durable=True)
    assert (tmp_path / "a").read_text() == "new"


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EISDIR])
def test_a_folder_that_cannot_be_opened_to_be_synced_is_not_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(os, "open", failing(code))
    assert storage.sync_folder(tmp_path) == os.strerror(code)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fails_to_sync_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(os, "fsync", failing(code))
    with pytest.raises(OSError, match=os.strerror(code)):
        storage.sync_folder(tmp_path)
    with pytest.raises(OSError, match=os.strerror(code)):
        storage.write_atomic(tmp_path / "a", "new", durable=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK])
def test_a_name_is_given_once_without_hard_links_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(os, "link", failing(code))
    for content in ("first", "second"):
        (tmp_path / content).write_text(content)
    storage.give_name(tmp_path / "first", tmp_path / "name")
    with pytest.raises(FileExistsError):
        storage.give_name(tmp_path / "second", tmp_path / "name")
    assert (tmp_path / "name").read_text() == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["name", "second"]


def test_a_name_is_given_once(tmp_path: Path) -> None:
    for content in ("first", "second"):
        (tmp_path / content).write_text(content)
    storage.give_name(tmp_path / "first", tmp_path / "name")
    with pytest.raises(FileExistsError):
        storage.give_name(tmp_path / "second", tmp_path / "name")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["name", "second"]


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_lock_that_the_file_system_lacks_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    with (tmp_path / "lock").open("a") as file, (tmp_path / "lock").open("a") as other:
        assert storage.lock_file(file) is None
        with pytest.raises(BlockingIOError):
            storage.lock_file(other)
        monkeypatch.setattr(fcntl, "flock", failing(code))
        assert storage.lock_file(other) == os.strerror(code)


def test_free_space_of_a_place_that_does_not_exist_yet(tmp_path: Path) -> None:
    assert storage.free_bytes(tmp_path / "deep" / "er") is not None
    with pytest.raises(InputError, match=r"not enough disk space for .*deep: about 1,000,000,000,000,000,000 bytes"):
        storage.check_space(tmp_path / "deep", 10**18)


@pytest.mark.parametrize("answer", [OSError(errno.ENOSYS, "Function not implemented"), (0, 0, 0)])
def test_free_space_that_is_not_reported_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Any
) -> None:
    assert (storage.free_bytes(tmp_path) or 0) > 0

    def usage(_: Path) -> Any:
        if isinstance(answer, OSError):
            raise answer
        return shutil._ntuple_diskusage(*answer)  # type: ignore[attr-defined]

    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert storage.free_bytes(tmp_path) is None
    storage.check_space(tmp_path / "out", 10**18)


# --- what is left of files that were not finished --------------------------------------------------------------------


def test_only_what_no_living_process_may_be_writing_is_removed(tmp_path: Path) -> None:
    parent = os.getppid()
    made = {
        ".status.json.999999999.tmp": True,  # of no process
        f".status.json.{os.getpid()}.tmp": True,  # of an earlier process of our number
        f".status.json.{os.getpid()}-77.tmp": True,
        f".status.json.{parent}.tmp": False,  # of a process that lives
        f".old.json.{parent}.tmp": True,  # of one that had its number before it
        ".status.json.tmp": False, "status.json.5.tmp": False, ".status.json.5": False, ".x.tmp-5": False,
    }  # fmt: skip
    for name in made:
        (tmp_path / name).touch()
    os.utime(tmp_path / f".old.json.{parent}.tmp", (1, 1))
    (tmp_path / ".folder.999999999.tmp").mkdir()
    storage.remove_temporaries(tmp_path)
    kept = {name for name, goes in made.items() if not goes} | {".folder.999999999.tmp"}
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_threads_do_not_share_an_unfinished_file(tmp_path: Path) -> None:
    names: list[Path] = [storage.temporary_name(tmp_path / "a")]
    thread = threading.Thread(target=lambda: names.append(storage.temporary_name(tmp_path / "a")))
    thread.start()
    thread.join()
    assert names[0].name == f".a.{os.getpid()}.tmp"
    assert names[1] != names[0]
    for each in names:
        each.touch()
    storage.remove_temporaries(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_quoted_is_one_short_line() -> None:
    assert brief("a\n b\x1b") == "a b\\x1b"
    assert len(brief("x" * 10**6)) == 301
    assert len(brief("\x1b" * 300)) == 301
