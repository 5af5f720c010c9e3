"""The manifest: read back to the last bit, every changed byte noticed, and nothing outside the directory named."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.samples import SHAPES, header, save, save_alone
from manifests import canonical, rewrite, sealed
from scalegpt.backends.base import WEIGHT, Piece
from scalegpt.checkpoint.manifest import (
    MANIFEST,
    DamagedError,
    Header,
    Manifest,
    Placed,
    Progress,
    StoredFile,
    StoredTensor,
    decode,
)
from scalegpt.checkpoint.reader import Checkpoint, read_manifest
from scalegpt.config.optimizers import MOMENTUM
from scalegpt.errors import InputError, RunError

FILE = "rank_00000.weights.safetensors"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(tmp_path / "checkpoints")


def test_what_is_written_is_read_back(saved: Path) -> None:
    manifest = read_manifest(saved)
    assert manifest.header == header()
    assert {name: tensor.shape for name, tensor in manifest.tensors.items()} == {
        f"{key}/{name}": shape for key in ("weight", "exp_avg", "exp_avg_sq") for name, shape in SHAPES.items()
    }
    assert manifest.files.keys() == {path.name for path in saved.iterdir()} - {"checkpoint.json"}
    assert manifest.size == sum(path.stat().st_size for path in saved.iterdir() if path.name != "checkpoint.json")


@given(
    st.builds(
        Progress,
        step=st.integers(0, 10**12),
        tokens=st.integers(0, 10**15),
        val_loss=st.none() | st.floats(allow_nan=False, allow_infinity=False),
        loss_scale=st.floats(0, 1e30),
        seed=st.integers(0, 2**63 - 1),
    ),
    st.dictionaries(st.text(), st.integers() | st.text() | st.booleans() | st.none() | st.lists(st.floats(-9, 9))),
)
@settings(max_examples=50, deadline=None)
def test_numbers_and_words_survive_to_the_last_bit(progress: Progress, config: dict[str, Any]) -> None:
    manifest = Manifest(Header(progress, config, {}), {}, {})
    assert decode(manifest.encode()) == manifest
    assert sealed(json.loads(manifest.encode())) == manifest.encode()


def test_every_changed_byte_is_noticed(saved: Path) -> None:
    content = (saved / "checkpoint.json").read_bytes()
    for place in range(len(content)):
        for bit in (1, 32):  # 32 makes a small letter a capital, which JSON takes in escapes and exponents
            changed = bytearray(content)
            changed[place] ^= bit
            with pytest.raises(DamagedError):
                decode(bytes(changed))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"null",
        b'{"format"',
        b"\xff\xfe",
        b"{}",
        b'{"a": NaN}',
        b"[" * 100_000,
        b'{"sha256": 7}',
        b"1" * 9000,
    ],
)
def test_what_is_no_manifest_is_damaged(content: bytes) -> None:
    with pytest.raises(DamagedError):
        decode(content)


def test_the_same_content_in_another_form_is_damaged(saved: Path) -> None:
    document = json.loads((saved / "checkpoint.json").read_bytes())
    for text in (json.dumps(document), json.dumps(document, indent=1), canonical(document).decode() + "\n"):
        with pytest.raises(DamagedError, match="not in canonical form"):
            decode(text.encode())


def refusal(saved: Path, change: Callable[[dict[str, Any]], Any]) -> str:
    """The line for a manifest whose digest is right."""
    rewrite(saved, change)
    with pytest.raises(DamagedError) as caught:
        read_manifest(saved)
    line = str(caught.value)
    assert line.startswith(f"{saved / 'checkpoint.json'} is damaged: ")
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../step_00000001/" + FILE, "x/" + FILE, "./" + FILE, FILE + "\n", "\\" + FILE, "weights.safetensors",
     "rank_00000.json", "checkpoint.json", "rank_0.weights.safetensors", "rank_٠٠٠٠٠.weights.safetensors", ""],
)  # fmt: skip
def test_other_names_are_refused(saved: Path, name: str) -> None:
    def rename(document: dict[str, Any]) -> None:
        document["files"][name] = document["files"].pop(FILE)
        for tensor in document["tensors"].values():
            for piece in tensor["pieces"]:
                piece[0] = name if piece[0] == FILE else piece[0]

    assert "which is not a file of a checkpoint" in refusal(saved, rename)


def pieces_of(document: dict[str, Any]) -> Any:
    return document["tensors"]["weight/wte.weight"]["pieces"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: pieces_of(d)[0].__setitem__(2, 43), "ends at element 43 of 44"),
        (lambda d: pieces_of(d)[0].__setitem__(2, 45), "ends at element 45 of 44"),
        (lambda d: pieces_of(d)[0].__setitem__(1, 1), "has a gap before element 1"),
        (lambda d: pieces_of(d).append([FILE, 40, 4]), "has an overlap at element 40"),
        (lambda d: pieces_of(d).append([FILE, 44, 0]), "before element 44"),
        (lambda d: pieces_of(d).clear(), "ends at element 0 of 44"),
        (lambda d: pieces_of(d)[0].__setitem__(1, -1), "weight/wte.weight is invalid: file"),
        (lambda d: pieces_of(d)[0].__setitem__(2, 44.0), "weight/wte.weight is invalid: file"),
        (lambda d: pieces_of(d)[0].__setitem__(1, False), "weight/wte.weight is invalid: file"),
        (lambda d: pieces_of(d)[0].__setitem__(0, "rank_00001.weights.safetensors"), "weight/wte.weight is invalid: file"),
        (lambda d: pieces_of(d)[0].__setitem__(0, FILE.replace("weights", "moments")), "weight/wte.weight is invalid: file"),
        (lambda d: pieces_of(d)[0].append(1), "ValueError"),
        (lambda d: d["tensors"].update({"../x": {"shape": [], "pieces": []}}), "names the invalid tensor '../x'"),
        (lambda d: d["tensors"]["weight/one"].update(shape=[-1]), "the invalid shape [-1]"),
        (lambda d: d["tensors"]["weight/one"].update(shape=7), "TypeError"),
        (lambda d: d["files"][FILE].update(bytes=-1), f"its entry for {FILE} is invalid"),
        (lambda d: d["files"][FILE].update(sha256="A" * 64), f"its entry for {FILE} is invalid"),
        (lambda d: d["files"][FILE].update(more=1), "TypeError"),
        (lambda d: d["progress"].update(other=1), "TypeError"),
        *((lambda d, key=key, bad=bad: d["progress"].update({key: bad}), f"its progress has the invalid {key}")
          for key in ("step", "tokens", "sequences", "seed", "skipped_steps", "left_out", "rollbacks", "good_steps")
          for bad in (1e30, 2**63, -1, 1.0, True, "1", None, [1])),
        *((lambda d, key=key, bad=bad: d["progress"].update({key: bad}), f"its progress has the invalid {key}")
          for key in ("val_loss", "best_val_loss", "loss_scale") for bad in ("1", True, [], {})),
        (lambda d: d["progress"].update(loss_scale=None), "its progress has the invalid loss_scale"),
        *((lambda d, key=key: d["progress"].update({key: 2**53 + 1}), f"its progress has the invalid {key}")
          for key in ("step", "tokens", "sequences")),
        (lambda d: d["progress"].update(skipped_steps=8), "more skipped steps than steps"),
        (lambda d: d["progress"].update(left_out=57), "more skipped data than data"),
        (lambda d: d.update(progress=[]), "TypeError"), (lambda d: d.update(progress=7), "TypeError"),
        (lambda d: d.update(data=7), "data or run is not a string"),
        (lambda d: d.update(run=None), "data or run is not a string"),
        (lambda d: d.update(files=[]), "AttributeError"), (lambda d: d.update(tensors=7), "AttributeError"),
        (lambda d: d["files"].update({FILE: 7}), "TypeError"),
        (lambda d: d["files"][FILE].update(bytes=2**63), f"its entry for {FILE} is invalid"),
        (lambda d: d["files"][FILE].update(bytes=8), "elements in the 8 bytes of"),
        (lambda d: d["tensors"]["weight/one"].update(shape=[1] * 9), "the invalid shape"),
        (lambda d: d["tensors"]["weight/one"].update(shape=[2**63]), "the invalid shape"),
        (lambda d: d["tensors"]["weight/one"].update(shape=[10**15], pieces=[[FILE, 0, 10**15]]), "elements in the"),
        (lambda d: d.update(config=[]), "config is not an object"),
        (lambda d: d.update(tokenizer=None), "tokenizer is not an object"),
        *((lambda d, part=part: d.pop(part), part) for part in ("progress", "config", "tensors", "files", "run", "data")),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(saved: Path, change: Any, words: str) -> None:
    assert words in refusal(saved, change)


@pytest.mark.parametrize("long", ["name", "key", "shape", "format"])
def test_a_line_about_it_is_short_and_harmless(saved: Path, long: str) -> None:
    changes: dict[str, Callable[[dict[str, Any]], Any]] = {
        "name": lambda d: d["files"].update({"\x1b[2J" * 10**5: d["files"][FILE]}),
        "key": lambda d: d["progress"].update({"\x1b[2J" * 10**5: 1}),
        "shape": lambda d: d["tensors"]["weight/one"].update(shape=[1] * 10**5),
        "format": lambda d: d.update(format="\x1b[2J" * 10**5),
    }
    rewrite(saved, changes[long])
    with pytest.raises(InputError) as caught:
        read_manifest(saved)
    assert len(str(caught.value)) < 500 + len(str(saved))
    assert "\x1b" not in str(caught.value)


def test_a_manifest_of_gigabytes_is_not_read(saved: Path) -> None:
    with (saved / MANIFEST).open("r+b") as file:
        file.truncate(20 << 30)  # a hole: it takes up no room
    with pytest.raises(DamagedError, match="it has more than 134,217,728 bytes"):
        read_manifest(saved)


def test_a_manifest_that_would_not_be_read_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (save(tmp_path / "one") / MANIFEST).stat().st_size
    monkeypatch.setattr("scalegpt.checkpoint.writer.MANIFEST_LIMIT", size - 1)
    with pytest.raises(RunError, match=f"its manifest has {size:,} bytes, and at most {size - 1:,} are read"):
        save(tmp_path / "two")
    assert list((tmp_path / "two").iterdir()) == []


def test_muons_momentum_makes_another_version(tmp_path: Path) -> None:
    """A reader that knows only two moments for each parameter reports the version, not damage."""
    pieces = [Piece("a", key, 0, torch.ones(4)) for key in (WEIGHT, MOMENTUM)]
    path = save_alone(tmp_path, header(), pieces, {f"{key}/a": (4,) for key in (WEIGHT, MOMENTUM)})
    assert json.loads((path / MANIFEST).read_bytes())["version"] == 3
    checkpoint = Checkpoint.open(path)
    checkpoint.verify()
    assert torch.equal(checkpoint.read("a", MOMENTUM, 1, 2), torch.ones(2))
    with pytest.raises(InputError, match="has no exp_avg of a"):
        checkpoint.read("a", "exp_avg", 0, 1)
    assert "its version, 2, does not match its tensors" in refusal(path, lambda d: d.update(version=2))


def test_coverage_is_told_from_both_sides() -> None:
    for starts, words in (((0, 3), "gap before element 3"), ((0, 1), "overlap at element 1"), ((0, 2), "")):
        pieces = tuple(Placed(start, 2, FILE) for start in starts)
        manifest = Manifest(header(), {"weight/a": StoredTensor((4,), pieces)}, {FILE: StoredFile(1, "0" * 64)})
        if words:
            with pytest.raises(DamagedError, match=words):
                manifest.check_coverage()
        else:
            manifest.check_coverage()


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"format": "scalegpt-checkpoint", "version": 1, "files": {}}, "has the version 1, not 2"),
        (json.loads(sealed({"format": "scalegpt-checkpoint", "version": 4})), "format scalegpt-checkpoint 4"),
        (json.loads(sealed({"format": "other", "version": 2})), "format other 2"),
    ],
)
def test_other_versions_are_no_damage(saved: Path, document: Any, words: str) -> None:
    """An earlier checkpoint would be of the same version: the user must decide."""
    (saved / "checkpoint.json").write_bytes(canonical(document))
    with pytest.raises(InputError, match=words) as caught:
        read_manifest(saved)
    assert not isinstance(caught.value, DamagedError)


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such directory"):
        read_manifest(tmp_path / "absent")
    with pytest.raises(DamagedError, match=r"checkpoint.json is missing"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["checkpoint.json", FILE, "unrelated"])
def test_links_are_refused(saved: Path, name: str) -> None:
    target = saved.parent / "elsewhere"
    if (saved / name).exists():
        (saved / name).rename(target)
    else:
        target.touch()
    (saved / name).symlink_to(target)
    with pytest.raises(DamagedError, match=f"{name} is a link"):
        read_manifest(saved)


def test_a_link_or_a_pipe_that_comes_later_is_refused_too(saved: Path) -> None:
    checkpoint, file = Checkpoint.open(saved), saved / FILE
    elsewhere = saved.parent / "elsewhere"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)
    with pytest.raises(DamagedError, match=f"{FILE} cannot be read"):
        checkpoint.verify()
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(DamagedError, match=f"{FILE} is not a plain file"):
        checkpoint.verify()
