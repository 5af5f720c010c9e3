"""The run's directory: whose it is, what a resumed run may change, and what it keeps of an interrupted one's files."""

import errno
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from scalegpt.config import RunConfig
from scalegpt.config.presets import as_file, resolve
from scalegpt.errors import InputError, RunError
from scalegpt.training.runs.directory import STARTED_BY, RunDirectory
from scalegpt.training.runs.files import finite, write_whole, writing
from scalegpt.training.runs.metrics_file import read_history
from scalegpt.training.runs.records import Past
from stretches import of_one_file

STRETCH = of_one_file(1, 0, 4, 32, 3, 1000, "train.bin", "digest", "start")


def run(**flags: Any) -> RunConfig:
    return resolve(flags=flags, name="run")


def forget(directory: RunDirectory, step: int) -> None:
    directory.forget_after(read_history(directory.metrics, step, spike_window=4))


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    made = RunDirectory(tmp_path / "run")
    made.create(run(precision="bf16", tokens_per_step=4096), {"steps": 3})
    return made


# --- whose it is -----------------------------------------------------------------------------------------------------


def test_a_new_or_an_empty_folder_is_the_runs_own(tmp_path: Path) -> None:
    assert RunDirectory.choose(tmp_path, run(), fresh=False).path == tmp_path / "run"
    (tmp_path / "run").mkdir()
    assert RunDirectory.choose(tmp_path, run(), fresh=True).path == tmp_path / "run"


def test_the_same_run_gets_its_folder_back(directory: RunDirectory, tmp_path: Path) -> None:
    same = run(precision="bf16", tokens_per_step=4096)
    assert RunDirectory.choose(tmp_path, same, fresh=False).path == directory.path


def test_fresh_takes_the_next_free_number(directory: RunDirectory, tmp_path: Path) -> None:
    assert RunDirectory.choose(tmp_path, run(), fresh=True).path.name == "run-2"
    (tmp_path / "run-2").mkdir()
    (tmp_path / "run-2" / "notes.txt").touch()
    (tmp_path / "run-3").touch()
    assert RunDirectory.choose(tmp_path, run(), fresh=True).path.name == "run-4"


def test_fresh_takes_what_an_interrupted_start_left_and_not_what_another_is_starting(tmp_path: Path) -> None:
    other = RunDirectory(tmp_path / "run")
    other.lock()
    assert RunDirectory.choose(tmp_path, run(), fresh=True).path.name == "run-2"
    other.unlock()
    assert RunDirectory.choose(tmp_path, run(), fresh=True).path.name == "run"


KILLED_STATUS, EVENTS = 9, frozenset({"open", "os.mkdir", "os.rename", "os.remove"})


def begin_and_die(root: Path, at: int, marks: dict[str, str]) -> bool:
    """Begin a run in another process that ends at its file operation of that number; whether it came as far."""
    child = os.fork()
    if child == 0:
        left = [at]

        def die(event: str, arguments: tuple[Any, ...]) -> None:
            if event in EVENTS and isinstance(arguments[0], str | os.PathLike) and str(root) in str(arguments[0]):
                left[0] -= 1
                if left[0] == 0:
                    os._exit(KILLED_STATUS)

        sys.addaudithook(die)
        begin(root, marks)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == KILLED_STATUS


def begin(root: Path, marks: dict[str, str], *, fresh: bool = False) -> RunDirectory:
    """What preparing a run does to its folder."""
    made = RunDirectory.choose(root, run(), fresh=fresh)
    made.lock()
    made.create(run(), {"steps": 3}, marks)
    forget(made, 0)
    made.ledger.append(STRETCH)
    made.unlock()
    return made


@pytest.mark.parametrize("fresh", [False, True])
def test_a_start_that_is_killed_at_any_file_operation_can_be_repeated(tmp_path: Path, fresh: bool) -> None:
    marks = {"agent": "one"}
    for at in range(1, 100):
        root = tmp_path / str(at)
        if not begin_and_die(root, at, marks):
            break
        begun = begun_by(root, marks) if fresh else None
        again = begin(root, {"agent": "one"}, fresh=fresh and begun is None)
        assert again.path == root / "run", at
        assert again.read_config() == as_file(run())
        assert again.ledger.read() == [STRETCH]
        assert (again.read_plan(), again.read_id() is None) == ({"steps": 3}, False)
        assert json.loads((again.path / STARTED_BY).read_text()) == marks
    assert at > 10


def begun_by(root: Path, marks: dict[str, str]) -> str | None:
    """What a launcher's restart would resume of the run."""
    path = root / "run" / STARTED_BY
    return "run" if path.is_file() and json.loads(path.read_text()) == marks else None


def test_a_start_that_meets_a_full_disk_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, left = Path.replace, [0]

    def full(path: Path, target: Path) -> Path:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, target)

    monkeypatch.setattr(Path, "replace", full)
    for at in range(1, 5):
        left[0] = at
        with pytest.raises(InputError, match="no disk space is left"):
            begin(tmp_path / str(at), {"agent": "one"})
        assert [each.name for each in (tmp_path / str(at) / "run").iterdir()] == [".lock"]
        left[0] = 0
        assert begin(tmp_path / str(at), {"agent": "one"}).read_config() == as_file(run())


def test_the_differences_to_another_run_are_shown(directory: RunDirectory, tmp_path: Path) -> None:
    other = run(precision="bf16", tokens_per_step=4096, n_layer=9, learning_rate=0.5)
    with pytest.raises(InputError, match=r"n_layer: 4 → 9, learning_rate: 0.001 → 0.5; choose another") as caught:
        RunDirectory.choose(tmp_path, other, fresh=False)
    assert "more" not in str(caught.value)
    many = run(n_layer=9, n_embd=8, n_head=1, block_size=5, vocab_size=7, dropout=0.5, seed=5, beta1=0.5)
    with pytest.raises(InputError, match=r"dropout: 0.0 → 0.5 and 4 more; choose another"):
        RunDirectory.choose(tmp_path, many, fresh=False)


def test_a_folder_without_a_run_or_with_a_broken_configuration_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").touch()
    with pytest.raises(InputError, match="holds no run; choose another --model_name"):
        RunDirectory.choose(tmp_path, run(), fresh=False)
    for content in (b"a: [", b"\xff", b"", b"text", b"train: 3"):
        (tmp_path / "run" / "config.yaml").write_bytes(content)
        with pytest.raises(InputError, match=r"config.yaml.*; delete it to use .*, or --fresh") as caught:
            RunDirectory.choose(tmp_path, run(), fresh=False)
        assert "\n" not in str(caught.value)


def test_a_file_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    for fresh in (True, False):
        with pytest.raises(InputError, match="cannot hold a run: Not a directory"):
            RunDirectory.choose(tmp_path, run(), fresh=fresh)


# --- what an earlier process settled ---------------------------------------------------------------------------------


def test_what_was_left_open_stays_as_it_was_settled(directory: RunDirectory) -> None:
    settled = directory.with_earlier_settings(run()).train
    assert (settled.precision, settled.tokens_per_step) == ("bf16", 4096)


def test_what_is_given_is_not_overruled(directory: RunDirectory) -> None:
    given = directory.with_earlier_settings(run(precision="fp32", tokens_per_step=512)).train
    assert (given.precision, given.tokens_per_step) == ("fp32", 512)


def test_a_run_that_began_with_two_lengths_keeps_both(tmp_path: Path) -> None:
    """Earlier releases let the default, or a preset's length, cut the one that was given."""
    made = RunDirectory(tmp_path / "run")
    made.create(run(precision="bf16", max_iters=1000, max_tokens=10**9), {"steps": 1000})
    again = made.with_earlier_settings(run(max_tokens=10**9), frozenset({"max_tokens"})).train
    assert (again.max_iters, again.max_tokens) == (1000, 10**9)
    steps = made.with_earlier_settings(run(max_iters=1000), frozenset({"max_iters"})).train
    assert (steps.max_iters, steps.max_tokens) == (1000, 10**9)
    longer = made.with_earlier_settings(run(max_tokens=2 * 10**9), frozenset({"max_tokens"})).train
    assert (longer.max_iters, longer.max_tokens) == (None, 2 * 10**9)
    flags = {"max_iters": None, "max_tokens": 10**9}
    lifted = made.with_earlier_settings(run(**flags), frozenset(flags)).train
    assert (lifted.max_iters, lifted.max_tokens) == (None, 10**9)


def test_without_an_earlier_run_nothing_is_settled(tmp_path: Path) -> None:
    assert RunDirectory(tmp_path / "new").with_earlier_settings(run()) == run()
    (tmp_path / "file").touch()
    assert RunDirectory(tmp_path / "file").with_earlier_settings(run()) == run()


# --- its files -------------------------------------------------------------------------------------------------------


def test_the_configuration_that_is_written_is_the_run(directory: RunDirectory) -> None:
    again = resolve(config_file=str(directory.config))
    assert again == replace(run(precision="bf16", tokens_per_step=4096), name="run")
    assert yaml.safe_load(directory.config.read_text()) == as_file(again)
    assert json.loads(directory.plan.read_text()) == {"steps": 3}


def test_what_cannot_be_created_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written: Not a directory; choose another place"):
        RunDirectory(tmp_path / "file" / "run").create(run(), {})


def test_the_status_is_json_even_without_numbers(directory: RunDirectory) -> None:
    assert directory.read_state() is None
    directory.write_status(state="failed", val_loss=float("nan"), best_val_loss=float("inf"), step=3)
    assert json.loads(directory.status.read_text(), parse_constant=pytest.fail) == {
        "checkpoint_step": None, "state": "failed", "val_loss": None, "best_val_loss": None, "step": 3,
    }  # fmt: skip
    assert directory.read_state() == "failed"
    directory.status.write_text("[]")
    assert directory.read_state() is None


def test_the_status_has_the_newest_checkpoint_and_remembers_one_that_is_gone(directory: RunDirectory) -> None:
    directory.write_status(state="running")
    assert directory.read_past().newest is None
    saved = directory.checkpoints / "step_00000010"
    saved.mkdir()
    directory.amend_status(step=11)
    assert (directory.read_state(), directory.read_past().newest) == ("running", 10)
    saved.rename(directory.path / "elsewhere")
    directory.amend_status(state="failed")
    assert (directory.read_state(), directory.read_past().newest) == ("failed", 10)


@pytest.mark.parametrize(("status", "told"), [("broken", False), ("{}", False), ('{"checkpoint_step": null}', True)])
def test_the_past_is_what_the_files_say(directory: RunDirectory, status: str, told: bool) -> None:
    assert directory.read_past() == Past(None, has_status=False, last_step=0, was_begun=True)
    directory.status.write_text(status)
    directory.metrics.write_text('{"step": 1, "loss": 1}\n{"step": 2, "loss": 1}\n{"step": 2, "val_loss": 1}\n{"st')
    assert directory.read_past() == Past(None, has_status=told, last_step=2, was_begun=True)
    directory.config.unlink()
    assert not directory.read_past().was_begun


def test_what_the_files_should_tell_and_do_not_is_missed(directory: RunDirectory) -> None:
    assert directory.gaps(read_history(directory.metrics, 0, 4)) == []
    directory.metrics.write_text("".join(f'{{"step": {step}, "loss": 1}}\n' for step in (1, 2, 5)))
    metrics, ledger = directory.gaps(read_history(directory.metrics, 6, 4))
    assert "metrics.jsonl lacks 3 of the 6 steps, from step 3 on, so the report lacks them too" in metrics
    assert "data_ledger.jsonl lacks steps 1 to 6, so it is unknown which data" in ledger
    directory.ledger.append(STRETCH)
    assert directory.gaps(read_history(directory.metrics, 2, 4)) == []


def test_a_step_of_any_size_is_missed_at_once(directory: RunDirectory) -> None:
    directory.metrics.write_text('{"step": 1, "loss": 1}\n{"step": 1e300, "loss": 1}\n')
    metrics, _ = directory.gaps(read_history(directory.metrics, 2**63 - 1, 4))
    assert "lacks 9,223,372,036,854,775,806 of the 9,223,372,036,854,775,807 steps, from step 2 on" in metrics


def test_a_missing_configuration_is_that_of_the_newest_checkpoint(tiny_run: Callable[..., Path]) -> None:
    directory = RunDirectory(tiny_run(steps=(10,)))
    older = tiny_run("other", steps=(5,), train={"learning_rate": 0.5}) / "checkpoints" / "step_00000005"
    older.rename(directory.checkpoints / older.name)
    assert not directory.config.exists()
    old, new = (
        json.loads((directory.checkpoints / name / "checkpoint.json").read_text())["config"]
        for name in ("step_00000005", "step_00000010")
    )
    assert old != new
    assert directory.read_config() == new
    (directory.checkpoints / "step_00000010" / "checkpoint.json").write_text("broken")
    assert directory.read_config() == old


def test_all_changes_are_told_the_deciding_ones_first(directory: RunDirectory) -> None:
    directory.plan.write_text('{"ranks": 2}')
    other = run(precision="bf16", tokens_per_step=4096, max_iters=7, schedule="constant", backend="fsdp")
    assert list(directory.changes(other, ranks=1).items())[:2] == [
        ("schedule", "cosine → constant"),
        ("ranks", "2 → 1"),
    ]
    assert directory.changes(other, ranks=1).keys() == {"schedule", "ranks", "max_iters", "backend"}
    assert RunDirectory(directory.path / "none").changes(other, ranks=1) == {}


def test_what_began_a_run_is_kept(directory: RunDirectory) -> None:
    assert not (directory.path / STARTED_BY).exists()
    new = RunDirectory(directory.path.with_name("new"))
    new.create(run(), {}, {"agent": "one"})
    new.create(run(), {}, {"agent": "two"})
    assert json.loads((new.path / STARTED_BY).read_text()) == {"agent": "one"}


def test_files_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    write_whole(path, "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(OSError, match="No space"):
            write_whole(path, "new")
    assert [each.name for each in tmp_path.iterdir()] == ["file.json"]
    assert path.read_text() == "old"


def test_an_error_of_the_disk_names_the_file() -> None:
    told = pytest.raises(RunError, match=r"metrics.jsonl cannot be written: No space left on device; free disk space")
    with told, writing(Path("metrics.jsonl")):
        raise OSError(28, "No space left on device")


def test_metrics_of_steps_to_come_again_are_forgotten(directory: RunDirectory) -> None:
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(1, 8)]
    lines.insert(4, json.dumps({"step": 4, "val_loss": 1.0}))
    lines.insert(8, json.dumps({"step": 7, "val_loss": 1.0}))
    directory.metrics.write_text("\n".join(lines) + '\n{"step": 3, "los')
    forget(directory, 4)
    kept = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
    assert [line["step"] for line in kept] == [1, 2, 3, 4, 4]
    before = directory.metrics.stat().st_ino
    forget(directory, 4)
    assert directory.metrics.stat().st_ino == before  # a file that is written anew is another one


@pytest.mark.parametrize("damage", ["\0\0\0\n", "[]\n", "{}\n", "\xff\n", "null\n", '{"step": "x"}\n'])
def test_a_damaged_line_of_metrics_is_dropped(directory: RunDirectory, damage: str) -> None:
    line = '{"step": 1}\n'
    directory.metrics.write_bytes(line.encode() + damage.encode("latin-1") + line.encode())
    forget(directory, 1)
    assert directory.metrics.read_text() == line * 2


def test_samples_are_read_back_and_forgotten(directory: RunDirectory) -> None:
    assert directory.read_samples() == []
    texts = [(5, "one\n\ntwo --- step 3\n"), (10, ""), (15, "è � <b>\n")]
    for step, text in texts:
        directory.add_sample(step, text)
    assert directory.read_samples() == texts
    forget(directory, 10)
    assert directory.read_samples() == texts[:2]
    forget(directory, 0)
    assert directory.samples.read_text() == ""


def test_nothing_to_forget(directory: RunDirectory) -> None:
    forget(directory, 0)
    assert not directory.metrics.exists()
    assert not directory.samples.exists()


@pytest.mark.parametrize(
    ("value", "kept"), [(1.5, 1.5), (float("inf"), None), (float("nan"), None), (3, 3), ("x", "x"), (None, None)]
)
def test_only_finite_numbers_are_kept(value: Any, kept: Any) -> None:
    assert finite(value) == kept
