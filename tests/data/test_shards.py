import hashlib
import json
import os
import pickle

import numpy as np
import pytest

from scalegpt.config import DataConfig
from scalegpt.data import token_file
from scalegpt.data.prepare import prepare
from scalegpt.data.shards import open_tokens
from scalegpt.data.text.documents import is_prepared
from scalegpt.data.token_file import TokenFile
from scalegpt.data.windows.sampler import WindowSampler, cut_windows
from scalegpt.errors import InputError


@pytest.fixture
def folder(tmp_path):
    """Prepared bytes: 901 training tokens and 101 held out, the end of the text in both."""
    text = tmp_path / "text.txt"
    text.write_text("0123456789" * 100)
    return prepare([text], tmp_path / "tokens", DataConfig(tokenizer="byte")).path


def plain(folder, train, val):
    folder.mkdir(exist_ok=True)
    for name, ids in (("train.bin", train), ("val.bin", val)):
        np.asarray(ids, dtype="<u2").tofile(folder / name)
    return folder


def test_sidecar(folder, tmp_path):
    meta = json.loads((folder / "meta.json").read_text())
    assert {key: meta[key] for key in ("format", "version", "dtype", "train_tokens", "val_tokens", "documents")} == {
        "format": "scalegpt-tokens",
        "version": 1,
        "dtype": "uint16",
        "train_tokens": 901,
        "val_tokens": 101,
        "documents": 1,
    }
    assert meta["tokenizer"]["kind"] == "byte"
    assert len(meta["tokenizer"]["digest"]) == 64
    assert meta["encoding"] == "utf-8"
    (source,) = meta["sources"]
    assert (source["path"], source["bytes"], len(source["sha256"])) == (str(tmp_path / "text.txt"), 1000, 64)


def test_files_are_little_endian_without_a_header(folder):
    assert (folder / "train.bin").read_bytes() == b"".join(bytes((c, 0)) for c in b"0123456789" * 90) + b"\0\1"
    tokens = open_tokens(folder)
    assert tokens.tokenizer.decode(tokens.train[:5]) == "01234"
    assert tokens.val[-1] == 256
    with pytest.raises(TypeError):
        tokens.train[0] = 1


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_sizes_must_match_the_sidecar(folder, name):
    size = (folder / name).stat().st_size
    for change in (-3, -2, 2):
        os.truncate(folder / name, size + change)
        with pytest.raises(InputError, match=rf"{name} holds {size + change} bytes where .* says {size}"):
            open_tokens(folder)
    (folder / name).unlink()
    with pytest.raises(InputError, match=rf"{name}: No such file"):
        open_tokens(folder)


@pytest.mark.parametrize(("content", "words"), [(b"", "is empty"), (b"abc", "3 bytes, no multiple of 2")])
def test_token_files_that_cannot_be(tmp_path, content, words):
    path = tmp_path / "train.bin"
    path.write_bytes(content)
    with pytest.raises(InputError, match=words):
        TokenFile.open(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "else"}, "not the sidecar"),
        ({"version": 3}, "version 3"),
        ({"version": True}, "version True"),
        ({"version": 2}, "shards is missing"),
        ({"dtype": "int64"}, "with 'int64', where this ScaleGPT reads versions 1 and 2 with uint16 or uint32"),
        ({"dtype": ["uint16"]}, "uint16"),
        ({"dtype": "uint32"}, "holds 1802 bytes where .* says 3604"),
        ({"train_tokens": "many"}, "train_tokens is missing"),
        ({"sources": None}, "sources is missing"),
        ({"tokenizer": {"kind": "word"}}, "'word' is not known"),
    ],
)
def test_malformed_sidecars(folder, change, words):
    sidecar = folder / "meta.json"
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), **change}))
    with pytest.raises(InputError, match=words):
        open_tokens(folder)


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]"])
def test_sidecars_that_are_not_json(folder, content):
    (folder / "meta.json").write_bytes(content)
    with pytest.raises(InputError, match=r"meta\.json is not"):
        open_tokens(folder)


def test_not_a_folder_of_tokens(tmp_path):
    with pytest.raises(InputError, match="not a folder of prepared tokens"):
        open_tokens(tmp_path / "nothing")
    (tmp_path / "val.bin").write_bytes(b"\0\0")
    with pytest.raises(InputError, match=r"train\.bin: No such file"):
        open_tokens(tmp_path)


def test_ids_past_the_vocabulary_are_found_in_any_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr("scalegpt.data.token_file._CHUNK_TOKENS", 10)
    tokens = open_tokens(plain(tmp_path / "t", range(100), [*range(25), 500, 600]))
    tokens.check_vocabulary(601)
    tokens.check_vocabulary(1 << 20)
    with pytest.raises(InputError, match=r"val\.bin holds id 500 at token offset 25, outside the vocabulary of 500"):
        tokens.check_vocabulary(500)
    with pytest.raises(InputError, match=r"train\.bin holds id 50 at token offset 50"):
        tokens.check_vocabulary(50)


def test_block_size(folder):
    tokens = open_tokens(folder)
    tokens.check_block_size(100)
    with pytest.raises(InputError, match=r"text\.txt gives 101 held-out tokens.*--block_size 100 .*larger --val_fract"):
        tokens.check_block_size(101)
    with pytest.raises(InputError, match=r"901 training tokens.*smaller --val_fraction"):
        tokens.check_block_size(901)


def test_changed_contents_are_noticed(folder):
    tokens = open_tokens(folder)
    tokens.check_contents()
    content = bytearray((folder / "val.bin").read_bytes())
    content[10] ^= 1
    (folder / "val.bin").write_bytes(content)
    with pytest.raises(InputError, match=r"val\.bin has changed"):
        open_tokens(folder).check_contents()


def shard(folder, sizes):
    """Divide the files of a folder of prepared tokens into shards of these numbers of tokens."""
    sidecar = folder / "meta.json"
    meta = json.loads(sidecar.read_text())
    shards = {}
    for split, counts in sizes.items():
        ids = np.fromfile(folder / f"{split}.bin", dtype="<u2")
        (folder / f"{split}.bin").unlink()
        shards[split] = []
        for number, part in enumerate(np.split(ids, np.cumsum(counts)[:-1])):
            path = folder / (f"{split}_{number:05}.bin" if len(counts) > 1 else f"{split}.bin")
            part.tofile(path)
            digest = hashlib.sha256(part.tobytes()).hexdigest()
            shards[split].append({"name": path.name, "tokens": len(part), "sha256": digest, "blocks": [digest]})
    del meta["files"], meta["blocks"]
    sidecar.write_text(json.dumps({**meta, "version": 2, "shards": shards}))
    return shards


@pytest.mark.parametrize("sizes", [{"train": [901], "val": [101]}, {"train": [400, 1, 500], "val": [50, 51]}])
def test_a_folder_of_shards(folder, sizes):
    before = open_tokens(folder)
    train, val = before.train.tolist(), before.val.tolist()
    shards = shard(folder, sizes)
    tokens = open_tokens(folder)
    assert is_prepared(folder)
    assert (tokens.train.tolist(), tokens.val.tolist()) == (train, val)
    tokens.check_contents()
    tokens.check_block_size(100)
    tokens.check_vocabulary(257)
    assert (tokens.digest == before.digest) == (len(sizes["train"]) == 1)
    name = shards["train"][-1]["name"]
    content = bytearray((folder / name).read_bytes())
    content[-200] = 0xFF
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name} has changed since, first between token offsets 0 and"):
        open_tokens(folder).check_contents()
    with pytest.raises(InputError, match=rf"{name} holds id 255 at token offset {sizes['train'][-1] - 100}, outside"):
        open_tokens(folder).check_vocabulary(255)
    os.truncate(folder / name, 10)
    with pytest.raises(InputError, match=rf"{name} holds 10 bytes where .* was cut short at token offset 5"):
        open_tokens(folder)


@pytest.mark.parametrize(
    "change",
    [
        None, {}, {"train": []}, [], {"val": [{"name": "val.bin", "tokens": 101, "sha256": ""}]},
        *({"train": [{"name": "train.bin", "tokens": 901, "sha256": "", **values}]} for values in (
            {"name": "../train.bin"}, {"name": "/train.bin"}, {"name": "a/b.bin"}, {"name": ""}, {"name": ".bin"},
            {"name": 5}, {"name": "meta.json"}, {"tokens": -1}, {"tokens": 900}, {"sha256": 1}, {"blocks": [1]},
        )),
        {"train": [{"name": "train.bin", "tokens": tokens, "sha256": ""} for tokens in (1, 900)]},
    ],
)  # fmt: skip
def test_malformed_lists_of_shards(folder, change):
    shards = shard(folder, {"train": [901], "val": [101]})
    sidecar = folder / "meta.json"
    meta = json.loads(sidecar.read_text())
    meta["shards"] = {**shards, **change} if change and "train" in change else change
    sidecar.write_text(json.dumps(meta))
    with pytest.raises(InputError, match=r"meta\.json: (shards is missing|train_tokens is not the sum)"):
        open_tokens(folder)


def test_a_terabyte_is_opened_without_reading_it(tmp_path):
    """Sparse files: 1,000 shards of 10^9 tokens."""
    shards = [{"name": f"train_{number:05}.bin", "tokens": 10**9, "sha256": ""} for number in range(1000)]
    for each in shards:
        (tmp_path / each["name"]).touch()
        os.truncate(tmp_path / each["name"], 2 * 10**9)
    (tmp_path / "val.bin").write_bytes(b"\1\0\2\0")
    (tmp_path / "meta.json").write_text(
        json.dumps({
            "format": "scalegpt-tokens", "version": 2, "dtype": "uint16", "train_tokens": 10**12, "val_tokens": 2,
            "tokenizer": {"kind": "byte"}, "sources": [],
            "shards": {"train": shards, "val": [{"name": "val.bin", "tokens": 2, "sha256": ""}]},
        })
    )  # fmt: skip
    with (tmp_path / "train_00999.bin").open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\7\0")
    tokens = open_tokens(tmp_path)
    assert len(tokens.train) == 10**12
    assert (tokens.train[10**12 - 1], tokens.train[10**11]) == (7, 0)
    starts = WindowSampler(10**12, 1024, seed=1).starts(10**6, 8)
    inputs, targets = cut_windows(tokens.train, starts, 1024)
    assert (inputs.shape, targets.sum()) == ((8, 1024), 0)


def test_nanogpt_folder_without_anything_is_gpt2(tmp_path):
    tokens = open_tokens(plain(tmp_path / "t", [15496, 995, 50256], [15496, 995]))
    assert tokens.tokenizer.kind == "gpt2"
    assert tokens.tokenizer.decode(tokens.val) == "Hello world"
    assert len(tokens.digest) == 64
    tokens.check_contents()


def test_nanogpt_characters(tmp_path):
    folder, characters = plain(tmp_path / "t", [0, 1, 2], [2, 1]), "ab\n"
    table = dict(enumerate(characters))
    meta = {"vocab_size": 3, "itos": table, "stoi": {text: token for token, text in table.items()}}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta, protocol))
        tokens = open_tokens(folder)
        assert tokens.tokenizer.decode(tokens.train) == characters


class Harmful:
    def __reduce__(self):
        return (os.system, ("touch harmed",))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (pickle.dumps(Harmful()), "system"),
        (pickle.dumps({"itos": {0: Harmful()}}), "system"),
        (pickle.dumps(np.arange(3)), "numpy"),
        (pickle.dumps(os.path.join), "posixpath"),
        (b"", "not nanoGPT's"),
        (b"garbage", "not nanoGPT's"),
        (pickle.dumps({"itos": {0: "a"}})[:-4], "not nanoGPT's"),
        (pickle.dumps([1]), "no table"),
        (pickle.dumps({"itos": {0: "ab"}}), "no table"),
        (pickle.dumps({"itos": {1: "a"}}), "no table"),
        (pickle.dumps({"itos": {0: "a", 1: "a"}}), "twice"),
    ],
)
def test_pickles_that_are_refused(tmp_path, monkeypatch, content, words):
    monkeypatch.chdir(tmp_path)
    folder = plain(tmp_path / "t", [0, 1], [0])
    (folder / "meta.pkl").write_bytes(content)
    with pytest.raises(InputError, match=words):
        open_tokens(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_files_are_read_whole_once(folder, monkeypatch):
    real, read = token_file._scan_part, []
    monkeypatch.setattr(token_file, "_scan_part", lambda part, *rest: read.append(part.path.name) or real(part, *rest))
    tokens = open_tokens(plain(folder.parent / "nano", range(100), range(50)))
    tokens.check_contents()
    tokens.check_vocabulary(100)
    assert len(tokens.digest) == 64
    assert sorted(read) == ["train.bin", "val.bin"]


def test_reading_tells_its_progress_and_can_be_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(token_file, "_REPORT_SECONDS", 0.0)
    monkeypatch.setattr(token_file, "BLOCK_BYTES", 100)
    tokens, told = open_tokens(plain(tmp_path / "nano", [0] * 500_000, [1, 2])), []
    tokens.check_contents(lambda done, total: told.append((done, total)))
    assert told
    assert all(0 <= done <= total for done, total in told)
    assert 1_000_000 in {total for _, total in told}

    def stop(done, total):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        open_tokens(tmp_path / "nano").check_contents(stop)
