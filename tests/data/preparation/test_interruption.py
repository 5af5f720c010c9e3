"""A preparation that is killed, interrupted or short of disk space goes on where it was, and writes the same bytes."""

import errno
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scalegpt.config import DataConfig
from scalegpt.data import leftovers
from scalegpt.data.leftovers import HOLDER, claim_unfinished
from scalegpt.data.preparation import batches, shard_files, writer
from scalegpt.data.prepare import prepare
from scalegpt.data.text import packed, reading
from scalegpt.errors import InputError, NoSpaceError

KILLED_STATUS = 9
EVENTS = frozenset({"open", "os.mkdir", "os.rename", "os.remove", "os.truncate"})
GOES_ON = "going on with an interrupted preparation"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pieces and batches, a record after each, and two threads."""
    monkeypatch.setattr(reading, "PIECE_CHARACTERS", 150)
    monkeypatch.setattr(packed, "CHUNK_BYTES", 100)
    monkeypatch.setattr(batches, "BATCH_CHARACTERS", 1000)
    monkeypatch.setattr(writer, "RECORD_SECONDS", 0.0)


def words(count: int, seed: int) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(["to", "be", "or", "not", "question", "that", "is"]) for _ in range(count))


@pytest.fixture
def tails(tmp_path: Path) -> tuple[Path, DataConfig]:
    """Two files, of each of which the end is held out."""
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text(words(900, 1))
    (folder / "b.txt").write_text(words(300, 2))
    return folder, DataConfig(tokenizer="byte", shard_tokens=1000, workers=2)


@pytest.fixture
def documents(tmp_path: Path) -> tuple[Path, DataConfig]:
    """Records, some of them twice, and a file; whole documents are held out."""
    folder = tmp_path / "texts"
    folder.mkdir()
    texts = [words(10 + number, number % 50) for number in range(60)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "b.txt").write_text(words(400, 99))
    settings = {"tokenizer": "byte", "shard_tokens": 1000, "workers": 2, "deduplicate": True, "val_fraction": 0.2}
    return folder, DataConfig(**settings)


CORPORA = ["tails", "documents"]


@pytest.fixture
def corpus(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def everything(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def killed(work: Callable[[], object], arrange: Callable[[], None]) -> bool:
    """Run ``work`` in another process after ``arrange``; whether it was killed before it ended."""
    child = os.fork()
    if child == 0:
        arrange()
        work()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in {0, KILLED_STATUS, -signal.SIGKILL}
    return status != 0


def die_at(operation: int, root: Path) -> Callable[[], None]:
    """Let this process end at its file operation of that number inside a folder."""
    left = [operation]

    def die(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS and isinstance(arguments[0], str | os.PathLike) and str(root) in str(arguments[0]):
            left[0] -= 1
            if left[0] == 0:
                os._exit(KILLED_STATUS)

    return lambda: sys.addaudithook(die)


@pytest.mark.parametrize("corpus", CORPORA, indirect=True)
def test_killed_at_any_file_operation(
    corpus: tuple[Path, DataConfig], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts, settings = corpus
    expected = everything(prepare([texts], tmp_path / "whole", settings).path)
    assert len(expected) > 4, "there are several shards"
    caplog.set_level(logging.WARNING)
    for operation in range(1, 1000, 7):
        root = tmp_path / f"killed{operation}"
        out = root / "out"
        if not killed(lambda out=out: prepare([texts], out, settings), die_at(operation, root)):  # type: ignore[misc]
            break
        prepare([texts], out, settings)
        assert everything(out) == expected, operation
        assert [path.name for path in root.iterdir()] == ["out"], operation
    assert operation > 60
    assert caplog.text.count(GOES_ON) > operation / 7 / 2, "most began again"


@pytest.mark.parametrize("corpus", CORPORA, indirect=True)
def test_killed_again_and_again_at_random_moments(corpus: tuple[Path, DataConfig], tmp_path: Path) -> None:
    texts, settings = corpus
    expected = everything(prepare([texts], tmp_path / "whole", settings).path)
    draw, out, kills = random.Random(3), tmp_path / "root" / "out", 0
    for _ in range(20):
        seconds = draw.uniform(0.005, 0.06)
        if not killed(lambda: prepare([texts], out, settings), lambda s=seconds: signal_after(s)):  # type: ignore[misc]
            break
        kills += 1
    prepare([texts], out, settings)
    assert everything(out) == expected
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert kills > 1


def signal_after(seconds: float) -> None:
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, seconds)


@pytest.mark.parametrize("corpus", CORPORA, indirect=True)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk(
    corpus: tuple[Path, DataConfig],
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    texts, settings = corpus
    expected = everything(prepare([texts], tmp_path / "whole", settings).path)
    append, out = shard_files.ShardFiles.append, tmp_path / "root" / "out"
    for count in (1, 5, 9):
        left = [count]

        def full(self: shard_files.ShardFiles, ids: Any, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise OSError(code, "full")
            append(self, ids)

        with monkeypatch.context() as patch:
            patch.setattr(shard_files.ShardFiles, "append", full)
            with pytest.raises(NoSpaceError, match="no disk space is left") as raised:
                prepare([texts], out, settings)
        assert ("the same command then continues" in str(raised.value)) == out.parent.exists()
    with monkeypatch.context() as patch:  # the same command while the disk is still full
        patch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
        with pytest.raises(NoSpaceError, match=r"not enough disk space .*the same command then continues"):
            prepare([texts], out, settings)
    caplog.clear()
    prepare([texts], out, settings)
    assert GOES_ON in caplog.text, "what was done before is kept"
    assert everything(out) == expected


@pytest.mark.parametrize("is_begun", [False, True])
def test_a_disk_that_is_full_at_the_start(
    is_begun: bool, tails: tuple[Path, DataConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left of a new preparation, and all of one that was interrupted."""
    (texts, settings), out = tails, tmp_path / "out"
    if is_begun:
        interrupt(texts, out, settings)
    before = {path.name: everything(path) for path in tmp_path.iterdir()}

    def full(path: Path, content: str) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(leftovers, "write_atomic", full)
        with pytest.raises(NoSpaceError, match="no disk space is left"):
            prepare([texts], out, settings)
    assert {path.name: everything(path) for path in tmp_path.iterdir()} == before


def test_an_error_of_the_input_leaves_nothing(documents: tuple[Path, DataConfig], tmp_path: Path) -> None:
    texts, settings = documents

    def damage(done: int, total: int, tokens: int = 0) -> None:
        if tokens > 3000:
            (texts / "b.txt").write_text("another text")

    with pytest.raises(InputError, match=r"b\.txt changed while it was read"):
        prepare([texts], tmp_path / "root" / "out", settings, progress=damage)
    assert not (tmp_path / "root").exists()


def interrupt(texts: Path, out: Path, settings: DataConfig) -> str:
    """Begin a preparation and interrupt it as Ctrl-C does; return the message."""

    def stop(done: int, total: int, tokens: int = 0) -> None:
        if tokens > 2000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as raised:
        prepare([texts], out, settings, progress=stop)
    return str(raised.value)


def test_ctrl_c_says_that_the_same_command_goes_on(
    tails: tuple[Path, DataConfig], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts, settings = tails
    out, seen = tmp_path / "root" / "out", []
    said = interrupt(texts, out, settings)
    assert said.startswith("interrupted: the same command continues from its last record, ")
    assert said.endswith("%")
    caplog.set_level(logging.WARNING)
    prepare([texts], out, settings.changed(workers=1), progress=lambda *values: seen.append(values))
    assert GOES_ON in caplog.text
    assert 0 < seen[0][0] < seen[-1][0] == seen[-1][1]
    assert seen == sorted(seen)


COMMAND = """
import sys
from scalegpt.cli.main import main
from scalegpt.data.preparation import batches, writer
batches.BATCH_CHARACTERS, writer.RECORD_SECONDS = 1000, 0.0
import scalegpt.data.prepare as module
make = module._write_tokens
def slow(work, tokenizer, writer, progress):
    import time
    return make(work, tokenizer, writer, lambda *values: (print("written", flush=True), time.sleep(0.2)))
module._write_tokens = slow
sys.exit(main(["data", "prepare", *sys.argv[1:]]))
"""


def test_ctrl_c_of_the_command_is_one_line(documents: tuple[Path, DataConfig], tmp_path: Path) -> None:
    texts, _ = documents
    flags = [str(texts), "--out", str(tmp_path / "root" / "out"), "--tokenizer", "byte"]
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for _ in range(3):
            assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGINT)
        _, shown = process.communicate()
    assert process.returncode == 130
    assert shown.count("\n") == 1
    assert "interrupted: the same command continues from its last record" in shown


def test_what_another_preparation_left_is_removed(tails: tuple[Path, DataConfig], tmp_path: Path) -> None:
    texts, settings = tails
    out = tmp_path / "root" / "out"
    interrupt(texts, out, settings)
    (left,) = out.parent.iterdir()
    prepare([texts], out, settings.changed(val_fraction=0.3))
    assert not left.exists()
    assert out.is_dir()


@pytest.mark.parametrize("damage", ["record", "cut", "gone", "pieces"])
def test_a_damaged_unfinished_folder_is_begun_again(
    damage: str, tails: tuple[Path, DataConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, settings = tails
    expected = everything(prepare([texts], tmp_path / "whole", settings).path)
    out = tmp_path / "root" / "out"
    interrupt(texts, out, settings)
    (left,) = out.parent.iterdir()
    if damage == "record":
        (left / "record.json").write_text("{")
    elif damage == "cut":
        os.truncate(left / "train_00000.bin", 10)
    elif damage == "gone":
        (left / "train_00000.bin").unlink()
    else:
        record = json.loads((left / "record.json").read_text())
        (left / "record.json").write_text(json.dumps({**record, "pieces_of": 7}))
    prepare([texts], out, settings)
    assert everything(out) == expected
    assert [path.name for path in out.parent.iterdir()] == ["out"]


# --- whose unfinished folder it is -----------------------------------------------------------------------------------

KEY = "ab" * 32


def claimed(out: Path) -> bool:
    found = claim_unfinished(out, KEY)
    if found is not None:
        os.close(found[1])
    return found is not None


def test_a_folder_that_is_being_written_is_not_taken(tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = claim_unfinished(out, KEY)
    assert found is not None
    assert not claimed(out)
    os.close(found[1])
    assert claimed(out)


@pytest.mark.parametrize(
    ("holder", "age", "is_taken"),
    [
        ({"node": "another machine"}, 0, False),
        ({"node": "another machine"}, 4000, True),
        ({}, 0, True),  # this machine has been started again since
    ],
)
def test_a_folder_of_another_boot(holder: dict[str, str], age: float, is_taken: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert claimed(out)
    (folder,) = tmp_path.iterdir()
    values = json.loads((folder / HOLDER).read_text())
    (folder / HOLDER).write_text(json.dumps({**values, "birth": "another-boot:5", **holder}))
    past = time.time() - age
    os.utime(folder / HOLDER, (past, past))
    os.utime(folder, (past, past))
    assert claimed(out) == is_taken


def test_without_locks_a_living_process_keeps_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", no_locks)
    out = tmp_path / "out"
    assert claimed(out)
    assert not claimed(out), "this process lives"
    killed(lambda: claim_unfinished(tmp_path / "other", KEY), lambda: None)
    assert claimed(tmp_path / "other")


# --- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("corpus", CORPORA, indirect=True)
def test_the_same_bytes_for_any_number_of_workers(corpus: tuple[Path, DataConfig], tmp_path: Path) -> None:
    texts, settings = corpus
    found = [
        everything(prepare([texts], tmp_path / str(count), settings.changed(workers=count)).path) for count in (1, 3, 8)
    ]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("corpus", CORPORA, indirect=True)
def test_shards_hold_what_one_file_holds(corpus: tuple[Path, DataConfig], tmp_path: Path) -> None:
    texts, settings = corpus
    one = prepare([texts], tmp_path / "one", settings.changed(shard_tokens=10**6))
    many = prepare([texts], tmp_path / "many", settings)
    many.check_contents()
    for split in ("train", "val"):
        ours, theirs = many.files[split].tokens, one.files[split].tokens
        assert np.array_equal(ours[:], theirs[:])
        counts = [part.count for part in ours.parts]
        assert counts[:-1] == [1000] * (len(counts) - 1)
    assert sorted(everything(one.path)) == ["meta.json", "train.bin", "val.bin"]
    assert one.meta["version"] == 1, "every release reads it"
    assert many.meta["version"] == 2
