"""Reading: any range of any tensor, from any layout, only after verification; all damage is found and named."""

import errno
import math
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from checkpoint.samples import KEYS, SHAPES, TENSORS, cut, header, save, whole
from manifests import rewrite
from scalegpt import storage
from scalegpt.checkpoint import reader, writer
from scalegpt.checkpoint.manifest import MANIFEST, MOMENTS, WEIGHTS, DamagedError, UnreadableError
from scalegpt.checkpoint.reader import Checkpoint
from scalegpt.errors import InputError


def save_with(folder: Path, ranks: int) -> Path:
    """A checkpoint that several ranks have written."""
    ticket = writer.begin(folder, 7, ranks, 0)
    for rank, share in enumerate(cut(whole(), ranks)):
        writer.write_part(ticket, rank, share)
    return writer.commit(ticket, header(), TENSORS)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_with(tmp_path, 3)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Checkpoint]:
    """By the number of ranks that have written it."""
    made = {}
    for ranks in (1, 2, 3, 7):
        made[ranks] = Checkpoint.open(save_with(tmp_path_factory.mktemp("ranks"), ranks))
        made[ranks].verify()
    return made


@given(st.sampled_from([1, 2, 3, 7]), st.sampled_from(sorted(SHAPES)), st.sampled_from(KEYS), st.data())
@settings(max_examples=200, deadline=None)
def test_any_range_comes_back(
    opened: dict[int, Checkpoint], ranks: int, name: str, key: str, data: st.DataObject
) -> None:
    values = next(piece.values for piece in whole() if (piece.name, piece.key) == (name, key))
    start = data.draw(st.integers(0, len(values)))
    count = data.draw(st.integers(0, len(values) - start))
    assert torch.equal(opened[ranks].read(name, key, start, count), values[start : start + count])


def test_the_weights_come_whole(opened: dict[int, Checkpoint]) -> None:
    expected = {piece.name: piece.values for piece in whole() if piece.key == "weight"}
    for checkpoint in opened.values():
        found = dict(checkpoint.weights())
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert value.shape == SHAPES[name] == checkpoint.shape(name)
            assert torch.equal(value.reshape(-1), expected[name])


def test_what_is_not_there_is_bad_input(opened: dict[int, Checkpoint]) -> None:
    checkpoint = opened[2]
    with pytest.raises(InputError, match=r"has no exp_avg of blocks.9; the checkpoint's model has another shape"):
        checkpoint.read("blocks.9", "exp_avg", 0, 1)
    with pytest.raises(InputError, match="weight of one has fewer than 2 elements"):
        checkpoint.read("one", "weight", 0, 2)


def test_the_library_reads_the_same(saved: Path) -> None:
    """With safetensors and the documentation alone."""
    for share, rank in zip(cut(whole(), 3), range(3), strict=True):
        for kind, keys in (("weights", ("weight",)), ("moments", ("exp_avg", "exp_avg_sq"))):
            with safe_open(saved / f"rank_{rank:05d}.{kind}.safetensors", "pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            expected = {f"{p.key}/{p.name}@{p.start}": p.values for p in share if p.key in keys}
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], values) for name, values in expected.items())


def test_nothing_is_read_before_it_is_verified(saved: Path) -> None:
    checkpoint = Checkpoint.open(saved)
    with pytest.raises(AssertionError, match="used before it is verified"):
        checkpoint.read("wte.weight", "weight", 0, 1)
    checkpoint.verify((WEIGHTS,))
    checkpoint.read("wte.weight", "weight", 0, 44)
    with pytest.raises(AssertionError, match="used before it is verified"):
        checkpoint.read("wte.weight", "exp_avg", 0, 1)


def test_ranks_share_the_reading(saved: Path) -> None:
    file = saved / "rank_00001.weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    seen = []
    for rank in range(4):
        checkpoint = Checkpoint.open(saved)
        seen += [str(problem) for problem in checkpoint.problems(rank=rank, size=4)]
        checkpoint.accept()
        checkpoint.read("wte.weight", "exp_avg", 0, 44)
    assert len(seen) == 1
    assert f"{file} is damaged" in seen[0]


def test_only_the_kind_to_be_used_is_verified(saved: Path) -> None:
    (saved / "rank_00002.moments.safetensors").unlink()
    Checkpoint.open(saved).verify((WEIGHTS,))
    for kinds in ((MOMENTS,), (MOMENTS, WEIGHTS)):
        with pytest.raises(DamagedError, match=r"rank_00002.moments.safetensors is missing"):
            Checkpoint.open(saved).verify(kinds)


def test_a_manifest_that_lies_about_its_files(saved: Path) -> None:
    """Its digests are right, and the tensors are not where it says."""

    def swap(document: dict[str, dict[str, dict[str, object]]]) -> None:
        tensors = document["tensors"]
        for key in KEYS:
            tensors[f"{key}/other"] = tensors.pop(f"{key}/one")

    rewrite(saved, swap)
    checkpoint = Checkpoint.open(saved)
    checkpoint.verify()
    with pytest.raises(DamagedError, match="cannot be read"):
        checkpoint.read("other", "weight", 0, 1)


def test_a_file_that_is_gone_by_the_time_it_is_read_is_named_once(saved: Path) -> None:
    checkpoint = Checkpoint.open(saved)
    checkpoint.verify()
    for file in saved.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(DamagedError, match=r"cannot be read: No such file or directory$") as caught:
        checkpoint.read("one", "weight", 0, 1)
    assert str(caught.value).count(str(saved)) == 1


def is_caught(checkpoint: Path) -> str | None:
    """The line with which a damaged checkpoint is refused before anything in it is used."""
    try:
        Checkpoint.open(checkpoint).verify()
    except DamagedError as error:
        return str(error)
    return None


def test_two_hundred_flips_and_fifty_truncations_are_all_caught(saved: Path) -> None:
    files = sorted(saved.iterdir())
    assert len(files) == 7
    draw = random.Random(5)
    caught = 0
    assert is_caught(saved) is None
    for number in range(250):
        file = files[number % len(files)]
        content = file.read_bytes()
        if number < 200:
            changed = bytearray(content)
            changed[draw.randrange(len(content))] ^= draw.randrange(1, 256)
            file.write_bytes(changed)
        else:
            file.write_bytes(content[: draw.randrange(len(content))])
        line = is_caught(saved)
        caught += line is not None and line.startswith(f"{file} ")
        file.write_bytes(content)
    assert caught == 250
    assert is_caught(saved) is None


@pytest.mark.parametrize("what", ["deleted", "emptied", "zeroed", "longer", "a directory"])
def test_each_other_damage_is_caught_in_each_file(saved: Path, what: str) -> None:
    for file in sorted(saved.iterdir()):
        content = file.read_bytes()
        file.unlink()
        if what == "a directory":
            file.mkdir()
        elif what != "deleted":
            file.write_bytes({"emptied": b"", "zeroed": bytes(len(content)), "longer": content + b"\0"}[what])
        line = is_caught(saved)
        assert line is not None
        assert line.startswith(f"{file} ")
        if what == "a directory":
            file.rmdir()
        file.write_bytes(content)
    assert is_caught(saved) is None


def test_a_shape_of_nothing_but_a_name(tmp_path: Path) -> None:
    path = save(tmp_path)
    assert sum(math.prod(shape) for shape in SHAPES.values()) * 12 < Checkpoint.open(path).manifest.size


def test_the_program_in_the_documentation_reads_it(saved: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "CHECKPOINTS.md").read_text(encoding="utf-8")
    program = page.split("```python\n")[1].split("```")[0]
    assert "runs/NAME/checkpoints/step_00001000" in program
    names: dict[str, Any] = {}
    exec(program.replace("runs/NAME/checkpoints/step_00001000", str(saved)), names)
    expected = {piece.name: piece.values.view(SHAPES[piece.name]) for piece in whole() if piece.key == "weight"}
    assert names["weights"].keys() == expected.keys()
    assert all(torch.equal(names["weights"][name], value) for name, value in expected.items())


# --- a read that fails is no damage ----------------------------------------------------------------------------------


class Disk:
    """Opening a file fails this many times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, code: int, times: int) -> None:
        self.left, real = times, os.open

        def opened(path: Any, *arguments: Any, **options: Any) -> int:
            if self.left and Path(path).name == name:
                self.left -= 1
                raise OSError(code, os.strerror(code))
            return real(path, *arguments, **options)

        monkeypatch.setattr(os, "open", opened)
        monkeypatch.setattr(storage, "RETRY_SECONDS", (0.0, 0.0))


READ = [MANIFEST, "rank_00001.weights.safetensors", "rank_00002.moments.safetensors"]


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT])
def test_a_read_that_fails_twice_is_tried_a_third_time(
    saved: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    disk = Disk(monkeypatch, name, code, 2)
    Checkpoint.open(saved).verify()
    assert disk.left == 0


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize(
    ("code", "way"),
    [
        (errno.EIO, "check the disk or its connection"), (errno.ESTALE, "check the disk or its connection"),
        (errno.EACCES, "make it readable for this user"), (errno.EPERM, "make it readable for this user"),
        (errno.EMFILE, "check the disk"), (errno.ENOMEM, "check the disk"),
    ],
)  # fmt: skip
def test_a_read_that_keeps_failing_is_no_damage(
    saved: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int, way: str
) -> None:
    Disk(monkeypatch, name, code, 99)
    with pytest.raises(UnreadableError, match=f"{name} cannot be read: {os.strerror(code)}; {way}"):
        Checkpoint.open(saved).verify()


def test_a_read_that_breaks_off_begins_again(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in the middle of a file: the digest is taken anew, of all of it."""
    monkeypatch.setattr(storage, "RETRY_SECONDS", (0.0, 0.0))
    real, left = reader.hashlib.file_digest, [2]

    def broken(file: Any, kind: str) -> Any:
        if left[0]:
            left[0] -= 1
            file.read(100)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(file, kind)

    monkeypatch.setattr(reader.hashlib, "file_digest", broken)
    Checkpoint.open(saved).verify()
    assert left == [0]


def test_a_file_that_cannot_be_read_once_it_is_verified_is_no_damage(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(saved)
    checkpoint.verify()

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("Permission denied (os error 13)")

    monkeypatch.setattr(reader, "safe_open", refuse)
    Disk(monkeypatch, "rank_00000.weights.safetensors", errno.EACCES, 99)
    with pytest.raises(UnreadableError, match="make it readable"):
        checkpoint.read("wte.weight", "weight", 0, 1)


def test_a_file_system_that_cannot_map_files_is_no_damage(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(saved)
    checkpoint.verify()

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("No such device (os error 19)")

    monkeypatch.setattr(reader, "safe_open", refuse)
    with pytest.raises(UnreadableError, match=r"No such device .*; copy the checkpoint to another disk"):
        checkpoint.read("wte.weight", "weight", 0, 1)


def test_a_folder_that_cannot_be_searched_is_no_damage(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    for call in ("scandir", "stat"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, refuse)
            with pytest.raises(UnreadableError, match=f"{saved} cannot be read: Permission denied; make it readable"):
                Checkpoint.open(saved)
