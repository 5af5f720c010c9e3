"""The folder of checkpoints: which there are, which stay, and that half of one never passes for one."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from checkpoint.samples import at, save
from scalegpt import storage
from scalegpt.checkpoint import store
from scalegpt.checkpoint.manifest import MisnamedError, UnreadableError
from scalegpt.checkpoint.reader import Checkpoint, read_manifest


def kept(folder: Path) -> list[int]:
    return [store.step_of(path) for path in store.find_checkpoints(folder)]


def test_checkpoints_are_found_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for step in (100_000_000, 5, 99_999_999, 40):
        save(tmp_path, at(step))
    for other in (".step_00000060.1.tmp", "step_x", "step_5", "step_00000005.damaged", "notes"):
        (tmp_path / other).mkdir()
    (tmp_path / "step_00000070").write_text("a file")
    assert kept(tmp_path) == [5, 40, 99_999_999, 100_000_000]
    assert store.find_checkpoints(tmp_path / "absent") == []


def test_one_without_a_manifest_is_one_that_lost_it(tmp_path: Path) -> None:
    (tmp_path / "step_00000050").mkdir()
    assert kept(tmp_path) == [50]
    assert store.is_checkpoint(tmp_path / "step_00000050")
    assert not store.is_checkpoint(tmp_path)


def test_the_newest_are_kept_and_leftovers_go(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, at(step))
    (tmp_path / ".step_00000006.123.tmp").mkdir()
    (tmp_path / ".step_00000006.123.tmp" / "half").write_bytes(b"half")
    (tmp_path / "mine.txt").write_text("kept")
    for _ in range(2):
        store.prune(tmp_path, 2)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.txt", "step_00000004", "step_00000005"]


def test_the_best_is_kept_too(tmp_path: Path) -> None:
    losses = {1: 3.0, 2: 2.0, 3: 2.0, 4: None, 5: 2.5, 6: 2.25}
    for step, loss in losses.items():
        save(tmp_path, at(step, val_loss=loss))
    assert store.best_checkpoint(store.find_checkpoints(tmp_path)) == tmp_path / "step_00000002"
    store.prune(tmp_path, 2, keep_best=True)
    assert kept(tmp_path) == [2, 5, 6]
    store.prune(tmp_path, 2)
    assert kept(tmp_path) == [5, 6]


def test_a_damaged_one_is_not_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, at(step, val_loss=float(step)))
    (tmp_path / "step_00000001" / "checkpoint.json").write_text("{}")
    store.prune(tmp_path, 1, keep_best=True)
    assert kept(tmp_path) == [2, 3]
    assert store.best_checkpoint([]) is None


def test_what_is_half_deleted_does_not_pass_for_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        save(tmp_path, at(step))

    def interrupted(path: Path) -> None:
        (path / "rank_00000.weights.safetensors").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.prune(tmp_path, 1)
    assert kept(tmp_path) == [2]
    store.prune(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]


def test_what_is_set_aside_is_a_checkpoint_no_more_and_still_there(tmp_path: Path) -> None:
    for expected in ("step_00000007.damaged", "step_00000007.damaged-2", "step_00000007.damaged-3"):
        aside = store.set_aside(save(tmp_path))
        assert aside.name == expected
        assert kept(tmp_path) == []
        Checkpoint.open(aside).verify()


# --- what others did to the folder -----------------------------------------------------------------------------------


def test_a_checkpoint_under_another_steps_name_is_damage_and_counts_for_nothing(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, at(step))
    shutil.copytree(tmp_path / "step_00000001", tmp_path / "step_00000099")
    with pytest.raises(
        MisnamedError, match=r"step_00000099 is damaged: its name .*; rename it to step_00000001 to use it"
    ):
        Checkpoint.open(tmp_path / "step_00000099")
    assert store.prune(tmp_path, 2) == []
    assert kept(tmp_path) == [2, 3, 99], "it pushes nothing out"
    (tmp_path / "step_00000003").rename(tmp_path / "step_00000001")
    save(tmp_path, at(4))
    store.prune(tmp_path, 1)
    assert kept(tmp_path) == [1, 4, 99], "what may be the only copy of a step is not deleted"


def test_a_name_of_the_step_in_other_digits_is_another_name(tmp_path: Path) -> None:
    save(tmp_path, at(7)).rename(tmp_path / "step_0000000007")
    with pytest.raises(MisnamedError, match="rename it to step_00000007"):
        Checkpoint.open(tmp_path / "step_0000000007")


def test_a_copy_may_have_a_name_without_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = save(tmp_path, at(7)).rename(tmp_path / "copy")
    Checkpoint.open(copy).verify()
    monkeypatch.chdir(copy)
    Checkpoint.open(Path()).verify()
    shutil.copytree(copy, tmp_path / "step_00000008")
    monkeypatch.chdir(tmp_path / "step_00000008")
    with pytest.raises(MisnamedError):
        Checkpoint.open(Path())


@pytest.mark.parametrize("broken", [False, True])
def test_a_link_is_followed_and_never_in_the_way(tmp_path: Path, broken: bool) -> None:
    folder, elsewhere = tmp_path / "checkpoints", tmp_path / "other disk"
    shutil.move(save(folder, at(1)), elsewhere)
    (folder / "step_00000001").symlink_to("nowhere" if broken else elsewhere)
    assert kept(folder) == ([] if broken else [1])
    if not broken:
        Checkpoint.open(folder / "step_00000001").verify()
    for step in (2, 3):
        save(folder, at(step))
        assert store.prune(folder, 1) == []
    assert kept(folder) == [3]
    assert [path.name for path in folder.iterdir() if path.name != "step_00000001"] == ["step_00000003"]
    Checkpoint.open(elsewhere).verify()  # of a link, the link alone is deleted


def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "checkpoints").symlink_to("disk")
    for step in (1, 2):
        save(tmp_path / "checkpoints", at(step))
    store.prune(tmp_path / "checkpoints", 1)
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["step_00000002"]
    assert (tmp_path / "checkpoints").is_symlink()


def test_leftovers_may_be_files_and_links(tmp_path: Path) -> None:
    target = save(tmp_path / "target", at(1))
    (tmp_path / ".step_00000001.deleted.tmp").symlink_to(target)
    (tmp_path / ".step_00000002.abc.tmp").write_text("a file")
    assert store.remove_leftovers(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    Checkpoint.open(target).verify()


def test_what_cannot_be_deleted_is_told_and_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3):
        save(tmp_path, at(step))

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    problems = store.prune(tmp_path, 1)
    assert problems == [
        f"{tmp_path}/.step_0000000{step}.deleted.tmp cannot be deleted: Permission denied" for step in (1, 2)
    ]
    assert kept(tmp_path) == [3]
    save(tmp_path, at(4))
    assert kept(tmp_path) == [3, 4]


# --- a disk that fails for a while -----------------------------------------------------------------------------------


@pytest.fixture
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "RETRY_SECONDS", (0.0, 0.0))


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM])
def test_a_folder_that_cannot_be_read_is_not_one_without_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_waits: None, code: int
) -> None:
    save(tmp_path, at(1))

    def refuse(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UnreadableError, match=f"{tmp_path} cannot be read: {os.strerror(code)}; "):
        store.find_checkpoints(tmp_path)


def test_a_listing_that_fails_once_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_waits: None
) -> None:
    save(tmp_path, at(1))
    real, left = os.scandir, [2]

    def flaky(*arguments: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(*arguments)

    monkeypatch.setattr(os, "scandir", flaky)
    assert kept(tmp_path) == [1]


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
def test_what_cannot_be_read_may_be_the_best_and_is_not_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_waits: None, code: int
) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, at(step, val_loss=float(step)))
    real = os.open

    def refuse(path: Any, *arguments: Any, **options: Any) -> int:
        if "step_00000001" in str(path):
            raise OSError(code, os.strerror(code))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    store.prune(tmp_path, 1, keep_best=True)
    assert kept(tmp_path) == [1, 2, 4]
    monkeypatch.undo()
    assert store.best_checkpoint(store.find_checkpoints(tmp_path)) == tmp_path / "step_00000001"
    read_manifest(tmp_path / "step_00000001")
