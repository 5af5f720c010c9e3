"""Sidecars that come from elsewhere can neither take the machine's memory nor end in a traceback."""

import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scalegpt.config import DataConfig
from scalegpt.data.prepare import prepare
from scalegpt.data.shards import open_tokens
from scalegpt.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    text = tmp_path / "text.txt"
    text.write_text("0123456789" * 100)
    return prepare([text], tmp_path / "tokens", DataConfig(tokenizer="byte")).path


def changed(folder: Path, **values: Any) -> None:
    sidecar = folder / "meta.json"
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), **values}))


def refusal(folder: Path) -> str:
    """Use all of a folder that is read at once; return what it is refused for, if it is."""
    try:
        tokens = open_tokens(folder)
        tokens.check_contents()
        tokens.check_block_size(1)
        return f"{tokens.digest} {tokens.skipped} {tokens.encodings} {tokens.tokenizer.decode(tokens.val)!r}"
    except InputError as error:
        return str(error)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train_tokens", True), ("train_tokens", -1), ("train_tokens", 10**30), ("train_tokens", 1e400), ("val_tokens", 2.5),
        ("tokenizer", []), ("tokenizer", {"kind": ["byte"]}), ("tokenizer", {"kind": "char", "characters": "a\ud800"}),
        ("tokenizer", {"kind": "char", "characters": 5}), ("tokenizer", {"kind": "byte", "digest": [1]}),
        ("sources", {}), ("sources", [1]), ("sources", [{"path": 1, "bytes": 1}]), ("sources", [{"path": "a"}]),
        ("sources", [{"path": "a", "bytes": "many"}]), ("sources", [{"path": "a", "bytes": 1, "encoding": None}]),
        ("files", {}), ("files", {"train": "a"}), ("files", {"train": 1, "val": 2}),
        ("files", {"train": "", "val": "", "x": ""}),
        ("blocks", []), ("blocks", {"train": "abc"}), ("blocks", {"train": [1]}),
        ("skipped", []), ("skipped", {"binary": "many"}), ("skipped", {"binary": -1}),
        ("split", "tails"), ("split", {"method": 5}), ("split", {"val_fraction": "x"}),
        ("split", {"val_fraction": float("nan")}),
        ("documents", "many"), ("documents", 10**400), ("bytes", [1]), ("encoding", 5), ("encodings", "utf-8"), ("key", 5),
        ("format", {}), ("version", [1] * 10**5), ("dtype", "x" * 10**5),
    ],
)  # fmt: skip
def test_parts_of_other_types_are_refused_in_a_short_line(folder: Path, key: str, value: Any) -> None:
    changed(folder, **{key: value})
    with pytest.raises(InputError) as caught:
        open_tokens(folder).check_contents()
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"format":' * 100_000,
        b'{"format": "scalegpt-tokens", "version": ' + b"9" * 5000 + b"}",
        b"\xff\xfe{\0}\0",
        b"null",
        b"",
    ],
)
def test_no_sidecar(folder: Path, content: bytes) -> None:
    (folder / "meta.json").write_bytes(content)
    with pytest.raises(InputError, match=r"meta\.json (is not|nests|is of)"):
        open_tokens(folder)


def test_a_sidecar_with_a_byte_order_mark_is_read(folder: Path) -> None:
    sidecar = folder / "meta.json"
    sidecar.write_bytes(b"\xef\xbb\xbf" + sidecar.read_bytes())
    open_tokens(folder)


def test_a_huge_sidecar_and_a_pipe_are_refused_at_once(folder: Path) -> None:
    sidecar = folder / "meta.json"
    os.truncate(sidecar, 20 << 30)  # a hole
    with pytest.raises(InputError, match="too large"):
        open_tokens(folder)
    sidecar.unlink()
    os.mkfifo(sidecar)
    with pytest.raises(InputError, match="not a plain file"):
        open_tokens(folder)
    sidecar.unlink()
    sidecar.mkdir()
    with pytest.raises(InputError, match=r"meta\.json cannot be read"):
        open_tokens(folder)


def test_random_sidecars_end_in_one_line(folder: Path) -> None:
    rng, sidecar = random.Random(5), folder / "meta.json"
    whole = json.loads(sidecar.read_text())
    values = [None, True, -1, 0, 3, 10**20, 1e308, "", "a", "\x1b[2J", [], [[]], {}, {"a": {}}, [None], {"train": [0]}]
    for _ in range(300):
        meta = json.loads(json.dumps(whole))
        for _ in range(rng.randint(1, 3)):
            place = rng.choice([meta, meta, *(each for each in meta.values() if isinstance(each, dict))])
            if place:
                place[rng.choice(list(place))] = rng.choice(values)
        sidecar.write_text(json.dumps(meta))
        assert "\n" not in refusal(folder)


def with_pickle(folder: Path, content: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    for name in ("train.bin", "val.bin"):
        np.asarray([0, 1, 0], dtype="<u2").tofile(folder / name)
    (folder / "meta.pkl").write_bytes(content)
    return folder


def hashes_for_ever() -> bytes:
    value: Any = ()
    for _ in range(60):
        value = (value, value)
    return pickle.dumps({"itos": {0: "a"}, "x": value})


BOMBS = {
    "a memo number": b"\x80\x02}r\xff\xff\xff\x7f.",
    "a memo number in text": b"(dp99999999999\n.",
    "a byte array": b"\x80\x05\x96\xff\xff\xff\xff\x0f\0\0\0.",
    "bytes": b"\x80\x04\x8e\xff\xff\xff\xff\x0f\0\0\0.",
    "text": b"\x80\x04\x8d\xff\xff\xff\xff\x0f\0\0\0.",
    "a frame": b"\x80\x04\x95\xff\xff\xff\xff\x0f\0\0\0}.",
    "a whole number": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "nested tuples": hashes_for_ever(),
    "digits": b"L" + b"9" * 100_000 + b"L\n.",
    "nested lists": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
}

OPEN = """
import resource, sys
from pathlib import Path
from scalegpt.data.shards import open_tokens
from scalegpt.errors import InputError
limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + (256 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for folder in sys.argv[1:]:
    try:
        open_tokens(folder)
        print("opened")
    except InputError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_pickles_cannot_take_the_memory(tmp_path: Path) -> None:
    folders = [str(with_pickle(tmp_path / str(number), content)) for number, content in enumerate(BOMBS.values())]
    done = subprocess.run([sys.executable, "-c", OPEN, *folders], capture_output=True, text=True, timeout=120)
    assert not done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(BOMBS)
    for line in lines:
        assert "meta.pkl is not nanoGPT's character table" in line or "has no table" in line


def test_random_pickles_end_in_one_line(tmp_path: Path) -> None:
    rng = random.Random(3)
    table = dict(enumerate("abc\n"))
    for protocol in range(6):
        whole = pickle.dumps({"itos": table, "stoi": {text: place for place, text in table.items()}}, protocol)
        for _ in range(50):
            content = bytearray(whole)
            for _ in range(rng.randint(1, 3)):
                content[rng.randrange(len(content))] = rng.randrange(256)
            assert "\n" not in refusal(with_pickle(tmp_path / "t", bytes(content[: rng.randint(1, len(content))])))
