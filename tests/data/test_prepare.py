import errno
import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from scalegpt.config import DataConfig
from scalegpt.data import prepare as module
from scalegpt.data.preparation import shard_files, writer
from scalegpt.data.prepare import prepare, prepare_cached
from scalegpt.data.text import packed, reading
from scalegpt.data.tokenizers import make_tokenizer
from scalegpt.errors import InputError

SHAKESPEARE = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "tinyshakespeare.txt"
STDLIB_JSON = Path(json.__file__).parent


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("SCALEGPT_CACHE", str(folder))
    return folder


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("To be, or not to be: that is the question.\n" * 50)
    return path


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def everything(tokens):
    return [*tokens.train.tolist(), *tokens.val.tolist()]


@pytest.mark.parametrize("kind", ["gpt2", "byte", "char"])
def test_one_text_keeps_its_order(text, tmp_path, kind):
    tokens = prepare([text], tmp_path / "out", DataConfig(tokenizer=kind))
    tokenizer = tokens.tokenizer
    ending = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    ids = tokenizer.encode(text.read_text()).tolist()
    cut = int(len(ids) * 0.9)
    assert tokens.train.tolist() == [*ids[:cut], *ending]
    assert tokens.val.tolist() == [*ids[cut:], *ending]
    tokens.check_vocabulary(tokenizer.vocab_size)
    if kind == "char":
        assert tokenizer.characters == "".join(sorted(set(text.read_text())))


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason=f"{SHAKESPEARE} is not there")
def test_tinyshakespeare_splits_as_nanogpt_does(tmp_path):
    tokens = prepare([SHAKESPEARE], tmp_path / "out", DataConfig(tokenizer="char"))
    assert (len(tokens.train), len(tokens.val), tokens.tokenizer.vocab_size) == (1_003_854, 111_540, 65)
    text = SHAKESPEARE.read_text()
    assert tokens.tokenizer.decode(tokens.val[:200]) == text[1_003_854:][:200]


def test_few_documents_give_their_tails(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 99)
    tokens = prepare(
        [tmp_path / "b.txt", tmp_path / "a.txt"], tmp_path / "out", DataConfig(tokenizer="byte", val_fraction=0.25)
    )
    decode = tokens.tokenizer.decode
    assert decode(tokens.train) == "a" * 74 + "<|endoftext|>" + "b" * 74 + "<|endoftext|>"
    assert decode(tokens.val) == "a" * 25 + "<|endoftext|>" + "b" * 25 + "<|endoftext|>"
    assert tokens.meta["split"] == {"method": "tails", "val_fraction": 0.25}


def test_many_documents_are_held_out_whole(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02}.txt").write_text(f"document {number:02}\n" * 10)
    tokens = prepare([folder], tmp_path / "out", DataConfig(tokenizer="byte"))
    held = tokens.tokenizer.decode(tokens.val).split("<|endoftext|>")[:-1]
    kept = tokens.tokenizer.decode(tokens.train).split("<|endoftext|>")[:-1]
    assert (len(held), len(kept)) == (4, 36)
    assert sorted(held + kept) == [path.read_text() for path in sorted(folder.iterdir())]
    assert tokens.meta["split"]["held_out_documents"] == 4


def test_pieces_on_threads_equal_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PIECE_CHARACTERS", 1000)
    monkeypatch.setattr(packed, "CHUNK_BYTES", 500)
    seen = []
    tokens = prepare(
        [STDLIB_JSON], tmp_path / "out", DataConfig(), progress=lambda done, total, tokens=0: seen.append((done, total))
    )
    gpt2, expected = make_tokenizer("gpt2"), []
    sources = sorted(STDLIB_JSON.rglob("*.py"))
    for path in sources:
        ids = gpt2.encode(path.read_bytes().decode()).tolist()
        cut = int(len(ids) * 0.9)
        expected.append(([*ids[:cut], 50256], [*ids[cut:], 50256]))
    assert tokens.train.tolist() == [token for ids, _ in expected for token in ids]
    assert tokens.val.tolist() == [token for _, ids in expected for token in ids]
    assert tokens.meta["documents"] == len(sources)
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] == sum(path.stat().st_size for path in sources)


def test_latin_1(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(("perché così è più\n" * 30).encode("latin-1"))
    tokens = prepare([path], tmp_path / "out", DataConfig(tokenizer="char", encoding="latin-1"))
    assert tokens.tokenizer.characters == "".join(sorted(set("perché così è più\n")))
    assert prepare_cached(DataConfig(input_file=str(path), tokenizer="char", encoding="auto")).train.tolist() == (
        tokens.train.tolist()
    )


def test_what_was_left_out_is_said(tmp_path, caplog):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("some text " * 20)
    (folder / "b.bin").write_bytes(b"\0")
    (folder / "c.txt").write_bytes(b"caf\xe9")
    tokens = prepare([folder], tmp_path / "out", DataConfig(tokenizer="byte"))
    assert tokens.skipped == {"binary": 1, "not utf-8": 1}
    assert "1 binary (b.bin), 1 not utf-8 (c.txt); --encoding auto" in caplog.text


def test_the_same_preparation_is_reused_and_another_refused(text, tmp_path, monkeypatch):
    out = tmp_path / "out"
    first = prepare([text], out, DataConfig(tokenizer="byte"))
    stamp = (out / "train.bin").stat().st_mtime_ns
    assert prepare([text], out, DataConfig(tokenizer="byte")).digest == first.digest
    assert (out / "train.bin").stat().st_mtime_ns == stamp
    with pytest.raises(InputError, match="already holds tokens of other text, or of other settings"):
        prepare([text], out, DataConfig(tokenizer="char"))
    assert (out / "train.bin").stat().st_mtime_ns == stamp


def test_out_that_holds_other_things(text, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    assert prepare([text], out, DataConfig(tokenizer="byte")).path == out  # an empty folder is as good as none
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious").write_text("x")
    with pytest.raises(InputError, match="already holds something else"):
        prepare([text], other, DataConfig(tokenizer="byte"))
    with pytest.raises(InputError, match="is a file"):
        prepare([text], other / "precious", DataConfig(tokenizer="byte"))
    assert left(other) == ["precious"]


def test_bad_input_leaves_nothing(text, tmp_path):
    binary = tmp_path / "b.bin"
    binary.write_bytes(b"\0")
    before = left(tmp_path)
    for inputs, settings in [
        ([binary], {}),
        ([text, tmp_path / "missing"], {}),
        ([text], {"tokenizer": "word"}),
        ([text], {"encoding": "klingon"}),
        ([text], {"val_fraction": 1.5}),
    ]:
        with pytest.raises(InputError):
            prepare(inputs, tmp_path / "new" / "out", DataConfig(**settings))
    assert left(tmp_path) == before


def test_too_short_to_split(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("x")
    with pytest.raises(InputError, match="no tokens are left for val"):
        prepare([path], tmp_path / "deep" / "out", DataConfig(tokenizer="char"))
    assert left(tmp_path) == ["a.txt"]


def test_no_disk_space_beforehand(text, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(InputError, match="not enough disk space"):
        prepare([text], tmp_path / "deep" / "out", DataConfig(tokenizer="byte"))
    assert left(tmp_path) == ["text.txt"]


@pytest.mark.parametrize("method", ["append", "move_to", "finish"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_the_disk_fills_while_writing(text, tmp_path, monkeypatch, method, code):
    def full(self, *arguments):
        raise OSError(code, "full")

    monkeypatch.setattr(shard_files.ShardFiles, method, full)
    with pytest.raises(InputError, match="no disk space is left"):
        prepare([text], tmp_path / "deep" / "out", DataConfig(tokenizer="byte"))
    if method != "finish":  # a record was written before that
        assert left(tmp_path) == ["text.txt"]


@pytest.mark.skipif(not os.access("/dev/full", os.W_OK), reason="no /dev/full here")
def test_a_device_that_is_really_full(text, tmp_path, monkeypatch):
    opened = Path.open
    monkeypatch.setattr(
        Path,
        "open",
        lambda path, *rest, **words: (
            opened(Path("/dev/full"), "wb", buffering=0)
            if path.name == "train_00000.bin" and rest == ("w+b",)
            else opened(path, *rest, **words)
        ),
    )
    with pytest.raises(InputError, match="no disk space is left"):
        prepare([text], tmp_path / "out", DataConfig(tokenizer="byte"))
    assert left(tmp_path) == ["text.txt"]


def test_a_place_that_cannot_be_written(text, tmp_path):
    with pytest.raises(InputError, match="cannot be written"):
        prepare([text], text / "out", DataConfig(tokenizer="byte"))


def test_interrupted(text, tmp_path):
    def interrupt(done, total, tokens=0):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare([text], tmp_path / "out", DataConfig(tokenizer="byte"), progress=interrupt)
    assert left(tmp_path) == ["text.txt"]


def test_what_a_killed_preparation_left_is_removed_a_day_later(text, tmp_path):
    old, new = tmp_path / ".out.tmp-old", tmp_path / ".out.tmp-new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "train.bin").write_bytes(b"x")
    past = time.time() - 2 * 24 * 3600
    os.utime(old / "train.bin", (past, past))
    os.utime(old, (past, past))
    prepare([text], tmp_path / "out", DataConfig(tokenizer="byte"))
    assert not old.exists()
    assert new.exists()


def test_cache_is_by_content(text, tmp_path, cache, monkeypatch):
    data = DataConfig(input_file=str(text), tokenizer="byte")
    first = prepare_cached(data)
    assert first.path.parent == cache
    assert len(first.path.name) == 64
    monkeypatch.setattr(module, "_write_tokens", None)  # nothing is tokenised from here on
    assert prepare_cached(data).path == first.path
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.copy(text, moved)
    assert prepare_cached(data.changed(input_file=str(moved))).path == first.path
    monkeypatch.undo()
    monkeypatch.setenv("SCALEGPT_CACHE", str(cache))
    text.write_text(text.read_text() + "more")
    assert prepare_cached(data).path != first.path
    others = [{"tokenizer": "char"}, {"encoding": "latin-1"}, {"val_fraction": 0.2}]
    assert len({prepare_cached(data.changed(**other)).path for other in others} | {prepare_cached(data).path}) == 4


def test_a_damaged_cache_is_made_again(text, cache, caplog):
    data = DataConfig(input_file=str(text), tokenizer="byte")
    first = prepare_cached(data)
    expected = everything(first)
    os.truncate(first.path / "train.bin", 10)
    assert everything(prepare_cached(data)) == expected
    assert "made again" in caplog.text
    assert left(cache) == [first.path.name]


def test_inputs_of_the_trainer(text, tmp_path):
    other = tmp_path / "with, comma.txt"
    other.write_text("comma " * 50)
    both = prepare_cached(DataConfig(input_file=f"{text}, {tmp_path / 'text.txt'}", tokenizer="byte"))
    assert both.meta["documents"] == 1
    assert prepare_cached(DataConfig(input_file=str(other), tokenizer="byte")).meta["documents"] == 1
    with pytest.raises(InputError, match="no data"):
        prepare_cached(DataConfig())
    with pytest.raises(InputError, match="no input"):
        prepare_cached(DataConfig(input_file=","))


def test_a_prepared_folder_is_opened_as_it_is(text, tmp_path, cache):
    made = prepare([text], tmp_path / "out", DataConfig(tokenizer="char"))
    opened = prepare_cached(DataConfig(input_file=str(made.path), tokenizer="gpt2"))
    assert opened.tokenizer.kind == "char"
    assert not cache.exists()


def test_default_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("SCALEGPT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert module.cache_folder() == tmp_path / ".cache" / "scalegpt" / "data"


def _prepare_at_once(path, barrier, queue):
    barrier.wait()
    queue.put(everything(prepare_cached(DataConfig(input_file=str(path), tokenizer="byte"))))


def test_two_processes_at_once(text, cache):
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(2), context.Queue()
    workers = [context.Process(target=_prepare_at_once, args=(text, barrier, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    results = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert results[0] == results[1]
    assert len(left(cache)) == 1


def test_losing_the_race_takes_the_winners(text, cache, monkeypatch):
    data, commit = DataConfig(input_file=str(text), tokenizer="byte"), writer.TokenWriter.commit

    def lose(self, meta, files):
        monkeypatch.setattr(writer.TokenWriter, "commit", commit)
        prepare_cached(data)  # the other process finishes first
        return commit(self, meta, files)

    monkeypatch.setattr(writer.TokenWriter, "commit", lose)
    tokens = prepare_cached(data)
    assert np.array_equal(tokens.train[:2], [ord("T"), ord("o")])
    assert left(cache) == [tokens.path.name]
