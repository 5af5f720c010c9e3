"""Checkpoints: read back exactly; what is damaged is refused by name; what is interrupted leaves nothing."""

import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scalegpt.backends.base import MOMENTS, ParameterState
from scalegpt.checkpoint import store
from scalegpt.checkpoint.store import HEADER, OPTIMIZER, WEIGHTS, Header, Progress
from scalegpt.errors import InputError, RunError

PROGRESS = Progress(
    step=7, tokens=700, val_loss=2.5, best_val_loss=2.25, skipped_steps=3, loss_scale=1024.0, good_steps=5
)


def states(seed: int = 0, *, moments: bool = True) -> Iterator[ParameterState]:
    generator = torch.Generator().manual_seed(seed)
    for name, shape in (("wte.weight", (11, 4)), ("norm.weight", (4,)), ("scalar", ())):
        drawn = [torch.randn(shape, generator=generator) for _ in range(3)]
        yield ParameterState(name, drawn[0], dict(zip(MOMENTS, drawn[1:], strict=True)) if moments else {})


def header(progress: Progress = PROGRESS) -> Header:
    return Header(progress, {"model": {"n_layer": 1}}, {"kind": "byte"}, "data's digest")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return store.save(tmp_path / "checkpoints", header(), states())


def test_what_is_saved_is_read_back(saved: Path) -> None:
    assert saved.name == "step_00000007"
    assert {path.name for path in saved.iterdir()} == {HEADER, WEIGHTS, OPTIMIZER}
    read = store.read_header(saved)
    assert (read.progress, read.config, read.tokenizer, read.data) == (
        PROGRESS, {"model": {"n_layer": 1}}, {"kind": "byte"}, "data's digest",
    )  # fmt: skip
    expected = {state.name: state for state in states()}
    for state in store.read_states(saved):
        original = expected.pop(state.name)
        assert torch.equal(state.weight, original.weight)
        assert state.moments.keys() == original.moments.keys()
        assert all(torch.equal(value, original.moments[key]) for key, value in state.moments.items())
    assert not expected
    assert {name for name, _ in store.read_weights(saved)} == {"wte.weight", "norm.weight", "scalar"}


def test_weights_without_moments_and_views_of_others(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(4, 6)
    parts = [ParameterState("turned", whole.t(), {}), ParameterState("part", whole[1:3], {})]
    read = dict(store.read_weights(store.save(tmp_path, header(), parts)))
    assert torch.equal(read["turned"], whole.t())
    assert torch.equal(read["part"], whole[1:3])
    assert all(not state.moments for state in store.read_states(tmp_path / "step_00000007"))


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(0, 10**12))
@settings(max_examples=10, deadline=None)
def test_numbers_survive_the_header_to_the_last_bit(
    tmp_path_factory: pytest.TempPathFactory, loss: float, n: int
) -> None:
    progress = Progress(step=n, tokens=n, val_loss=loss, best_val_loss=loss, loss_scale=abs(loss))
    folder = tmp_path_factory.mktemp("numbers")
    assert store.read_header(store.save(folder, header(progress), [])).progress == progress


def test_an_existing_checkpoint_is_left_as_it_is(saved: Path) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    assert store.save(saved.parent, header(), states(seed=1)) == saved
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER])
@pytest.mark.parametrize("place", [0, 30, -1])
def test_one_flipped_bit_is_noticed(saved: Path, name: str, place: int) -> None:
    content = bytearray((saved / name).read_bytes())
    content[place] ^= 1
    (saved / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name} is damaged.*delete .*step_00000007"):
        store.read_header(saved)


@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER])
def test_a_file_cut_short_emptied_or_missing_is_noticed(saved: Path, name: str) -> None:
    whole = (saved / name).read_bytes()
    for content in (whole[:-1], b""):
        (saved / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name} is damaged"):
            store.read_header(saved)
    (saved / name).unlink()
    with pytest.raises(InputError, match=f"{name} is missing"):
        store.read_header(saved)
    (saved / name).mkdir()
    with pytest.raises(InputError, match=f"{name} cannot be read: Is a directory"):
        store.read_header(saved)


def test_only_the_files_to_be_read_are_checked(saved: Path) -> None:
    (saved / OPTIMIZER).unlink()
    assert store.read_header(saved, files=(WEIGHTS,)).progress == PROGRESS
    (saved / WEIGHTS).unlink()
    with pytest.raises(InputError, match=WEIGHTS):
        store.read_header(saved, files=(WEIGHTS,))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is damaged"),
        (b'{"format"', "is damaged"),
        (b"\xff\xfe", "is damaged"),
        (b"[]", "is damaged"),
        (b"{}", "is damaged"),
        (b'{"format": "other", "version": 1}', "format other 1; known is scalegpt-checkpoint 1"),
        (b'{"format": "scalegpt-checkpoint", "version": 2}', "scalegpt-checkpoint 2"),
    ],
)
def test_a_broken_header_is_refused(saved: Path, content: bytes, words: str) -> None:
    (saved / HEADER).write_bytes(content)
    with pytest.raises(InputError) as caught:
        store.read_header(saved)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["progress", "config", "tokenizer", "files"])
def test_a_header_without_a_part_or_a_digest_is_refused(saved: Path, part: str) -> None:
    document = json.loads((saved / HEADER).read_text())
    for change in ({key: value for key, value in document.items() if key != part}, {**document, "files": {}}):
        (saved / HEADER).write_text(json.dumps(change))
        with pytest.raises(InputError, match="is damaged"):
            store.read_header(saved)


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"No such file.*is .* a checkpoint\?"):
        store.read_header(tmp_path)
    assert store.find_checkpoints(tmp_path / "absent") == []


def test_checkpoints_are_found_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for step in (100_000_000, 5, 99_999_999, 40):
        store.save(tmp_path, header(Progress(step=step, tokens=0)), [])
    for other in ("step_00000050", ".step_00000060.1.tmp", "step_x", "notes"):
        (tmp_path / other).mkdir()
    (tmp_path / "step_00000070").write_text("a file")
    steps = [int(path.name[5:]) for path in store.find_checkpoints(tmp_path)]
    assert steps == [5, 40, 99_999_999, 100_000_000]


def test_the_newest_are_kept_and_leftovers_go(tmp_path: Path) -> None:
    for step in range(1, 6):
        store.save(tmp_path, header(Progress(step=step, tokens=0)), states())
    leftover = tmp_path / ".step_00000006.123.tmp"
    leftover.mkdir()
    (leftover / WEIGHTS).write_bytes(b"half")
    (tmp_path / "mine.txt").write_text("kept")
    store.prune(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.txt", "step_00000004", "step_00000005"]
    store.prune(tmp_path, 2)
    assert len(store.find_checkpoints(tmp_path)) == 2


def test_what_is_half_deleted_does_not_pass_for_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        store.save(tmp_path, header(Progress(step=step, tokens=0)), states())

    def interrupted(path: Path) -> None:
        (path / WEIGHTS).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.prune(tmp_path, 1)
    assert [path.name for path in store.find_checkpoints(tmp_path)] == ["step_00000002"]
    store.prune(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]


def test_a_leftover_of_the_same_process_number_is_in_nobodys_way(tmp_path: Path) -> None:
    leftover = store._temporary(tmp_path / "step_00000007")
    leftover.mkdir()
    (leftover / WEIGHTS).write_bytes(b"half")
    store.read_header(store.save(tmp_path, header(), states()))
    assert not leftover.exists()


def test_an_interrupted_save_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[ParameterState]:
        yield from states()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.save(tmp_path, header(), broken())
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError) as caught:
        store.save(tmp_path / "file" / "checkpoints", header(), states())
    line = str(caught.value)
    assert "step_00000007 cannot be written: Not a directory" in line
    assert "earlier checkpoints are whole" in line
    assert "\n" not in line


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from scalegpt.backends.base import ParameterState
from scalegpt.checkpoint import store
from scalegpt.errors import RunError
folder = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
header = store.Header(store.Progress(step=2, tokens=2), {}, {})
small = {key: torch.zeros(10) for key in store.MOMENTS}
large = {key: torch.zeros(100_000) for key in store.MOMENTS}
for state in (ParameterState("w", torch.zeros(100_000), {}), ParameterState("w", torch.zeros(10), large)):
    try:
        store.save(folder, header, [state])
    except RunError as error:
        print(error)
store.save(folder, header, [ParameterState("w", torch.zeros(10), small)])
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs a limit on the size of files")
def test_a_full_disk_leaves_the_earlier_checkpoints_and_nothing_else(tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk: permissions do not bind root."""
    store.save(tmp_path, header(Progress(step=1, tokens=1)), states())
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all("step_00000002 cannot be written" in line and "File too large" in line for line in lines)
    assert all("GB free" in line for line in lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]
    for checkpoint in store.find_checkpoints(tmp_path):
        store.read_header(checkpoint)
