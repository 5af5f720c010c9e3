"""Write ``report.html``: one self-contained page on a run, with curves, key figures, settings and the last sample."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from scalegpt.html import svg
from scalegpt.html.page import document, escape, facts
from scalegpt.html.svg import Axis, Caption, Chart, Line, Point, decimals, ticks
from scalegpt.storage import read_text
from scalegpt.structured import CONFIG_LIMIT, read_object
from scalegpt.training.runs.directory import RunDirectory
from scalegpt.training.runs.files import write_whole, writing
from scalegpt.training.runs.metrics_file import metric_lines
from scalegpt.units import human_count, human_time

TRAINING, HELD_OUT = 1, 2
"""Numbers of the chart colours for the training loss and the held-out loss."""

Points = Sequence[tuple[float, float]]
"""The points of a curve, as (step, value)."""


def write_report(directory: RunDirectory) -> None:
    """Write the report of a run from the files in its directory.

    Raises:
        RunError: the report cannot be written.
    """
    steps, evaluations = read_metrics(directory)
    status = read_object(directory.status)
    losses = [(entry["step"], entry["loss"]) for entry in steps if entry["loss"] is not None]
    held_out = [(entry["step"], entry["val_loss"]) for entry in evaluations if entry["val_loss"] is not None]
    speeds = [(entry["step"], entry["tokens_per_second"]) for entry in _timed(steps)]
    name = directory.path.name
    parts = [
        f"<h1>{escape(name)}: {escape(status['state'])} after {status['step']:,} steps</h1>",
        facts(_figures(steps, status)),
        "<h2>Loss</h2>",
        chart(Caption("loss", "Loss over steps", "Training, and held-out with dots."), smoothed(losses), held_out),
        svg.legend([(Line(TRAINING, ()).style, "training"), (Line(HELD_OUT, ()).style, "held-out")]),
        "<h2>Tokens per second</h2>",
        chart(Caption("speed", "Tokens per second over steps", "Training."), smoothed(speeds), write=human_count),
        _sample(directory),
        f"<h2>Configuration</h2><pre>{escape(read_text(directory.config, CONFIG_LIMIT))}</pre>",
    ]
    with writing(directory.report):
        write_whole(directory.report, document(name, "".join(parts), svg.STYLE))


def read_metrics(directory: RunDirectory) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return two lists from ``metrics.jsonl``: the values in each step line, and the values in each evaluation line."""
    entries = [values for _, values in metric_lines(directory.metrics)]
    return [entry for entry in entries if "loss" in entry], [entry for entry in entries if "val_loss" in entry]


def smoothed(points: Points, most: int = 400) -> list[tuple[float, float]]:
    """Average neighbouring points so that at most ``most`` are left. Each average gets the step of its last point."""
    size = max(1, math.ceil(len(points) / most))
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def chart(caption: Caption, line: Points, dots: Points = (), write: Callable[[float], str] | None = None) -> str:
    """Draw an SVG chart with a curve over steps, and a second curve with a dot at each point. Both axes have round numbers.

    Args:
        caption: title and description.
        line: points of the first curve.
        dots: points of the second curve.
        write: formats the numbers at the value axis, which then begins at zero. None: the axis begins near the smallest
            value, and its numbers have as many decimals as they need to differ.
    """
    points = [*line, *dots]
    if not points:
        return "<p>No steps were taken.</p>"
    right = max(step for step, _ in points) or 1
    values = [value for _, value in points]
    rows = ticks(0.0 if write else min(values), max(values))
    lines = [
        Line(TRAINING, [Point(*point) for point in line], has_dots=False),
        Line(HELD_OUT, [Point(*point) for point in dots]),
    ]
    steps = [each for each in ticks(0.0, right, whole=True) if each <= right]
    x_axis = Axis(0, right, steps, "{:,.0f}".format)
    return Chart(caption, lines, x_axis, Axis(rows[0], rows[-1], rows, write or decimals(rows[1] - rows[0]))).draw()


def _figures(steps: list[dict[str, Any]], status: dict[str, Any]) -> dict[str, str]:
    figures = {"cause of the end": str(status["cause"])}
    if steps:
        timed = _timed(steps)
        seconds = sum(entry["step_seconds"] for entry in timed)
        figures |= {
            "tokens": f"{steps[-1].get('tokens') or 0:,}",
            "time in steps": human_time(seconds),
            "median tokens per second": human_count(statistics.median(entry["tokens_per_second"] for entry in timed)),
            "last training loss": _number(steps[-1]["loss"]),
        }
    figures |= {
        "held-out loss": _number(status["val_loss"]),
        "best held-out loss": _number(status["best_val_loss"]),
        "peak memory of rank 0": f"{status['measured_peak_bytes'] / 2**20:,.0f} MiB",
    }
    if status.get("predicted_peak_bytes"):
        figures["predicted peak memory of a GPU"] = f"{status['predicted_peak_bytes'] / 2**20:,.0f} MiB"
    return figures


def _timed(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The steps whose lines have a duration and a speed. Lines that another program wrote may lack them."""
    return [entry for entry in steps if {entry.get("step_seconds"), entry.get("tokens_per_second")}.isdisjoint({None})]


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.4f}"


def _sample(directory: RunDirectory) -> str:
    samples = directory.read_samples()
    if not samples:
        return ""
    step, text = samples[-1]
    return f"<h2>Sample after {step:,} steps</h2><pre>{escape(text)}</pre>"
