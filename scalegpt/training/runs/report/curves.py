"""The curves of a report, drawn in one chart.

Long curves have fewer points, and show the range that each point stands for.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from scalegpt.html import svg
from scalegpt.html.page import escape
from scalegpt.html.svg import Axis, Band, Caption, Chart, Line, Point, decimals, ticks
from scalegpt.training.runs.report.read import Points

MOST_POINTS = 400
"""The most points that a curve is drawn with."""


class Thinned(NamedTuple):
    """A curve with fewer points: the mean of each group of neighbours, and the group's least and greatest value."""

    means: Points
    lowest: Points
    highest: Points


def thinned(points: Points, most: int = MOST_POINTS) -> Thinned:
    """Put neighbouring points into at most ``most`` groups of the same size. Each group gets the step of its last point."""
    size = max(1, math.ceil(len(points) / most))
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    steps = [group[-1][0] for group in groups]
    values = [[value for _, value in group] for group in groups]
    return Thinned(
        [(step, sum(each) / len(each)) for step, each in zip(steps, values, strict=True)],
        [(step, min(each)) for step, each in zip(steps, values, strict=True)],
        [(step, max(each)) for step, each in zip(steps, values, strict=True)],
    )


@dataclass(frozen=True)
class Curve:
    """A curve of a chart: its name in the legend, its points, its colour, and whether each point has a dot."""

    name: str
    points: Points
    hue: int
    has_dots: bool = False


def chart(
    key: str, title: str, curves: Sequence[Curve], *, kind: str = "number", write: Callable[[float], str] | None = None
) -> str:
    """A chart of curves over steps as HTML, with a heading and a legend; empty if no curve has a point.

    Args:
        key: the prefix of the chart's HTML ids.
        title: the heading.
        curves: the curves.
        kind: how ``zoom.js`` formats the values.
        write: formats the values; None: with the decimals that they need to differ.
    """
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return ""
    drawn = [thinned(curve.points, len(curve.points) if curve.has_dots else MOST_POINTS) for curve in curves]
    values = [value for each in drawn for part in (each.lowest, each.highest) for _, value in part]
    right = max(curve.points[-1][0] for curve in curves) or 1
    rows = ticks(min(values), max(values))
    columns = [each for each in ticks(0.0, right, whole=True) if each <= right]
    groups = max(math.ceil(len(curve.points) / len(each.means)) for curve, each in zip(curves, drawn, strict=True))
    said = f"Over steps: {', '.join(curve.name for curve in curves)}."
    if groups > 1:
        said += f" A line is the mean of up to {groups:,} steps, and the area their least to greatest value."
    picture = Chart(
        Caption(key, f"{title} over steps", said),
        [Line(curve.hue, _points(each.means), curve.has_dots) for curve, each in zip(curves, drawn, strict=True)],
        Axis(0, right, columns, "{:,.0f}".format),
        Axis(rows[0], rows[-1], rows, write or decimals(rows[1] - rows[0])),
        bands=[
            Band(curve.hue, _points(each.lowest), _points(each.highest))
            for curve, each in zip(curves, drawn, strict=True)
            if len(each.means) < len(curve.points)
        ],
        zoom=kind,
    )
    legend = svg.legend([(Line(curve.hue, ()).style, curve.name) for curve in curves])
    note = f'<p class="note">{escape(said.partition(".")[2].strip())}</p>' if groups > 1 else ""
    return f"<h2>{escape(title)}</h2>{picture.draw()}{legend}{note}"


def _points(points: Points) -> list[Point]:
    return [Point(*point) for point in points]
