"""The cache of prepared tokens: shared by users, left by killed processes, filled by earlier releases."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from earlier_tokens import made_before
from scalegpt.config import DataConfig
from scalegpt.data import leftovers
from scalegpt.data.preparation.split import WHOLE_DOCUMENTS_FROM
from scalegpt.data.prepare import prepare, prepare_cached
from scalegpt.data.shards import TokenSet
from scalegpt.data.token_file import UnreadableTokensError
from scalegpt.errors import InputError, NoSpaceError
from scalegpt.storage import PlaceError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("SCALEGPT_CACHE", str(folder))
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("To be, or not to be: that is the question.\n" * 50)
    return path


def config(text: Path) -> DataConfig:
    return DataConfig(input_file=str(text), tokenizer="byte")


# --- two users -------------------------------------------------------------------------------------------------------

AS_ANOTHER = """
import os, sys
from scalegpt.config import DataConfig
from scalegpt.data.prepare import prepare, prepare_again, prepare_cached
from scalegpt.errors import InputError
# Imports what is imported late, from files that may be closed to that user.
prepare([sys.argv[2]], sys.argv[3], DataConfig(tokenizer="byte"))
os.setuid(int(sys.argv[1]))
os.umask(0o077)
try:
    config = DataConfig(input_file=sys.argv[2], tokenizer="byte")
    tokens, changed = prepare_again(config, sys.argv[4]) if sys.argv[4] else (prepare_cached(config), None)
    print(tokens.path, *([changed] if changed else []), sep="\\n")
except InputError as error:
    print("refused:", error)
"""


@pytest.fixture
def open_to_all(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that every user may enter: pytest closes its own. It holds a text and the cache."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "text.txt").write_text("To be, or not to be: that is the question.\n" * 50)
        (folder / "cache").mkdir()
        monkeypatch.setenv("SCALEGPT_CACHE", str(folder / "cache"))
        yield folder


def as_another(user: int, text: Path, begun_with: str = "", *, noted: str = "") -> str:
    warm = text.with_name(f"warm-{uuid.uuid4()}")
    done = subprocess.run(
        [sys.executable, "-c", AS_ANOTHER, str(user), str(text), str(warm), begun_with],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert noted in done.stderr if noted else not done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become other users")
def test_two_users_do_not_remove_each_others_tokens(open_to_all: Path) -> None:
    text, cache = open_to_all / "text.txt", open_to_all / "cache"
    cache.chmod(0o777)
    entry = Path(as_another(12345, text))
    assert entry.parent == cache
    assert entry.stat().st_mode & 0o777 == 0o700
    for _ in range(2):
        said = as_another(23456, text)
        assert said.startswith(
            f"refused: cache of prepared tokens: {entry} cannot be read: Permission denied (it belongs "
        )
        assert "user number 12345" in said
        assert "set SCALEGPT_CACHE" in said
    assert Path(as_another(12345, text)) == entry
    # A folder that shows its names and not its files, and a file that is closed.
    entry.chmod(0o744)
    assert "cannot be read: Permission denied (it belongs to user number 12345)" in as_another(23456, text)
    entry.chmod(0o755)
    (entry / "meta.json").chmod(0o644)
    (entry / "val.bin").chmod(0o644)
    assert "train.bin cannot be read: Permission denied (it belongs to user number 12345)" in as_another(23456, text)
    (entry / "train.bin").chmod(0o644)
    assert Path(as_another(23456, text)) == entry


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become other users")
def test_a_cache_that_another_user_keeps_for_himself(open_to_all: Path) -> None:
    text, cache = open_to_all / "text.txt", open_to_all / "cache"
    for mode, problem in (
        (0o700, "cannot be read: Permission denied"),
        (0o755, "cannot be written: Permission denied"),
    ):
        cache.chmod(mode)
        said = as_another(23456, text)
        assert said.startswith("refused: cache of prepared tokens: ")
        assert f"{problem} (it belongs to user root)" in said
        assert "set SCALEGPT_CACHE" in said


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become other users")
def test_tokens_that_a_run_began_with_and_another_user_closed(open_to_all: Path) -> None:
    folder, cache = open_to_all / "texts", open_to_all / "cache"
    folder.mkdir()
    (folder / "a.txt").write_text("the text of the user\n" * 50)
    cache.chmod(0o777)
    begun = prepare_cached(config(folder))
    (folder / "notes.txt").write_text("a line more\n")
    assert as_another(12345, folder, begun.digest).splitlines() == [
        str(begun.path), f"{folder} has changed since this run began",
    ]  # fmt: skip
    cannot_be_read = (
        r"cannot be read: Permission denied (it belongs to user root); get access to it, or set SCALEGPT_CACHE"
    )
    for name in ("train.bin", "val.bin"):
        (begun.path / name).chmod(0o600)
        assert f"{begun.path / name} {cannot_be_read}" in as_another(12345, folder, begun.digest)
        (begun.path / name).chmod(0o644)
    begun.path.chmod(0o711)  # its files can be opened and not listed
    assert f"refused: cache of prepared tokens: {begun.path} {cannot_be_read}" in as_another(
        12345, folder, begun.digest
    )
    begun.path.chmod(0o755)
    cache.chmod(0o733)
    assert f"refused: cache of prepared tokens: {cache} {cannot_be_read}" in as_another(12345, folder, begun.digest)
    # What the entry holds cannot be known: it is named, and the text is read as it is now.
    cache.chmod(0o777)
    begun.path.chmod(0o700)
    note = f"cached tokens {begun.path} cannot be read: Permission denied"
    assert Path(as_another(12345, folder, begun.digest, noted=note)) != begun.path


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become other users")
@pytest.mark.parametrize("mode", [0o700, 0o711])
def test_a_run_keeps_its_tokens_where_its_folder_of_text_is_closed(open_to_all: Path, mode: int) -> None:
    folder = open_to_all / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("the text of the user\n" * 50)
    begun = prepare_cached(config(folder))
    folder.chmod(mode)  # it cannot be read, or its files can be opened and not listed
    path, changed = as_another(12345, folder, begun.digest).splitlines()
    assert Path(path) == begun.path
    assert changed == (
        f"{folder} cannot be read as it was when this run began (input {folder} cannot be read: Permission denied; make it "
        "readable)"
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become other users")
def test_an_input_in_a_closed_folder(open_to_all: Path) -> None:
    closed = open_to_all / "closed"
    closed.mkdir(0o700)
    (closed / "a.txt").write_text("text " * 99)
    said = as_another(23456, closed / "a.txt")
    assert said == f"refused: input {closed}/a.txt cannot be read: Permission denied; name a text file"


def test_a_full_disk_of_the_cache(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    with pytest.raises(
        NoSpaceError, match=r"^cache of prepared tokens: not enough disk space .*SCALEGPT_CACHE names another"
    ):
        prepare_cached(config(text))


def test_a_passing_read_error_is_not_damage(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = prepare_cached(config(text))

    def fail(self: TokenSet) -> None:
        raise UnreadableTokensError(made.path, OSError(5, "Input/output error"))

    monkeypatch.setattr(TokenSet, "check_contents", fail)
    with pytest.raises(InputError, match=r"cannot be read: Input/output error; .*SCALEGPT_CACHE"):
        prepare_cached(config(text))
    assert made.path.is_dir()


def test_ranks_can_send_each_other_what_is_wrong() -> None:
    import pickle

    for kind in (UnreadableTokensError, PlaceError):
        error = pickle.loads(pickle.dumps(kind(Path("a"), OSError(13, "Permission denied"))))
        assert type(error) is kind
        assert "Permission denied" in str(error)


# --- killed preparations ---------------------------------------------------------------------------------------------

PREPARE_AND_WAIT = """
import sys, time
from scalegpt.config import DataConfig
from scalegpt.data.prepare import prepare_cached
def wait(done, total, tokens=0):
    print("writing", flush=True)
    time.sleep(600)
prepare_cached(DataConfig(input_file=sys.argv[1], tokenizer="byte"), progress=wait)
"""


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_what_a_killed_preparation_left_is_removed_by_the_next_of_any_text(
    text: Path, tmp_path: Path, cache: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("another text\n" * 50)
    with subprocess.Popen([sys.executable, "-c", PREPARE_AND_WAIT, str(text)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        (unfinished,) = hidden(cache)
        prepare_cached(config(other))
        assert hidden(cache) == [unfinished]  # its maker lives
        process.send_signal(signal.SIGKILL)
        process.wait()
    third = tmp_path / "third.txt"
    third.write_text("a third text\n" * 50)
    prepare_cached(config(third))
    assert hidden(cache) == []


def test_nothing_else_is_removed(text: Path, cache: Path, tmp_path: Path) -> None:
    cache.mkdir()
    (cache / ".mine.tmp-of-something").mkdir()
    (cache / f".{'a' * 64}.tmp-file").write_text("x")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("x")
    (cache / f".{'b' * 64}.tmp-link").symlink_to(elsewhere)
    prepare_cached(config(text))
    assert len(hidden(cache)) == 3
    assert (elsewhere / "kept").exists()


@pytest.mark.parametrize(("age", "is_removed"), [(60, False), (2 * 3600, True)])
def test_another_machine_s_folder_is_left_alone_for_an_hour(
    text: Path, cache: Path, age: float, is_removed: bool
) -> None:
    folder = cache / f".{'a' * 64}.tmp-00000000-123456789abc"
    aged(folder, age)
    prepare_cached(config(text))
    assert folder.exists() != is_removed


@pytest.mark.parametrize(("age", "is_removed"), [(2 * 3600, False), (25 * 3600, True)])
def test_without_locks_age_decides(
    text: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, age: float, is_removed: bool
) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    folder = cache / leftovers.unfinished_name("a" * 64)
    aged(folder, age)
    monkeypatch.setattr(fcntl, "flock", no_locks)
    prepare_cached(config(text))
    assert folder.exists() != is_removed


def aged(folder: Path, age: float) -> None:
    folder.mkdir(parents=True)
    (folder / "train.bin").write_bytes(b"x")
    past = time.time() - age
    os.utime(folder / "train.bin", (past, past))
    os.utime(folder, (past, past))


# --- tokens of earlier releases --------------------------------------------------------------------------------------


def test_earlier_tokens_serve_the_runs_that_began_with_them_alone(text: Path, cache: Path) -> None:
    digest = made_before(text, cache)
    new = prepare_cached(config(text))
    assert new.digest != digest
    assert new.train[-1] == 256
    assert prepare_cached(config(text), begun_with=digest).digest == digest
    assert prepare_cached(config(text), begun_with=new.digest).digest == new.digest
    assert prepare_cached(config(text), begun_with="0" * 64).digest == new.digest


def test_a_folder_of_earlier_tokens_is_read_and_not_written_over(text: Path, cache: Path, tmp_path: Path) -> None:
    digest = made_before(text, cache)
    (folder,) = cache.iterdir()
    folder.rename(tmp_path / "prepared")
    assert prepare_cached(DataConfig(input_file=str(tmp_path / "prepared"))).digest == digest
    with pytest.raises(InputError, match="tokens of the same text from an older version of ScaleGPT"):
        prepare([text], tmp_path / "prepared", DataConfig(tokenizer="byte"))


# --- ends of texts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 5, 19, 20, 40])
@pytest.mark.parametrize("kind", ["byte", "gpt2"])
def test_every_document_of_either_part_ends_with_end_of_text(tmp_path: Path, number: int, kind: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for each in range(number):
        (folder / f"{each}.txt").write_text(f"document {each}\n" * 20)
    tokens = prepare([folder], tmp_path / "out", DataConfig(tokenizer=kind))
    end = tokens.tokenizer.end_of_text
    ends = {name: part.tolist().count(end) for name, part in (("train", tokens.train), ("val", tokens.val))}
    assert tokens.train[-1] == tokens.val[-1] == end
    if number < WHOLE_DOCUMENTS_FROM:
        assert ends == {"train": number, "val": number}  # each is divided
    else:
        assert sum(ends.values()) == number
        assert ends["val"] == tokens.meta["split"]["held_out_documents"]
    decoded = tokens.tokenizer.decode(tokens.train).split("<|endoftext|>")[:-1]
    assert all(len(set(part.splitlines()[:-1])) <= 1 for part in decoded)  # no two run together


def test_a_document_too_short_to_divide_is_trained_on(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.txt").write_text("y" * 100)
    tokens = prepare([tmp_path / "a.txt", tmp_path / "b.txt"], tmp_path / "out", DataConfig(tokenizer="byte"))
    assert tokens.tokenizer.decode(tokens.train) == "x<|endoftext|>" + "y" * 90 + "<|endoftext|>"
    assert tokens.tokenizer.decode(tokens.val) == "y" * 10 + "<|endoftext|>"


@pytest.mark.parametrize("removed", ["the folder", "its parent too"])
def test_a_folder_that_another_process_takes_for_abandoned_at_once_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removed: str
) -> None:
    """Between making a folder and locking it, another process can find its lock free."""
    parent, opened = tmp_path / "cache", os.open
    parent.mkdir()

    def open_late(path: Path, flags: int) -> int:
        monkeypatch.setattr(os, "open", opened)
        shutil.rmtree(parent if removed == "its parent too" else path)
        return opened(path, flags)

    monkeypatch.setattr(os, "open", open_late)
    folder, descriptor = leftovers.make_unfinished(parent / "tokens")
    os.close(descriptor)
    assert list(parent.iterdir()) == [folder]
