"""``report.html``: a finished run on one page that needs nothing else: curves, figures, settings, the last sample."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from scalegpt.html.page import document, escape, facts
from scalegpt.storage import read_text
from scalegpt.structured import CONFIG_LIMIT, read_object
from scalegpt.training.runs.directory import RunDirectory
from scalegpt.training.runs.files import write_whole, writing
from scalegpt.training.runs.metrics_file import metric_lines
from scalegpt.units import human_count, human_time

Point = tuple[float, float]

WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, TOP = 760, 300, 64, 10, 32, 14
EDGE = 48
"""A number closer to the right end than this has its end there, not its middle."""

MOST_INTERVALS = 5

_STYLE = """
svg{width:100%;height:auto}
.grid{stroke:var(--line)}.train{stroke:var(--c1);fill:none;stroke-width:1.5}
.val{stroke:var(--c2);fill:none;stroke-width:2}.dot{fill:var(--c2)}.key-train{color:var(--c1)}.key-val{color:var(--c2)}
"""


def write_report(directory: RunDirectory) -> None:
    """Write the report of a run from the files in its directory.

    Raises:
        RunError: it cannot be written.
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
        '<h2>Loss (<span class="key-train">training</span>, <span class="key-val">held-out</span>)</h2>',
        chart(smoothed(losses), held_out),
        "<h2>Tokens per second</h2>",
        chart(smoothed(speeds), [], human_count, from_zero=True),
        _sample(directory),
        f"<h2>Configuration</h2><pre>{escape(read_text(directory.config, CONFIG_LIMIT))}</pre>",
    ]
    with writing(directory.report):
        write_whole(directory.report, document(name, "".join(parts), _STYLE))


def read_metrics(directory: RunDirectory) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The lines of ``metrics.jsonl``: of steps, and of evaluations."""
    entries = [values for _, values in metric_lines(directory.metrics)]
    return [entry for entry in entries if "loss" in entry], [entry for entry in entries if "val_loss" in entry]


def smoothed(points: Sequence[Point], most: int = 400) -> list[Point]:
    """Means of neighbours, so that at most ``most`` points are drawn."""
    size = max(1, math.ceil(len(points) / most))
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def chart(
    line: Sequence[Point],
    dots: Sequence[Point],
    label: Callable[[float], str] | None = None,
    *,
    from_zero: bool = False,
) -> str:
    """A line, and a dotted line over it, as an SVG picture; both axes have round numbers.

    Args:
        line: points of the first line.
        dots: points of the second, each marked.
        label: writes a value at the axis; None: with as many decimals as its neighbours need to differ.
        from_zero: begin the axis at zero.
    """
    points = [*line, *dots]
    if not points:
        return "<p>No steps were taken.</p>"
    right = max(step for step, _ in points) or 1
    values = [value for _, value in points]
    rows = ticks(0.0 if from_zero else min(values), max(values))
    low, span = rows[0], rows[-1] - rows[0]
    write = label or decimals(rows[1] - rows[0])

    def place(point: Point) -> Point:
        x = LEFT + (WIDTH - LEFT - RIGHT) * point[0] / right
        return x, TOP + (HEIGHT - TOP - BOTTOM) * (1 - (point[1] - low) / span)

    def path(of: Sequence[Point]) -> str:
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, of))

    grid = []
    for value in rows:
        _, y = place((0, value))
        grid.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        grid.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{write(value)}</text>')
    for step in (each for each in ticks(0.0, right, whole=True) if each <= right):
        x, _ = place((step, low))
        anchor = "middle" if x < WIDTH - EDGE else "end"  # centred, a long number would be cut off
        grid.append(f'<text x="{x:.1f}" y="{HEIGHT - 10}" text-anchor="{anchor}">{step:,.0f}</text>')
    marks = "".join(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in map(place, dots))
    lines = f'<polyline class="train" points="{path(line)}"/><polyline class="val" points="{path(dots)}"/>'
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(grid)}{lines}{marks}</svg>'


def ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Round numbers around a range: two or more, at equal distances of 1, 2 or 5 times a power of ten.

    Args:
        low: the range's lowest value, not below the first number.
        high: its highest, not above the last.
        whole: whole numbers alone.
    """
    least = (high - low) / MOST_INTERVALS or abs(high) / MOST_INTERVALS or 1.0
    if whole:
        least = max(1.0, least)
    power = 10.0 ** math.floor(math.log10(least))
    step = next(each * power for each in (1, 2, 5, 10) if each * power >= least * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def decimals(step: float) -> Callable[[float], str]:
    """A way to write numbers so that those of this distance differ; large and tiny ones with an exponent."""
    places = -math.floor(math.log10(step) + 1e-9)
    if -6 < places < 6:
        return lambda value: f"{value:.{max(0, places)}f}"
    return "{:.3g}".format


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
    """The steps whose line says how long they took; one that another program wrote may not."""
    return [entry for entry in steps if {entry.get("step_seconds"), entry.get("tokens_per_second")}.isdisjoint({None})]


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.4f}"


def _sample(directory: RunDirectory) -> str:
    samples = directory.read_samples()
    if not samples:
        return ""
    step, text = samples[-1]
    return f"<h2>Sample after {step:,} steps</h2><pre>{escape(text)}</pre>"
