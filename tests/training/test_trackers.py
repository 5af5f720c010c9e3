"""Trackers: their records are copies of the run's files, whatever happened to the run or to the tracker."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scalegpt.cli.main import main
from scalegpt.config import TrainConfig
from scalegpt.config.presets import resolve
from scalegpt.config.train import TRACKERS
from scalegpt.errors import InputError
from scalegpt.training.runs.directory import RunDirectory
from scalegpt.training.runs.metrics_file import read_history
from scalegpt.training.runs.records import RunRecords
from scalegpt.training.trackers import feed as feeds
from scalegpt.training.trackers.base import Entry, Past, Position, TrackedRun, Tracker, numbers, read_entries
from scalegpt.training.trackers.table import TABLE, check_trackers, open_trackers
from tracker_records import READERS, log_steps, opened

TESTS = Path(__file__).resolve().parents[1]


def needs(name: str) -> Any:
    modules = [name, *(["sqlalchemy"] if name == "mlflow" else [])]
    missing = [module for module in modules if find_spec(module) is None]
    return pytest.param(name, marks=pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}"))


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [each for each in os.environ if each.startswith(("WANDB", "MLFLOW", "TRACKIO"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    # MLflow's tables take seconds to make; a folder of files holds the same, and its release still reads it.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "runs" / "mlflow").as_uri())
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in [each for each in sys.modules if each.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)  # it reads TRACKIO_DIR when it is imported


def expected(records: RunRecords) -> tuple[dict[str, list[tuple[int, float]]], list[tuple[int, str]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for line in records.metrics.read_text().splitlines():
        values = json.loads(line)
        for key, value in values.items():
            if key != "step" and value is not None:
                found.setdefault(key, []).append((values["step"], value))
    return found, records.read_samples()


def check_record(name: str, runs: Path) -> None:
    """Check that a tracker shows the numbers of ``metrics.jsonl``: no step missing, none twice, and none other."""
    records = RunRecords(runs / "run")
    if name == "wandb":  # its own process writes the end of the file a moment after wandb.finish() has returned
        wait_for(lambda: len(READERS[name](runs, "run")[0].get("loss", [])) == len(expected(records)[0]["loss"]))
    found, samples = READERS[name](runs, "run")
    wanted, texts = expected(records)
    if name == "tensorboard":  # keeps fp32
        wanted = {key: [(step, float(np.float32(value))) for step, value in each] for key, each in wanted.items()}
        found = {key: value for key, value in found.items() if not key.startswith("_hparams_")}
    if name == "wandb":  # a row has both lines of a step, whose tokens are the same
        wanted["tokens"] = list(dict.fromkeys(wanted["tokens"]))
    assert found == wanted
    assert samples == texts


@pytest.mark.parametrize("name", [needs(each) for each in TRACKERS])
def test_after_a_kill_and_a_resume_the_record_has_the_numbers_of_the_file(name: str, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    if name == "wandb":  # left by a start that was killed while it opened its record
        (runs / "run" / "wandb" / "offline-run-20260101_000000-other").mkdir(parents=True)
        (runs / "run" / "wandb" / "offline-run-20260101_000000-other" / "run-other.wandb").touch()
    program = f"import tracker_records; tracker_records.log_and_die({name!r}, {str(runs / 'run')!r})"
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    killed = subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path}, timeout=120)
    assert killed.returncode == -9
    directory = RunDirectory(runs / "run")
    directory.forget_after(read_history(directory.metrics, 20, spike_window=4))  # the last checkpoint's
    records, sinks = opened(name, runs / "run")
    log_steps(records, sinks, 21, 33, 0.25)
    for sink in sinks:
        sink.close()
    check_record(name, runs)
    # An orderly end, after which the run goes on.
    records, sinks = opened(name, runs / "run")
    log_steps(records, sinks, 34, 41, 0.5)
    for sink in sinks:
        sink.close()
    check_record(name, runs)


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="needs tensorboard")
def test_a_run_that_gains_a_tracker_halfway_has_all_its_steps_there(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "run"
    records, (file, feed) = opened("tensorboard", folder)
    log_steps(records, [file, feed], 1, 12, 0.0)
    feed.close()
    log_steps(records, [file], 13, 20, 0.0)  # without the tracker
    _, (_, feed) = opened("tensorboard", folder)
    feed.close()
    check_record("tensorboard", tmp_path / "runs")


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="needs tensorboard")
def test_steps_that_a_run_took_without_its_tracker_replace_those_that_the_tracker_has(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "run"
    records, (file, feed) = opened("tensorboard", folder)
    log_steps(records, [file, feed], 1, 30, 0.0)
    feed.close()
    directory = RunDirectory(folder)
    directory.forget_after(read_history(directory.metrics, 10, spike_window=4))
    assert open_trackers([], records, {}, {}, print) == []
    log_steps(records, [type(file)(directory.metrics)], 11, 40, 0.5)
    _, (_, feed) = opened("tensorboard", folder)
    feed.close()
    check_record("tensorboard", tmp_path / "runs")


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="needs tensorboard")
def test_settings_and_plan_are_logged(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, (_, feed) = opened("tensorboard", tmp_path / "run")
    feed.close()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    said = {tag: events.Tensors(f"{tag}/text_summary")[0].tensor_proto.string_val[0] for tag in ("settings", "plan")}
    assert b"| train.learning_rate | 0.001 |" in said["settings"]
    assert b"| memory.peak_bytes | 1000 |" in said["plan"]


# --- a tracker that fails --------------------------------------------------------------------------------------------


class Fragile(Tracker):
    """A record in memory, whose network is out while ``out`` is set."""

    NAME = "fragile"
    place = "memory"
    out, record, opens = threading.Event(), list[Entry](), list[int]()

    @classmethod
    def check(cls, _folder: Path) -> None: ...

    def open(self, position: Position, past: Past) -> tuple[str, int]:
        start = position.acked
        del self.record[start:]
        self.opens.append(start)
        return "id", start

    def send(self, entries: Any) -> None:
        for entry in entries:
            if self.out.is_set():
                raise ConnectionError("the network\nis out")
            self.record.append(entry)

    def close(self, _state: str | None) -> None: ...


@pytest.fixture
def fragile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setitem(TABLE, "fragile", Fragile)
    for each in ("_FIRST_PAUSE", "_SECONDS_BETWEEN"):
        monkeypatch.setattr(feeds, each, 0.01)
    Fragile.out.clear()
    Fragile.record.clear()
    Fragile.opens.clear()
    said: list[str] = []

    def make() -> Any:
        (tmp_path / "run").mkdir(exist_ok=True)
        records = RunRecords(tmp_path / "run")
        (feed,) = open_trackers(["fragile"], records, {}, {}, said.append)
        from scalegpt.training.runs.metrics_file import MetricsFile

        return records, [MetricsFile(records.metrics), feed], said

    return make


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not happen within 10 s")


def test_an_outage_is_one_line_and_leaves_no_gap(fragile: Any) -> None:
    records, sinks, said = fragile()
    log_steps(records, sinks, 1, 5, 0.0)
    wait_for(lambda: len(Fragile.record) == 5)
    Fragile.out.set()
    log_steps(records, sinks, 6, 25, 0.0)
    wait_for(lambda: len(Fragile.opens) > 3)  # tried again and again
    assert len(said) == 1
    assert said[0].startswith("warning: log_to fragile: ConnectionError: the network is out; training continues")
    Fragile.out.clear()
    wait_for(lambda: len(Fragile.record) == 25 + 2 + 2)
    wait_for(lambda: len(said) == 2)
    assert said[1] == "fragile: sent again; nothing is missing"
    for sink in sinks:
        sink.close()
    assert [entry[:3] for entry in Fragile.record] == [entry[:3] for entry in read_entries(records)]


def test_what_an_outage_kept_away_is_there_after_the_next_start(fragile: Any) -> None:
    Fragile.out.set()
    records, sinks, said = fragile()
    log_steps(records, sinks, 1, 12, 0.0)
    for sink in sinks:
        sink.close()
    assert Fragile.record == []
    assert "the record may lack its last 14 lines" in said[-1]
    Fragile.out.clear()
    records, sinks, said = fragile()
    for sink in sinks:
        sink.close()
    assert [entry[:3] for entry in Fragile.record] == [entry[:3] for entry in read_entries(records)]
    assert len(Fragile.record) == 14


def test_a_long_outage_does_not_fill_the_memory(fragile: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "MOST_WAITING", 8)
    Fragile.out.set()
    records, sinks, said = fragile()
    log_steps(records, sinks, 1, 30, 0.0)
    for sink in sinks:
        sink.close()
    assert sum("sending stops until the next start" in line for line in said) == 1
    Fragile.out.clear()
    for sink in fragile()[1]:
        sink.close()
    assert len(Fragile.record) == 36


def test_positions_survive_what_happens_to_files(tmp_path: Path) -> None:
    path = tmp_path / "run" / "tracker.json"
    path.parent.mkdir()
    Position("id", 3, 5).write(path)
    assert Position.read(path) == Position("id", 3, 5)
    assert not Position.read(path).is_clean
    for damaged in ("", "{}", '{"run": 1, "acked": 2, "sent": 3}', '{"run": "id", "acked": "2", "sent": 3}'):
        path.write_text(damaged)
        assert Position.read(path) == Position()


def test_only_finite_numbers_are_sent() -> None:
    line = {"step": 3, "loss": 2.0, "grad_norm": float("inf"), "mfu": None, "skipped": True, "reason": "loss spike"}
    assert numbers(line) == {"loss": 2.0, "skipped": 1.0}


# --- what is refused -------------------------------------------------------------------------------------------------


def test_the_setting_is_a_flag_and_a_list_in_a_file() -> None:
    assert TrainConfig.from_mapping({"log_to": "wandb, tensorboard,"}, "here").trackers == ("wandb", "tensorboard")
    assert TrainConfig.from_mapping({"log_to": ["mlflow", "trackio"]}, "here").trackers == ("mlflow", "trackio")
    assert TrainConfig.from_mapping({"log_to": "none"}, "here").trackers == ()
    with pytest.raises(InputError, match="'tensorbord' is not a value of log_to; did you mean tensorboard"):
        TrainConfig(log_to="wandb,tensorbord")
    with pytest.raises(InputError, match="log_to must be a word or none, not a list"):
        resolve(flags={"log_to": [1]})


def test_a_missing_package_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("scalegpt.training.request.find_spec", lambda _: None)
    (tmp_path / "text.txt").write_text("text\n" * 100)
    words = f"train --preset tiny --input_file {tmp_path / 'text.txt'} --runs_dir {tmp_path / 'runs'} --log_to wandb"
    assert main(words.split()) == 2
    seen = capsys.readouterr().err
    assert seen == (
        "scalegpt train: error: log_to wandb: the package is not installed here; run pip install 'scalegpt[wandb]'\n"
    )
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("name", "environment", "message"),
    [
        ("wandb", {"WANDB_MODE": "online"}, "WANDB_MODE is online, but there is no key"),
        ("trackio", {"TRACKIO_SPACE_ID": "me/space"}, "unset TRACKIO_SPACE_ID"),
        ("mlflow", {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}, "http://127.0.0.1:9 cannot be used"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_line(
    name: str, environment: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_spec(name) is None:
        pytest.skip(f"needs {name}")
    for key, value in {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", **environment}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(InputError) as raised:
        check_trackers([name], tmp_path)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_every_tracker_of_the_setting_exists() -> None:
    assert tuple(TABLE) == TRACKERS


def test_a_tracked_run_is_named_after_its_folder(tmp_path: Path) -> None:
    assert TrackedRun(RunRecords(tmp_path / "name"), {}, {}).name == "name"


@pytest.mark.parametrize("name", TABLE)
def test_a_broken_package_is_refused_in_a_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = TABLE[name].MODULE
    monkeypatch.setitem(sys.modules, module, None)  # Python's own way to make an import fail
    with pytest.raises(InputError, match=f"log_to {name} cannot be imported .*install it again"):
        check_trackers([name], tmp_path)
