"""Small files are read whole or refused; errors that may pass are retried."""

import errno
import os
from pathlib import Path

import pytest

from scalegpt import storage
from scalegpt.errors import InputError
from scalegpt.text import visible


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
    with pytest.raises(InputError, match="not a plain file"):
        storage.read_bytes(tmp_path / "pipe")
    with pytest.raises(IsADirectoryError):
        storage.read_bytes(tmp_path)


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
        ("", "'' cannot be a path"),
        ("a\0b", "cannot be a path"),
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
