"""Saving during training: the state at the call is saved; all ranks raise a failure at the next step."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from backends.canonical import Whole, digest, drawn, gathered, reader
from backends.parity_worker import make
from checkpoint.samples import at
from ranks import run_ranks
from scalegpt.backends import Backend, World
from scalegpt.checkpoint import saver as saver_module
from scalegpt.checkpoint import writer
from scalegpt.checkpoint.reader import Checkpoint
from scalegpt.checkpoint.saver import Evaluation, Keeping, Saver, SpoiledError
from scalegpt.checkpoint.store import find_checkpoints, step_of
from scalegpt.config.presets import resolve
from scalegpt.errors import RunError
from scalegpt.hardware.machine import Machine
from scalegpt.planner.batches import BatchPlan
from scalegpt.planner.plan import make_plan
from scalegpt.planner.time.calibration import Calibration

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
SHAPE = {"n_layer": 1, "n_embd": 12, "n_head": 2, "block_size": 8, "vocab_size": 31, "precision": "fp32"}


@pytest.fixture
def backend(one_thread: None) -> Backend:
    made = make(resolve(flags=SHAPE), ALONE, 1)
    made.load_pieces(reader(drawn(made, seed=1)), steps=3)
    return made


@pytest.fixture
def saver(backend: Backend, tmp_path: Path) -> Iterator[Callable[..., Saver]]:
    """A factory of savers into one folder."""
    made = []

    def new(*, newest: int = 9, best: bool = False, asynchronous: bool = True) -> Saver:
        made.append(Saver(backend, tmp_path, Keeping(newest, best), asynchronous=asynchronous))
        return made[-1]

    yield new
    for each in made:
        each.close(10)


def stored(checkpoint: Path) -> Whole:
    opened = Checkpoint.open(checkpoint)
    opened.verify()
    state = {}
    for entry, tensor in opened.manifest.tensors.items():
        key, _, name = entry.partition("/")
        state[name, key] = opened.read(name, key, 0, sum(piece.count for piece in tensor.pieces))
    return state


class Gate:
    """Holds the writer up until it is opened, or lets it fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.open, self.error = threading.Event(), threading.Event(), None
        real = writer.write_part

        def gated(*arguments: Any) -> None:
            self.reached.set()
            assert self.open.wait(30)
            if self.error is not None:
                raise self.error
            real(*arguments)

        monkeypatch.setattr(writer, "write_part", gated)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_what_is_saved_is_the_state_at_the_call(
    saver: Callable[..., Saver], backend: Backend, gate: Gate, tmp_path: Path
) -> None:
    before, one = digest(gathered(backend)), saver()
    one.save(at(1))
    assert gate.reached.wait(30)
    backend.load_pieces(reader(drawn(backend, seed=2)), steps=4)
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    backend.micro_step(tokens, tokens, last=True)
    backend.step(1e-2)
    after = digest(gathered(backend))
    assert after != before
    assert find_checkpoints(tmp_path) == []
    gate.open.set()
    one.finish()
    assert one.committed() == [tmp_path / "step_00000001"]
    assert one.committed() == []
    assert digest(stored(tmp_path / "step_00000001")) == before
    one.save(at(2))
    one.finish()
    assert digest(stored(tmp_path / "step_00000002")) == after
    assert digest(stored(tmp_path / "step_00000001")) == before


def test_one_save_at_a_time(saver: Callable[..., Saver], gate: Gate, tmp_path: Path) -> None:
    one = saver()
    one.save(at(1))
    assert gate.reached.wait(30)
    threading.Timer(0.2, gate.open.set).start()
    one.save(at(2))  # returns no sooner than the first is complete
    assert step_of(find_checkpoints(tmp_path)[0]) == 1
    one.finish()
    assert [step_of(path) for path in one.committed()] == [1, 2]


@pytest.mark.parametrize("prepared", [True, False])
def test_the_room_for_the_copy_is_used_again(saver: Callable[..., Saver], prepared: bool) -> None:
    one = saver()
    rooms = set()
    if prepared:
        one.prepare()
        assert one.copy.is_ready
        rooms.add(one.copy._memory.data_ptr())
    for step in (1, 2, 3):
        one.save(at(step))
        one.finish()
        rooms.add(one.copy._memory.data_ptr())
    assert len(rooms) == 1


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RunError("checkpoint X cannot be written: no space"), "checkpoint X cannot be written: no space"),
        (ValueError("odd"), r"step_00000001 cannot be written: ValueError\('odd'\)"),
    ],
)
def test_a_failure_is_known_and_raised_when_asked_for(
    saver: Callable[..., Saver], gate: Gate, tmp_path: Path, error: Exception, words: str
) -> None:
    one, gate.error = saver(), error
    one.save(at(1))
    assert not one.failed
    gate.open.set()
    wait_until(lambda: one.failed)
    with pytest.raises(RunError, match=words):
        one.raise_failure()
    assert list(tmp_path.iterdir()) == []
    assert not one.failed
    gate.error = None
    one.save(at(1))
    one.finish()
    assert one.committed() == [tmp_path / "step_00000001"]


def test_the_next_save_raises_the_failure_of_the_one_before(saver: Callable[..., Saver], gate: Gate) -> None:
    one, gate.error = saver(), RunError("full")
    one.save(at(1))
    gate.open.set()
    with pytest.raises(RunError, match="full"):
        one.save(at(2))


def test_synchronous_saves_are_complete_and_fail_at_once(
    saver: Callable[..., Saver], gate: Gate, tmp_path: Path
) -> None:
    one = saver(asynchronous=False)
    gate.open.set()
    one.save(at(1))
    assert find_checkpoints(tmp_path) == one.committed() == [tmp_path / "step_00000001"]
    assert one.copy._memory.numel() == 0
    gate.error = RunError("full")
    with pytest.raises(RunError, match="full"):
        one.save(at(2))


def test_a_save_that_is_waited_for_needs_no_copy(saver: Callable[..., Saver], tmp_path: Path) -> None:
    one = saver()
    one.save(at(1), wait=True)
    assert one.committed() == [tmp_path / "step_00000001"]
    assert not one.copy.is_ready


def test_without_memory_for_the_copy_the_save_is_waited_for(
    saver: Callable[..., Saver], backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, size = saver(), writer.bytes_of(backend.pieces())
    monkeypatch.setattr(saver_module, "available_bytes", lambda: int(1.25 * size))
    one.prepare()
    assert not one.copy.is_ready
    one.save(at(1))
    assert one.lacks_memory
    assert one.committed() == [tmp_path / "step_00000001"]
    monkeypatch.setattr(saver_module, "available_bytes", lambda: int(1.25 * size) + 1)
    one.save(at(2))
    assert not one.lacks_memory
    monkeypatch.setattr(saver_module, "available_bytes", lambda: 0)  # now the room is made
    one.save(at(3))
    assert not one.lacks_memory


def test_the_newest_and_the_best_stay(saver: Callable[..., Saver], tmp_path: Path) -> None:
    one = saver(newest=1, best=True)
    for step, loss in ((1, 3.0), (2, 2.0), (3, 2.5), (4, 2.75)):
        one.save(at(step, val_loss=loss))
        one.confirm(step)
    one.finish()
    assert [step_of(path) for path in find_checkpoints(tmp_path)] == [2, 4]


def test_nothing_is_deleted_before_the_newest_has_proven_good(saver: Callable[..., Saver], tmp_path: Path) -> None:
    one = saver(newest=1)
    for step in (1, 2, 3):
        one.save(at(step), wait=True)
    assert [step_of(path) for path in find_checkpoints(tmp_path)] == [1, 2, 3]
    one.confirm(2)
    assert [step_of(path) for path in find_checkpoints(tmp_path)] == [1, 2, 3]
    one.confirm(3)
    assert [step_of(path) for path in find_checkpoints(tmp_path)] == [3]


def test_what_proves_good_while_it_is_written_is_deleted_for_by_the_thread(
    saver: Callable[..., Saver], gate: Gate, tmp_path: Path
) -> None:
    one = saver(newest=1)
    gate.open.set()
    one.save(at(1), wait=True)
    gate.open.clear()
    one.save(at(2))
    one.confirm(2)
    gate.open.set()
    one.finish()
    assert [step_of(path) for path in find_checkpoints(tmp_path)] == [2]


def test_what_an_earlier_process_did_not_delete_goes_when_the_resumed_one_proves_good(
    saver: Callable[..., Saver], tmp_path: Path
) -> None:
    for step in (1, 2, 3):
        saver().save(at(step), wait=True)
    one = saver(newest=2)
    one.resumed_from(tmp_path / "step_00000003")
    one.confirm(3)
    assert [step_of(path) for path in find_checkpoints(tmp_path)] == [2, 3]
    one.confirm(30)
    one.resumed_from(tmp_path / "step_00000002")  # the run went back: what was proven before says nothing any more
    one.save(at(20), wait=True)
    assert [step_of(path) for path in find_checkpoints(tmp_path)] == [2, 3, 20]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["weight", "exp_avg", "exp_avg_sq"])
def test_a_state_that_is_not_finite_is_not_saved(
    saver: Callable[..., Saver], backend: Backend, tmp_path: Path, value: float, key: str
) -> None:
    one = saver()
    piece = list(backend.held((key,)))[-1]
    before = piece.values.view(-1)[-1].item()
    piece.values.view(-1)[-1] = value
    with pytest.raises(
        SpoiledError, match=f"{key} of {piece.name} is not finite after step 1, so no checkpoint is written"
    ):
        one.save(at(1))
    assert list(tmp_path.iterdir()) == []
    piece.values.view(-1)[:] = 3e38  # whose sum is infinite
    one.save(at(3))
    one.finish()
    assert one.committed() == [tmp_path / "step_00000003"]
    piece.values.view(-1)[-1] = before
    one.save(at(2))
    one.finish()
    assert one.committed() == [tmp_path / "step_00000002"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_checkpoint_learns_its_held_out_loss_whichever_comes_first(
    saver: Callable[..., Saver], gate: Gate, tmp_path: Path, when: str
) -> None:
    one, path = saver(), tmp_path / "step_00000001"
    if when == "after":
        gate.open.set()
    one.save(at(1, best_val_loss=3.0), wait=when == "after")
    one.amend(Evaluation(1, 2.5, 2.5))
    gate.open.set()
    one.finish()
    checkpoint = Checkpoint.open(path)
    checkpoint.verify()
    progress = checkpoint.manifest.header.progress
    assert (progress.val_loss, progress.best_val_loss) == (2.5, 2.5)
    assert checkpoint.manifest.header == replace(at(1), progress=progress)
    assert sorted(each.name for each in path.iterdir()) == ["checkpoint.json", *sorted(checkpoint.manifest.files)]
    one.amend(Evaluation(9, 1.0, 1.0))  # of no checkpoint
    one.save(at(2), wait=True)
    assert Checkpoint.open(tmp_path / "step_00000002").manifest.header.progress.val_loss is None


def test_what_cannot_begin_is_raised_at_once(saver: Callable[..., Saver], tmp_path: Path) -> None:
    one = saver()
    (tmp_path / "step_00000001").mkdir()
    with pytest.raises(RunError, match="a checkpoint of that step already exists"):
        one.save(at(1))
    one.finish()


def test_leaving_waits_so_long_and_no_longer(saver: Callable[..., Saver], gate: Gate, tmp_path: Path) -> None:
    patient, hasty = saver(), saver()
    patient.save(at(1))
    threading.Timer(0.1, gate.open.set).start()
    patient.close(30)
    assert len(find_checkpoints(tmp_path)) == 1
    gate.open.clear()
    hasty.save(at(2))
    hasty.close(0.01)
    gate.open.set()
    assert hasty._thread is not None
    hasty._thread.join()
    assert len(find_checkpoints(tmp_path)) == 1, "what was given up is not committed"


def test_a_failure_of_one_rank_is_raised_by_all(tmp_path: Path) -> None:
    """On either of two ranks, found by the loop, by the next save, or at once; the first rank does not wait in vain."""
    found = run_ranks(
        Path(__file__).with_name("saver_worker.py"), 2, {"shape": SHAPE, "folder": str(tmp_path / "out")}, tmp_path
    )
    for case in (f"rank {rank}, {how}" for rank in (0, 1) for how in ("loop", "next save", "waiting")):
        lines, left, seconds = found[case]
        assert len(lines) == 2
        assert lines[0] == lines[1]
        assert "step_00000001 cannot be written: No space left on device" in lines[0]
        assert left == []
        assert seconds < 60, "no rank waited for a part that would never come"
    assert found["after"] == ["step_00000002"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_copy_takes_what_the_planner_says(tmp_path: Path, one_thread: None, optimizer: str) -> None:
    run = resolve(flags={**SHAPE, "optimizer": optimizer, "micro_batch": 1})
    one = Saver(make(run, ALONE, 1), tmp_path, Keeping(9, False), asynchronous=True)
    one.copy.take(list(one.backend.pieces()))
    plan = make_plan(run, Machine(), BatchPlan(1, 1, 1, run.model.block_size), Calibration())
    assert one.copy._memory.nbytes == plan.checkpoint_copy_bytes
    without = replace(run, train=run.train.changed(async_checkpoint=False))
    assert replace(plan, run=without).checkpoint_copy_bytes == 0
    one.close()
