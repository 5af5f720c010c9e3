"""Reads what a report shows from a run's folder. The run may be training, and files may be missing."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalegpt.errors import InputError
from scalegpt.storage import read_text
from scalegpt.structured import CONFIG_LIMIT, parse_yaml, read_object
from scalegpt.text import shown
from scalegpt.training.runs.metrics_file import metric_lines
from scalegpt.training.runs.records import RunRecords

Points = list[tuple[float, float]]
"""The points of a curve, as (step, value)."""

CURVES = (
    "loss",
    "val_loss",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "process_bytes",
    "gpu_used_bytes",
    "gpu_utilization",
)
"""The keys of ``metrics.jsonl`` that are drawn."""


@dataclass(frozen=True)
class ReportedRun:
    """The content of a run's report.

    Attributes:
        name: the run's name.
        status: the content of ``run_status.json``; empty where it cannot be read.
        plan: the content of ``plan.json``; empty where it cannot be read.
        config: the text of ``config.yaml``; empty where it cannot be read.
        settings: setting → value, without sections; empty where ``config.yaml`` cannot be read.
        curves: key of ``metrics.jsonl`` → its points, for each of :data:`CURVES`.
        by_source: label of each source of a mixture → its held-out losses; empty for one source.
        seconds: sum of the steps' durations.
        tokens: tokens of all steps.
        samples: step and text of each sample.
    """

    name: str
    status: Mapping[str, Any]
    plan: Mapping[str, Any]
    config: str
    settings: Mapping[str, Any]
    curves: Mapping[str, Points]
    by_source: Mapping[str, Points]
    seconds: float
    tokens: int
    samples: list[tuple[int, str]]

    @property
    def step(self) -> int:
        """The last step that was logged, or else the step in ``run_status.json``."""
        logged = [int(points[-1][0]) for points in self.curves.values() if points]
        step = self.status.get("step")
        return max([*logged, step if isinstance(step, int) else 0])

    @property
    def speed(self) -> float | None:
        """The median of the steps' tokens per second; None without steps."""
        points = self.curves["tokens_per_second"]
        return statistics.median(value for _, value in points) if points else None

    def last(self, key: str) -> float | None:
        """The last value of a curve; None where it has none."""
        points = self.curves[key]
        return points[-1][1] if points else None


def find_run(path: Path) -> RunRecords:
    """The run in a folder.

    Raises:
        InputError: there is no such folder, it holds no run, or the run has logged nothing.
    """
    records = RunRecords(path)
    if not path.is_dir():
        raise InputError(f"{path} is not a run: there is no such folder")
    if not (records.metrics.is_file() or records.config.is_file()):
        raise InputError(f"{path} is not a run: it has neither metrics.jsonl nor config.yaml")
    if next(metric_lines(records.metrics), None) is None:
        raise InputError(f"{path} has nothing to report: no step is in its metrics.jsonl")
    return records


def read_run(records: RunRecords) -> ReportedRun:
    """Read a run.

    Raises:
        InputError: ``metrics.jsonl`` cannot be read.
    """
    curves: dict[str, Points] = {key: [] for key in CURVES}
    by_source: dict[str, Points] = {}
    seconds, tokens = 0.0, 0
    for _, values in metric_lines(records.metrics):
        for key in CURVES:
            value = values.get(key)
            if isinstance(value, int | float):
                curves[key].append((values["step"], value))
        losses = values.get("val_loss_by_source")
        for label, value in losses.items() if isinstance(losses, dict) else ():
            if isinstance(value, int | float) and math.isfinite(value):
                by_source.setdefault(label, []).append((values["step"], value))
        seconds += values.get("step_seconds") or 0.0
        tokens = int(values.get("tokens") or tokens)
    config = _text(records.config)
    return ReportedRun(
        name=records.path.resolve().name,
        status=_object(records.status),
        plan=_object(records.plan),
        config=config,
        settings=_settings(config),
        curves=curves,
        by_source=by_source,
        seconds=seconds,
        tokens=tokens,
        samples=records.read_samples(),
    )


def _object(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except (OSError, InputError):
        return {}


def _text(path: Path) -> str:
    try:
        return read_text(path, CONFIG_LIMIT)
    except (OSError, UnicodeDecodeError):
        return ""


def _settings(config: str) -> dict[str, Any]:
    try:
        values = parse_yaml(config, "config.yaml") if config else {}
    except InputError:
        return {}
    flat: dict[str, Any] = {}
    for key, value in values.items() if isinstance(values, dict) else ():
        flat |= value if isinstance(value, dict) and key in ("model", "train", "data") else {key: value}
    return flat


def differing(runs: list[ReportedRun]) -> dict[str, list[str]]:
    """The settings that differ between runs: setting → the value in each run, as text."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if key != "name")
    found = {key: [_value(run.settings, key) for run in runs] for key in keys}
    return {key: values for key, values in found.items() if len(set(values)) > 1}


def _value(settings: Mapping[str, Any], key: str) -> str:
    value = settings.get(key)
    return (
        "none"
        if value is None
        else str(value)
        if isinstance(value, dict)
        else str(value).lower()
        if isinstance(value, bool)
        else shown(value).strip("'")
    )
