"""Checkpoints in an object store, of which a fifth of the answers fail: nothing is lost, and half of one never counts."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from checkpoint.samples import KEYS, SHAPES, TENSORS, at, cut, whole
from object_store import KINDS, ObjectStore, new_bucket, serving
from scalegpt.backends.base import Piece
from scalegpt.checkpoint import address as address_module
from scalegpt.checkpoint import store, writer
from scalegpt.checkpoint.address import Address, place_of, try_out
from scalegpt.checkpoint.inspection import examine
from scalegpt.checkpoint.manifest import MANIFEST, DamagedError, Header, UnreadableError
from scalegpt.checkpoint.reader import Checkpoint, read_manifest
from scalegpt.errors import InputError, RunError


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    with serving() as found:
        yield found


@pytest.fixture
def folder(server: ObjectStore) -> Address:
    place = place_of(f"{new_bucket()}/runs/tiny")
    assert isinstance(place, Address)
    return place


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait less between attempts, so that tests are short."""
    monkeypatch.setattr(address_module, "WAITS", (0.05, 0.1, 0.2, 0.4))


def save(folder: Address, head: Header, pieces: list[Piece], ranks: int = 1) -> Address:
    """Write a checkpoint by several ranks at the same time."""
    begun = writer.begin(folder, head.progress.step, ranks, 0)
    others = [
        threading.Thread(target=writer.write_part, args=(begun, rank, mine))
        for rank, mine in enumerate(cut(pieces, ranks))
    ]
    for each in others:
        each.start()
    path = writer.commit(begun, head, TENSORS)
    for each in others:
        each.join()
    assert isinstance(path, Address)
    return path


def assert_holds(path: Address, pieces: list[Piece]) -> None:
    checkpoint = Checkpoint.open(path)
    checkpoint.verify()
    for piece in pieces:
        assert torch.equal(checkpoint.read(piece.name, piece.key, 0, piece.values.numel()), piece.values)
    count = SHAPES["wte.weight"][0] * SHAPES["wte.weight"][1]
    for key in KEYS:
        part = checkpoint.read("wte.weight", key, 5, count - 9)
        original = next(piece.values for piece in pieces if (piece.name, piece.key) == ("wte.weight", key))
        assert torch.equal(part, original[5 : count - 4])


def steps(folder: Address) -> list[int]:
    return [store.step_of(path) for path in store.find_checkpoints(folder)]


# --- what an address is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("s3://bucket/runs/", Address("s3://bucket/runs")),
        ("gs://bucket", Address("gs://bucket")),
        ("runs/x", Path("runs/x")),
        ("/data/x", Path("/data/x")),
        ("file:///data/x", Path("/data/x")),
    ],
)
def test_a_place_is_an_address_or_a_path(text: str, place: object) -> None:
    assert place_of(text) == place


def test_the_memory_of_a_process_is_no_place() -> None:
    with pytest.raises(InputError, match="memory of one process"):
        place_of("memory://x")


def test_parts_of_an_address() -> None:
    address = Address("s3://bucket/runs/tiny")
    assert (address.name, str(address.parent), str(address / "x")) == ("tiny", "s3://bucket/runs", f"{address}/x")
    assert str(address.with_name("y")) == "s3://bucket/runs/y"


# --- a save ----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_and_is_that_of_a_disk(folder: Address, tmp_path: Path) -> None:
    pieces = whole(3)
    path = save(folder, at(7), pieces, ranks=2)
    assert_holds(path, pieces)
    assert examine(path).is_whole
    for name in path.objects():
        (tmp_path / path.name).mkdir(exist_ok=True)
        (tmp_path / path.name / name).write_bytes((path / name).read_whole(1 << 20))
    copy = Checkpoint.open(tmp_path / path.name)
    copy.verify()
    assert torch.equal(copy.weight("norm.weight"), weight_of(path, "norm.weight"))


def weight_of(path: Address, name: str) -> torch.Tensor:
    checkpoint = Checkpoint.open(path)
    checkpoint.verify()
    return checkpoint.weight(name)


def test_only_a_manifest_makes_a_checkpoint(folder: Address) -> None:
    begun = writer.begin(folder, 5, 2, 0)
    parts = cut(whole(), 2)
    writer.write_part(begun, 0, parts[0])
    assert steps(folder) == []
    assert not store.is_checkpoint(folder / "step_00000005")
    with pytest.raises(RunError, match=r"rank 1 did not write its part"):
        writer.commit(begun, at(5), TENSORS, patience=0.0)
    assert steps(folder) == []
    save(folder, at(6), whole())  # the next save clears what is left
    assert steps(folder) == [6]
    assert not any(name.startswith("step_00000005") for name in folder.objects())


def test_a_late_rank_of_an_earlier_save_changes_nothing(folder: Address) -> None:
    late = writer.begin(folder, 5, 1, 0)
    path = save(folder, at(5), whole(1))
    writer.write_part(late, 0, whole(2))
    assert_holds(path, whole(1))
    with pytest.raises(RunError, match="already exists"):
        writer.commit(late, at(5), TENSORS)
    assert_holds(path, whole(1))


def test_a_step_is_not_written_twice(folder: Address) -> None:
    save(folder, at(5), whole())
    with pytest.raises(RunError, match="already exists"):
        writer.begin(folder, 5, 1, 0)


def test_a_loss_is_added(folder: Address) -> None:
    path = save(folder, at(5), whole())
    writer.amend(path, 2.5, 2.25)
    assert read_manifest(path).header.progress.val_loss == 2.5
    assert_holds(path, whole())


def test_the_newest_and_the_best_are_kept(folder: Address) -> None:
    for step in range(1, 6):
        save(folder, at(step, val_loss=abs(step - 2.0)), whole(step))
    assert store.prune(folder, 2, keep_best=True) == []
    assert steps(folder) == [2, 4, 5]
    assert {name.partition("/")[0] for name in folder.objects()} == {f"step_{step:08d}" for step in (2, 4, 5)}


def test_the_manifest_is_deleted_first(folder: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        save(folder, at(step), whole(step))
    deleted: list[str] = []

    def interrupted(path: Address, *, missing_ok: bool = False) -> None:
        deleted.append(path.name)
        if path.name != MANIFEST:
            raise KeyboardInterrupt
        unlink(path, missing_ok=missing_ok)

    unlink = Address.unlink
    with monkeypatch.context() as patch:
        patch.setattr(Address, "unlink", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.prune(folder, 1)
    assert deleted[0] == MANIFEST
    assert steps(folder) == [2]
    assert store.remove_leftovers(folder) == []
    assert {name.partition("/")[0] for name in folder.objects()} == {"step_00000002"}


def test_one_that_is_set_aside_keeps_its_bytes(folder: Address) -> None:
    path = save(folder, at(5), whole(1))
    aside = store.set_aside(path, store.REPLACED)
    assert steps(folder) == []
    assert store.set_aside_in(folder) == [aside] == [folder / "step_00000005.replaced"]
    save(folder, at(5), whole(2))
    assert_holds(folder / "step_00000005", whole(2))
    assert isinstance(aside, Address)
    assert len(aside.objects()) == 3
    assert store.set_aside(folder / "step_00000005", store.REPLACED) == folder / "step_00000005.replaced-2"


def test_a_rollback_forgets_later_ones(folder: Address) -> None:
    for step in (1, 2, 3):
        save(folder, at(step), whole(step))
    store.forget_after(folder, 1)
    assert steps(folder) == [1]


# --- damage ----------------------------------------------------------------------------------------------------------


def test_damage_is_found(folder: Address) -> None:
    path = save(folder, at(5), whole())
    name = next(name for name in path.objects() if "weights" in name)
    content = (path / name).read_whole(1 << 20)
    (path / name).write(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DamagedError, match="SHA-256"):
        Checkpoint.open(path).verify()
    (path / name).write(content[:-1])
    with pytest.raises(DamagedError, match=r"bytes, not"):
        Checkpoint.open(path).verify()
    (path / name).unlink()
    with pytest.raises(DamagedError, match="is missing"):
        Checkpoint.open(path).verify()
    (path / MANIFEST).write(b"{}")
    with pytest.raises(DamagedError, match="is damaged"):
        read_manifest(path)
    assert not examine(path).is_whole


# --- a store that fails ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_fifth_of_the_answers_fail(server: ObjectStore, folder: Address, patient: None) -> None:
    with server.failing(0.2) as failed:
        for step in range(1, 5):
            save(folder, at(step, val_loss=float(step)), whole(step), ranks=2)
            writer.amend(folder / f"step_{step:08d}", step + 0.5, 1.5)
            assert_holds(folder / f"step_{step:08d}", whole(step))
            assert store.prune(folder, 2, keep_best=True) == []
        assert steps(folder) == [1, 3, 4]
        store.set_aside(folder / "step_00000004")
        assert steps(folder) == [1, 3]
    assert set(failed) == set(KINDS), failed
    for step in (1, 3):
        assert_holds(folder / f"step_{step:08d}", whole(step))
    assert {name.partition("/")[0] for name in folder.objects()} == {
        "step_00000001", "step_00000003", "step_00000004.damaged",
    }  # fmt: skip


def test_large_objects_are_uploaded_and_read_in_parts(
    server: ObjectStore, folder: Address, patient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(address_module, "PART_BYTES", 5 << 20)  # the smallest part that S3 takes
    pieces = [Piece("big", key, 0, torch.randn(7 << 20)) for key in KEYS]
    shapes = {f"{key}/big": (7, 1 << 20) for key in KEYS}
    with server.failing(0.2) as failed:
        begun = writer.begin(folder, 3, 1, 0)
        writer.write_part(begun, 0, pieces)
        path = writer.commit(begun, at(3), shapes)
        checkpoint = Checkpoint.open(path)
        checkpoint.verify()
        for piece in pieces:
            assert torch.equal(checkpoint.read("big", piece.key, 0, 7 << 20), piece.values)
    assert sum(failed.values()) > 5
    folder.abort_uploads()


def test_uploads_that_nobody_ended_are_dropped(folder: Address) -> None:
    import s3fs

    system = s3fs.S3FileSystem(skip_instance_cache=True)
    bucket = str(folder).split("/")[2]
    for key in ("runs/tiny/step_00000005/x", "runs/tiny2/x"):
        system.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
    store.remove_leftovers(folder)
    assert [each["Key"] for each in system.list_multipart_uploads(bucket)] == ["runs/tiny2/x"]


def test_a_store_that_stays_down_ends_the_save_and_touches_nothing(
    server: ObjectStore, folder: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(address_module, "WAITS", (0.01,))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    path = save(folder, at(1), whole(1))
    begun = writer.begin(folder, 2, 1, 0)
    server.refused = ("403 Forbidden", "AccessDenied")
    try:
        with pytest.raises(RunError) as caught:
            writer.write_part(begun, 0, whole(2))
        assert "\n" not in str(caught.value)
        assert f"checkpoint {folder}/step_00000002 cannot be written" in str(caught.value)
        assert "no earlier checkpoint was touched" in str(caught.value)
        with pytest.raises(UnreadableError, match="check the bucket, your credentials"):
            read_manifest(path)
    finally:
        server.refused = None
    begun.discard()
    assert_holds(path, whole(1))
    assert steps(folder) == [1]


# --- the start -------------------------------------------------------------------------------------------------------


def test_a_good_address_is_tried_and_left_as_it_was(folder: Address) -> None:
    try_out(folder)
    assert folder.objects() == {}


def test_what_is_wrong_with_an_address_is_said_in_a_line(
    server: ObjectStore, folder: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="checkpoint_dir s3://no-such-bucket/x cannot be used: The specified bucket"):
        try_out(Address("s3://no-such-bucket/x"))
    server.refused = ("403 Forbidden", "AccessDenied")
    try:
        with pytest.raises(InputError, match=f"checkpoint_dir {folder} cannot be used: as asked; check the bucket"):
            try_out(folder)
    finally:
        server.refused = None
    with pytest.raises(InputError, match="checkpoint_dir nothing://bucket/x cannot be read: Protocol not known"):
        try_out(Address("nothing://bucket/x"))
    with pytest.raises(
        InputError, match=r"is a web address, .* s3://BUCKET/FOLDER, with the server in AWS_ENDPOINT_URL"
    ):
        try_out(Address(f"{server.url}/bucket/x"))


@pytest.mark.parametrize("text", ["s3:", "s3://", "s3:///", "s3:/bucket/x", "hf://name/x", "s3://bucket/a,b"])
def test_half_an_address_is_not_taken_for_a_folder(text: str) -> None:
    with pytest.raises(InputError, match=f"^{text} is not an address of checkpoints; give one such as s3://"):
        place_of(text)


@pytest.mark.parametrize(
    ("text", "path"), [("a:b", "a:b"), ("./s3:", "s3:"), ("runs/a:/b", "runs/a:/b"), ("file:///x/s3:", "/x/s3:")]
)
def test_a_path_may_have_a_colon(text: str, path: str) -> None:
    assert place_of(text) == Path(path)


def test_missing_credentials_are_said_in_a_line(server: ObjectStore, folder: Address) -> None:
    program = f"""
from scalegpt.checkpoint.address import Address, try_out
from scalegpt.errors import InputError
try:
    try_out(Address({str(folder)!r}))
except InputError as error:
    print(error)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment |= {"AWS_ENDPOINT_URL": server.url, "AWS_EC2_METADATA_DISABLED": "true", "HOME": "/nonexistent"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"checkpoint_dir {folder} cannot be used: Unable to locate credentials")


# --- a process that is killed ------------------------------------------------------------------------------------------

WRITES = """
import sys
sys.path[:0] = {paths!r}
from checkpoint.samples import TENSORS, at, whole
from scalegpt.checkpoint import store, writer
from scalegpt.checkpoint.address import Address
folder = Address({folder!r})
print("ready", flush=True)
for step in range(1, 10**6):
    begun = writer.begin(folder, step, 1, 0)
    writer.write_part(begun, 0, whole(step))
    writer.commit(begun, at(step), TENSORS)
    print(step, flush=True)
    store.prune(folder, 2)
"""


@pytest.mark.slow
def test_a_killed_writer_leaves_whole_checkpoints_only(server: ObjectStore, folder: Address) -> None:
    tests = Path(__file__).parents[1]
    program = WRITES.format(paths=[str(tests), str(tests.parent)], folder=str(folder))
    with server.failing(0.2):
        for delay in (0.2, 0.9):
            for path in store.find_checkpoints(folder):
                store._delete(path)
            process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
            assert process.stdout is not None
            done = [process.stdout.readline()]
            while done[-1].strip() not in {"2", ""}:
                done.append(process.stdout.readline())
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            done += process.stdout.readlines()
            process.wait()
            process.stdout.close()
            last = int(done[-1])
            found = steps(folder)
            assert found[-1] in {last, last + 1}, (found, last)  # it may have been killed before it said so
            for step in found:
                assert_holds(folder / f"step_{step:08d}", whole(step))
            save(folder, at(found[-1] + 1), whole(found[-1] + 1))
            files = {name: json.loads((folder / name).read_whole(1 << 20))["files"] for name in folder.objects()
                     if name.endswith(MANIFEST)}  # fmt: skip
            named = {f"{name.removesuffix(MANIFEST)}{file}" for name, each in files.items() for file in each}
            assert folder.objects().keys() == named | files.keys()
