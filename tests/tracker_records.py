"""Reads back what trackers recorded, with the program's own reader where it has one: key → (step, value) in their order."""

import json
import os
import signal
import struct
import time
from collections import defaultdict
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

Record = dict[str, list[tuple[int, float]]]


def tensorboard(runs: Path, name: str) -> tuple[Record, list[tuple[int, str]]]:
    """Scalars and samples, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(runs / name / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["tensors"] if tag == "sample/text_summary" or "/" not in tag]
    found = {tag: [(each.step, make_ndarray(each.tensor_proto).item()) for each in events.Tensors(tag)] for tag in tags}
    samples = [(step, text.decode()) for step, text in found.pop("sample/text_summary", [])]
    return found, [(step, "\n".join(line[4:] for line in text.rstrip("\n").split("\n"))) for step, text in samples]


def wandb(runs: Path, name: str) -> tuple[Record, list[tuple[int, str]]]:
    """Rows and samples of the one offline record that there is."""
    from wandb.proto.wandb_internal_pb2 import Record as Message

    (file,) = (runs / name / "wandb").glob("offline-run-*/run-*.wandb")
    found: Record = defaultdict(list)
    samples = []
    for content in _wandb_messages(file.read_bytes()):
        message = Message()
        message.ParseFromString(content)
        items = {tuple(item.nested_key) or (item.key,): json.loads(item.value_json) for item in message.history.item}
        row = {key[0]: value for key, value in items.items() if len(key) == 1}
        for key, value in row.items():
            if isinstance(value, int | float) and not key.startswith("_"):
                found[key].append((row["_step"], value))
        if ("sample", "path") in items:
            page = (file.parent / "files" / items["sample", "path"]).read_text(encoding="utf-8")
            samples.append((row["_step"], unescape(page.partition('pre-wrap">')[2].removesuffix("</pre>"))))
    return dict(found), samples


def _wandb_messages(data: bytes) -> Iterator[bytes]:
    """The messages of a .wandb file, which has the form of LevelDB's logs after a header of 7 bytes."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def mlflow(runs: Path, name: str) -> tuple[Record, list[tuple[int, str]]]:
    """Metrics and samples of the one run that is not deleted."""
    from scalegpt.training.trackers import mlflow as tracker

    client = tracker._client(tracker._uri(runs))
    experiment = client.get_experiment_by_name("scalegpt").experiment_id
    (run,) = (each for each in client.search_runs([experiment]) if each.info.run_name == name)
    keys = run.data.metrics
    found = {key: [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, key)] for key in keys}
    samples = []
    for file in client.list_artifacts(run.info.run_id, "samples"):
        local = Path(client.download_artifacts(run.info.run_id, file.path))
        samples.append((int(local.stem.removeprefix("step_")), local.read_text(encoding="utf-8")))
    return found, sorted(samples)


def trackio(runs: Path, name: str) -> tuple[Record, list[tuple[int, str]]]:
    """Logs of the one run of that name."""
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = (each for each in SQLiteStorage.get_run_records("scalegpt") if each["name"] == name)
    found: Record = defaultdict(list)
    samples = []
    for row in SQLiteStorage.get_logs("scalegpt", name, run_id=run["id"]):
        for key, value in row.items():
            if isinstance(value, int | float) and key not in ("step", "timestamp"):
                found[key].append((row["step"], value))
        if "sample" in row:
            text: Any = row["sample"]["_value"]
            samples.append((row["step"], "\n".join(line[4:] for line in text.rstrip("\n").split("\n"))))
    return dict(found), samples


READERS = {"tensorboard": tensorboard, "wandb": wandb, "mlflow": mlflow, "trackio": trackio}


# --- a run that logs without training ------------------------------------------------------------------------------


def log_steps(records: Any, sinks: list[Any], first: int, last: int, salt: float) -> None:
    """Log steps as the trainer does, with an evaluation and a sample at every tenth."""
    for step in range(first, last + 1):
        line = {
            "step": step,
            "tokens": 64 * step,
            "loss": 5 - step / 100 + salt,
            "lr": 1e-3,
            "step_seconds": 0.5 + salt,
        }
        for sink in sinks:
            sink.log({**line, "grad_norm": float("nan") if step == 3 else 1.0, "mfu": None})
        if step % 10 == 0:
            for sink in sinks:
                sink.log({"step": step, "tokens": 64 * step, "val_loss": 4.5 + salt, "val_tokens": 112})
            records.add_sample(step, f"<b>sample</b> {step}\n    and {salt} | more")
            for sink in sinks:
                sink.log_sample(step, f"<b>sample</b> {step}\n    and {salt} | more")


def opened(tracker: str, folder: Path) -> tuple[Any, list[Any]]:
    """The records of a run in a folder, and its sinks: ``metrics.jsonl`` and the tracker."""
    from scalegpt.training.runs.directory import RunDirectory
    from scalegpt.training.runs.metrics_file import MetricsFile
    from scalegpt.training.trackers.table import open_trackers

    records = RunDirectory(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings, plan = (
        {"train": {"learning_rate": 1e-3, "log_to": tracker}},
        {"memory": {"peak_bytes": 1000}, "speed": {}},
    )
    feeds = open_trackers([tracker], records, settings, plan, print)
    return records, [MetricsFile(records.metrics), *feeds]


def log_and_die(tracker: str, folder: str) -> None:
    """Log 35 steps and end by SIGKILL, the last ten right before it, so that some may not have arrived."""
    records, sinks = opened(tracker, Path(folder))
    log_steps(records, sinks, 1, 25, 0.0)
    position = Path(folder) / ".trackers" / f"{tracker}.json"
    while not position.is_file() or json.loads(position.read_text())["acked"] < 25:
        time.sleep(0.02)
    log_steps(records, sinks, 26, 35, 0.0)
    os.kill(os.getpid(), signal.SIGKILL)
