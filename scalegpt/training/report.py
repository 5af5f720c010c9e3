"""``report.html``: a finished run on one page that needs nothing else: curves, figures, settings, the last sample."""

import html
import json
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from scalegpt.training.loggers import human_count, human_time
from scalegpt.training.rundir import RunDirectory, write_whole, writing

Point = tuple[float, float]

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 760, 300, 64, 32, 14

_STYLE = """
:root{--ink:#1c1e21;--soft:#687078;--line:#d9dde1;--page:#fff;--train:#2868c8;--val:#c8501e;color-scheme:light dark}
@media (prefers-color-scheme:dark){:root{--ink:#e6e8ea;--soft:#98a0a8;--line:#3a4046;--page:#16181b;--train:#6ea4f4;
--val:#f49060}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);max-width:820px;margin:2rem auto;
padding:0 1rem}
h1{font-size:1.4rem}h2{font-size:1.05rem;margin-top:2rem}
table{border-collapse:collapse}td{padding:.1rem 1.2rem .1rem 0;vertical-align:top}td:first-child{color:var(--soft)}
pre{white-space:pre-wrap;border-left:3px solid var(--line);padding-left:.8rem;font-size:13px}
svg{width:100%;height:auto}svg text{fill:var(--soft);font-size:12px}
.grid{stroke:var(--line)}.train{stroke:var(--train);fill:none;stroke-width:1.5}
.val{stroke:var(--val);fill:none;stroke-width:2}.dot{fill:var(--val)}.key-train{color:var(--train)}.key-val{color:var(--val)}
"""


def write_report(directory: RunDirectory) -> None:
    """Write the report of a run from the files in its directory.

    Raises:
        RunError: it cannot be written.
    """
    steps, evaluations = read_metrics(directory)
    status = json.loads(directory.status.read_text(encoding="utf-8"))
    losses = [(entry["step"], entry["loss"]) for entry in steps if entry["loss"] is not None]
    held_out = [(entry["step"], entry["val_loss"]) for entry in evaluations if entry["val_loss"] is not None]
    speeds = [(entry["step"], entry["tokens_per_second"]) for entry in steps]
    name = html.escape(directory.path.name)
    parts = [
        f"<h1>{name}: {html.escape(status['state'])} after {status['step']:,} steps</h1>",
        _table(_figures(steps, status)),
        '<h2>Loss (<span class="key-train">training</span>, <span class="key-val">held-out</span>)</h2>',
        chart(smoothed(losses), held_out, "{:.2f}".format),
        "<h2>Tokens per second</h2>",
        chart(smoothed(speeds), [], human_count, from_zero=True),
        _sample(directory),
        f"<h2>Configuration</h2><pre>{html.escape(directory.config.read_text(encoding='utf-8'))}</pre>",
    ]
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{name}</title><style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )
    with writing(directory.report):
        write_whole(directory.report, page)


def read_metrics(directory: RunDirectory) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The lines of ``metrics.jsonl``: of steps, and of evaluations."""
    if not directory.metrics.is_file():
        return [], []
    entries = [json.loads(line) for line in directory.metrics.read_text(encoding="utf-8").splitlines()]
    return [entry for entry in entries if "loss" in entry], [entry for entry in entries if "val_loss" in entry]


def smoothed(points: Sequence[Point], most: int = 400) -> list[Point]:
    """Means of neighbours, so that at most ``most`` points are drawn."""
    size = max(1, math.ceil(len(points) / most))
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def chart(
    line: Sequence[Point], dots: Sequence[Point], label: Callable[[float], str], *, from_zero: bool = False
) -> str:
    """A line, and a dotted line over it, as an SVG picture.

    Args:
        line: points of the first line.
        dots: points of the second, each marked.
        label: writes a value at the axis.
        from_zero: begin the axis at zero.
    """
    points = [*line, *dots]
    if not points:
        return "<p>No steps were taken.</p>"
    right = max(step for step, _ in points) or 1
    low = 0.0 if from_zero else min(value for _, value in points)
    high = max(value for _, value in points)
    span = (high - low) or 1.0

    def place(point: Point) -> Point:
        x = LEFT + (WIDTH - LEFT - 10) * point[0] / right
        return x, TOP + (HEIGHT - TOP - BOTTOM) * (1 - (point[1] - low) / span)

    def path(of: Sequence[Point]) -> str:
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, of))

    grid = []
    for quarter in range(5):
        value = low + span * quarter / 4
        _, y = place((0, value))
        grid.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 10}" y1="{y:.1f}" y2="{y:.1f}"/>')
        grid.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label(value)}</text>')
        x, _ = place((right * quarter / 4, low))
        grid.append(f'<text x="{x:.1f}" y="{HEIGHT - 10}" text-anchor="middle">{round(right * quarter / 4):,}</text>')
    marks = "".join(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in map(place, dots))
    lines = f'<polyline class="train" points="{path(line)}"/><polyline class="val" points="{path(dots)}"/>'
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(grid)}{lines}{marks}</svg>'


def _figures(steps: list[dict[str, Any]], status: dict[str, Any]) -> dict[str, str]:
    figures = {"cause of the end": str(status["cause"])}
    if steps:
        seconds = sum(entry["step_seconds"] for entry in steps)
        figures |= {
            "tokens": f"{steps[-1]['tokens']:,}",
            "time in steps": human_time(seconds),
            "median tokens per second": human_count(statistics.median(entry["tokens_per_second"] for entry in steps)),
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


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.4f}"


def _table(rows: dict[str, str]) -> str:
    cells = "".join(f"<tr><td>{html.escape(key)}</td><td>{html.escape(value)}</td></tr>" for key, value in rows.items())
    return f"<table>{cells}</table>"


def _sample(directory: RunDirectory) -> str:
    samples = directory.read_samples()
    if not samples:
        return ""
    step, text = samples[-1]
    return f"<h2>Sample after {step:,} steps</h2><pre>{html.escape(text)}</pre>"
