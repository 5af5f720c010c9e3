"""The folder of checkpoints: which there are, which stay, and that half of one never passes for one."""

from pathlib import Path

import pytest

from checkpoint.samples import at, save
from scalegpt.checkpoint import store
from scalegpt.checkpoint.reader import Checkpoint


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
