"""Which files a folder gives: links, pipes, what cannot be read, and what holds no text."""

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from scalegpt.data.text.corpus import survey
from scalegpt.data.text.documents import FoundDocuments, find_documents
from scalegpt.data.text.ignoring import Selection
from scalegpt.errors import InputError

IS_ROOT = os.geteuid() == 0


def write(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name}\n")
    return folder


def names(found: FoundDocuments) -> list[str]:
    return [document.name for document in found.documents]


def test_links_that_leave_the_folder_are_counted_and_followed_only_on_request(tmp_path: Path) -> None:
    write(tmp_path, "in/a.txt", "secret/b.txt", "secret/c.txt")
    (tmp_path / "in" / "one.txt").symlink_to(tmp_path / "secret" / "b.txt")
    (tmp_path / "in" / "all").symlink_to(tmp_path / "secret")
    found = find_documents([tmp_path / "in"])
    assert names(found) == ["a.txt"]
    assert str(found.skipped) == "2 link out of the folder (such as all)"
    # The folder comes first, so the link to one of its files adds nothing.
    assert names(find_documents([tmp_path / "in"], Selection(follow_links=True))) == ["a.txt", "all/b.txt", "all/c.txt"]


def test_a_link_to_what_another_input_names_needs_no_word(tmp_path: Path) -> None:
    write(tmp_path, "one/a.txt", "two/b.txt")
    (tmp_path / "one" / "there").symlink_to(tmp_path / "two")
    found = find_documents([tmp_path / "one", tmp_path / "two"])
    assert names(found) == ["a.txt", "b.txt"]
    assert not found.skipped.counts


def test_links_inside_the_folder_add_nothing_by_any_name(tmp_path: Path) -> None:
    write(tmp_path, "m.txt", "sub/n.txt", ".hidden/h.txt")
    (tmp_path / "a_link.txt").symlink_to("m.txt")
    (tmp_path / "z_link.txt").symlink_to(tmp_path / "m.txt")
    (tmp_path / "a_folder").symlink_to("sub")
    (tmp_path / "sub" / "up").symlink_to("..")
    (tmp_path / "sub" / "self").symlink_to(".")
    (tmp_path / "shown.txt").symlink_to(".hidden/h.txt")
    found = find_documents([tmp_path])
    assert names(found) == ["m.txt", "shown.txt", "sub/n.txt"]
    assert not found.skipped.counts


def test_a_folder_that_is_a_link_is_searched(tmp_path: Path) -> None:
    write(tmp_path, "real/a.txt")
    (tmp_path / "link").symlink_to("real")
    assert names(find_documents([tmp_path / "link"])) == ["a.txt"]
    assert names(find_documents([tmp_path / "link", tmp_path / "real"])) == ["a.txt"]


def test_pipes_sockets_and_broken_links_are_named_and_never_waited_for(tmp_path: Path) -> None:
    write(tmp_path, "a.txt")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to_pipe").symlink_to("pipe")
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to("circle")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(tmp_path / "socket"))
        found = survey([tmp_path], "utf-8")
    assert [source.name for source in found.sources] == ["a.txt"]
    assert found.skipped.counts == {"pipe": 2, "socket": 1, "broken link": 2}
    with pytest.raises(InputError, match="pipe is not a regular file"):
        survey([tmp_path / "pipe"], "utf-8")


def test_a_deep_tree_is_searched(tmp_path: Path) -> None:
    deep, here = tmp_path, Path.cwd()
    try:
        for _ in range(700):  # more than Python's own stack allows, and a path longer than the system's limit
            os.chdir(deep)
            Path("folder").mkdir()
            deep = Path("folder")
    finally:
        os.chdir(here)
    write(tmp_path, "a.txt")
    found = find_documents([tmp_path])
    assert names(found) == ["a.txt"]
    assert found.skipped.counts == {"unreadable": 1}
    subprocess.run(["rm", "-rf", str(tmp_path / "folder")], check=True)


READ = """
import os, sys
from scalegpt.data.text.corpus import survey
from scalegpt.errors import InputError
os.setuid(65534)  # the interpreter's own files may be closed to that user: all is imported before
for path in sys.argv[1:]:
    try:
        found = survey([path], "utf-8")
        print([source.name for source in found.sources], found.skipped)
    except InputError as error:
        print(error)
"""


@pytest.mark.skipif(not IS_ROOT, reason="only root can become another user")
def test_what_the_user_may_not_read_is_named() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest closes its own folders to other users
        Path(name).chmod(0o755)
        check_what_another_user_reads(Path(name))


def check_what_another_user_reads(tmp_path: Path) -> None:
    write(tmp_path, "in/a.txt", "in/locked.txt", "in/closed/b.txt", "in/listed/c.txt", "shut/d.txt")
    (tmp_path / "in" / "locked.txt").chmod(0)
    (tmp_path / "in" / "closed").chmod(0)
    (tmp_path / "in" / "listed").chmod(0o744)  # its names can be read, its files not
    (tmp_path / "shut").chmod(0)
    paths = [str(tmp_path / name) for name in ("in", "shut", "in/locked.txt")]
    done = subprocess.run([sys.executable, "-c", READ, *paths], capture_output=True, text=True, timeout=120)
    assert not done.stderr
    inside, shut, locked = done.stdout.splitlines()
    assert inside == "['a.txt'] 3 unreadable (such as closed)"
    assert shut == f"input {tmp_path}/shut cannot be read: Permission denied; make it readable"
    assert locked == f"input {tmp_path}/in/locked.txt cannot be read: Permission denied; make it readable"


def test_folders_of_tokens_are_counted(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "tokens/train.bin", "tokens/meta.json")
    assert find_documents([tmp_path]).skipped.counts == {"folder of prepared tokens": 1}


def test_names_cannot_command_a_terminal_or_break_a_line(tmp_path: Path) -> None:
    bad = "a\x1b[2J\n\u202eb"
    (tmp_path / f"{bad}.bin").write_bytes(b"\0")
    (tmp_path / "t.txt").write_text("text")
    assert str(survey([tmp_path], "utf-8").skipped) == r"1 binary (a\x1b[2J\n\u202eb.bin)"
    with pytest.raises(InputError) as caught:
        survey([tmp_path / f"{bad}.bin"], "utf-8")
    assert r"a\x1b[2J\n\u202eb.bin is binary" in str(caught.value)
