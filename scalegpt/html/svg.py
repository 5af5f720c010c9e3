"""Charts for a page, as SVG: a bar of parts, and lines over two axes with round numbers.

Horizontal positions are shares of the width and vertical positions are pixels, so that text and strokes keep their size
on a phone and in print. Every chart has a title and a description. The caller shows the figures in a table beside the
chart. The CSS classes ``c1``, ``c2``, … of :data:`STYLE` give the colours.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from scalegpt.html.page import HUES, escape

STYLE = """
svg{display:block;width:100%}svg.swatch{display:inline-block;width:12px;margin-right:.5rem;vertical-align:-1px}
.keys span{display:inline-block;margin-right:1.4rem}
svg.sample{display:inline-block;width:30px;margin-right:.4rem;vertical-align:-1px}
.lines{overflow:visible;margin:.6rem 0 3.2rem 4rem;width:calc(100% - 4.8rem)}
svg .inside{fill:var(--on)}.whole{fill:none;stroke:var(--soft)}
.slice{stroke:var(--page);stroke-width:.75}
.r1{fill:var(--rest)}.r2{fill:var(--rest2)}.grid{stroke:var(--line)}.axis{stroke:var(--soft)}
.beyond{fill:var(--warn);opacity:.08}
.limit,.margin{stroke:var(--warn);stroke-width:2}.margin{stroke-dasharray:6 4}.edge{stroke:var(--page);stroke-width:6}
svg .strong{fill:var(--ink);font-weight:600}
svg .limit-text{fill:var(--warn);font-weight:600}svg .halo{paint-order:stroke;stroke:var(--page);stroke-width:4px;
stroke-linejoin:round}.curve{fill:none;stroke-width:2;vector-effect:non-scaling-stroke}.dash4{stroke-dasharray:8 4}
.dash3{stroke-dasharray:2 4}.ring{fill:none;stroke:var(--ink);stroke-width:2.5}
@media (max-width:640px){svg .wide{display:none}}
""" + "".join(
    f".c{hue}{{fill:var(--c{hue})}}.s{hue}{{stroke:var(--c{hue})}}.b{hue}{{fill:var(--c{hue});opacity:.22}}"
    for hue in range(1, HUES + 1)
)

_WIDE, _NARROW, _LETTER = 760, 330, 7.2
"""Pixels: the width of a bar on a desktop and on a phone, and that of a letter. They decide which names fit inside a part."""

_ABOVE, _BAR, _BELOW = 34, 38, 20
"""Pixels: the space above a bar for a mark's label, the height of the bar, and the space below it for a second label."""

_MOST_INTERVALS = 5


class Caption(NamedTuple):
    """A chart's key (the prefix of its HTML ids, unique on the page), its title, and its description for screen readers."""

    key: str
    title: str
    description: str

    def open(self, kind: str, height: int, more: str = "") -> str:
        """The opening tag of a chart, with its title and description; ``kind`` is its CSS class, ``more`` are attributes."""
        return (
            f'<svg class="{kind}" height="{height}"{more} role="img" aria-labelledby="{self.key}-t {self.key}-d">'
            f'<title id="{self.key}-t">{escape(self.title)}</title><desc id="{self.key}-d">{escape(self.description)}</desc>'
        )


class Mark(NamedTuple):
    """A line that marks a value in a bar or a chart: the value, its label, and its CSS class, ``limit`` or ``margin``."""

    at: float
    label: str
    style: str


def swatch(style: str) -> str:
    """A small square in the colour of a part, for the table beside the chart."""
    return f'<svg class="swatch" height="12" aria-hidden="true"><rect class="{style}" width="12" height="12" rx="2"/></svg>'


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """A chart's legend as HTML: for each pair of CSS class and meaning, a short sample of the line and the meaning."""
    spans = (
        f'<span><svg class="sample" height="12" aria-hidden="true"><line class="{style}" x2="30" y1="6" y2="6"/></svg>'
        f"{escape(meaning)}</span>"
        for style, meaning in entries
    )
    return f'<p class="keys">{"".join(spans)}</p>'


def small_bar(share: float, style: str) -> str:
    """A share from 0 to 1 as a small SVG bar for a table's cell."""
    width = f"{100 * min(1.0, max(0.0, share)):.2f}%"
    return f'<svg height="12" aria-hidden="true"><rect class="{style}" width="{width}" height="12" rx="2"/></svg>'


# --- a bar of parts --------------------------------------------------------------------------------------------------


class Slice(NamedTuple):
    """A part of a bar: its name, its size, the size in words, and its CSS class."""

    name: str
    size: float
    label: str
    style: str


def stack(caption: Caption, slices: Sequence[Slice], whole: float, head: str = "", marks: Sequence[Mark] = ()) -> str:
    """A horizontal bar of consecutive parts, as SVG.

    Args:
        caption: the title and the description of the bar.
        slices: the parts, from left to right.
        whole: the value at the right end of the bar; no part or mark exceeds it.
        head: text above the bar.
        marks: values marked across the bar; the first has its label above the bar, the second below.
    """
    top = _ABOVE if head or marks else 0
    drawn = [caption.open("stack", top + _BAR + (_BELOW if len(marks) > 1 else 2))]
    if head:
        drawn.append(f'<text class="strong" x="0" y="12">{escape(head)}</text>')
    start, places = 0.0, [mark.at / whole for mark in marks]
    for each in slices:
        drawn += _slice(each, start / whole, each.size / whole, top, places)
        start += each.size
    drawn.append(f'<rect class="whole" x="0" y="{top}" width="100%" height="{_BAR}"/>')
    drawn += [_across("edge", place, top) for place in places]
    for mark, place, y in zip(marks, places, (top - 6, top + _BAR + 16), strict=False):
        anchor = "end" if place > 0.5 else "start"
        drawn.append(_across(mark.style, place, top))
        drawn.append(_text("limit-text", f"{100 * place:.3f}%", f"{y}", anchor, mark.label))
    return "".join([*drawn, "</svg>"])


def _slice(each: Slice, start: float, share: float, top: int, marks: Sequence[float]) -> Iterator[str]:
    """A part of a bar as SVG, with its name if the name fits inside the part and no mark crosses it.

    ``start``, ``share`` and ``marks`` are shares of the bar's width; ``top`` is in pixels.
    """
    place = f'x="{100 * start:.3f}%" width="{100 * share:.3f}%"'
    yield (
        f'<rect class="slice {each.style}" {place} y="{top}" height="{_BAR}">'
        f"<title>{escape(each.name)}: {escape(each.label)}</title></rect>"
    )
    needed, middle = _LETTER * len(each.name) + 8, start + share / 2
    room = min([share / 2, *(abs(middle - mark) for mark in marks)])
    if needed / 2 <= room * _WIDE:
        kind = "inside" if needed / 2 <= room * _NARROW else "inside wide"
        yield _text(kind, f"{100 * middle:.3f}%", f"{top + _BAR / 2 + 4:g}", "middle", each.name)


def _across(style: str, place: float, top: int) -> str:
    """A vertical line across a bar; ``place`` is a share of the bar's width."""
    x = f"{100 * place:.3f}%"
    return f'<line class="{style}" x1="{x}" x2="{x}" y1="{top - 4}" y2="{top + _BAR + 4}"/>'


def _text(style: str, x: str, y: str, anchor: str, text: str) -> str:
    kind = f'class="{style}" ' if style else ""
    return f'<text {kind}x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'


# --- lines over two axes ---------------------------------------------------------------------------------------------


class Point(NamedTuple):
    """A point of a chart, in the values of its axes, and the text of its tooltip."""

    x: float
    y: float
    label: str = ""


class Line(NamedTuple):
    """A line of a chart: its colour, its points, and whether each point has a dot.

    The colour is a number that also decides the dashes: short for 3, long for 4, none for others.
    """

    hue: int
    points: Sequence[Point]
    has_dots: bool = True

    @property
    def style(self) -> str:
        """The CSS classes of the line."""
        return f"curve s{self.hue} dash{self.hue}"


class Band(NamedTuple):
    """A coloured area between two lines with the same horizontal positions: the range around a line of means."""

    hue: int
    lower: Sequence[Point]
    upper: Sequence[Point]


class Axis(NamedTuple):
    """An axis: its lowest and highest value, the values with labels, and the function that formats a label."""

    low: float
    high: float
    ticks: Sequence[float]
    write: Callable[[float], str]

    def share(self, value: float) -> float:
        """The position of a value on the axis, from 0 at the lowest value to 1 at the highest."""
        return (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5


@dataclass(frozen=True)
class Chart:
    """A chart of lines over two axes. Parts of lines above the highest value of the vertical axis are not shown.

    Attributes:
        caption: the title and the description of the chart.
        lines: the lines.
        x_axis: the horizontal axis.
        y_axis: the vertical axis.
        marks: marked values of the vertical axis; the first has its label above its line, the second below.
        chosen: a point that a ring marks, and the label near the ring.
        x_label: text below the horizontal axis.
        bands: areas behind the lines.
        zoom: how ``zoom.js`` formats the vertical axis of a zoomed chart: ``count``, ``number`` or ``percent``. Empty:
            the chart cannot be zoomed.
    """

    caption: Caption
    lines: Sequence[Line]
    x_axis: Axis
    y_axis: Axis
    marks: Sequence[Mark] = ()
    chosen: tuple[Point, str] | None = None
    x_label: str = ""
    bands: Sequence[Band] = ()
    zoom: str = ""

    HEIGHT = 300

    def draw(self) -> str:
        """The chart as SVG."""
        parts = (self._beyond(), self._rows(), self._columns(), self._curves(), self._levels(), self._ring())
        x, y = self.x_axis, self.y_axis
        zoom = (
            f' data-zoom="{self.zoom}" data-x="{x.low!r} {x.high!r}" data-y="{y.low!r} {y.high!r}"' if self.zoom else ""
        )
        return "".join(
            [self.caption.open("lines", self.HEIGHT, zoom), *(each for part in parts for each in part), "</svg>"]
        )

    def _x(self, value: float) -> float:
        """The horizontal position of a value, in percent of the width."""
        return 2 + 96 * self.x_axis.share(value)

    def _y(self, value: float) -> float:
        """The vertical position of a value, in pixels from the top."""
        return self.HEIGHT * (1 - self.y_axis.share(value))

    def _beyond(self) -> Iterator[str]:
        """A tinted area above the first mark."""
        for mark in self.marks[:1]:
            yield f'<rect class="beyond" x="0" y="0" width="100%" height="{self._y(mark.at):.1f}"/>'

    def _rows(self) -> Iterator[str]:
        yield '<g class="rows">'
        for value in self.y_axis.ticks:
            y = self._y(value)
            style = "axis" if value == self.y_axis.low else "grid"
            yield f'<line class="{style}" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>'
            yield _text("", "-8", f"{y + 4:.1f}", "end", self.y_axis.write(value))
        yield "</g>"

    def _columns(self) -> Iterator[str]:
        yield '<g class="columns">'
        for value in self.x_axis.ticks:
            x, label = f"{self._x(value):.3f}%", self.x_axis.write(value)
            # A long label would be cut off at the right edge if it were centred.
            anchor = "end" if self._x(value) > 90 and len(label) > 4 else "middle"
            yield f'<line class="axis" x1="{x}" x2="{x}" y1="{self.HEIGHT}" y2="{self.HEIGHT + 4}"/>'
            yield _text("", x, f"{self.HEIGHT + 18}", anchor, label)
        yield "</g>"
        if self.x_label:
            yield _text("", "50%", f"{self.HEIGHT + 38}", "middle", self.x_label)

    def _curves(self) -> Iterator[str]:
        yield f'<svg width="100%" height="{self.HEIGHT}" viewBox="0 0 100 {self.HEIGHT}" preserveAspectRatio="none">'
        for band in self.bands:
            yield f'<polygon class="b{band.hue}" points="{self._places([*band.lower, *reversed(band.upper)])}"/>'
        for line in self.lines:
            yield f'<polyline class="{line.style}" points="{self._places(line.points)}"/>'
        yield "</svg>"
        for line in self.lines:
            for point in line.points if line.has_dots else ():
                if point.y <= self.y_axis.high:
                    yield self._circle(f"c{line.hue}", point, 3.5)

    def _places(self, points: Iterable[Point]) -> str:
        digits = 3 if self.zoom else 1  # whoever zooms in sees rounded heights as steps
        return " ".join(f"{self._x(point.x):.3f},{self._y(point.y):.{digits}f}" for point in points)

    def _levels(self) -> Iterator[str]:
        """The lines of the marks. Labels are on the right, or on the left if the chosen point is near a right label."""
        x, anchor = "100%", "end"
        if self.chosen is not None and self._is_near_a_mark(self.chosen[0]) and self._x(self.chosen[0].x) > 60:
            x, anchor = "6", "start"
        for mark, shift in zip(self.marks, (-6, 16), strict=False):
            y = self._y(mark.at)
            yield f'<line class="{mark.style}" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>'
            yield _text("limit-text halo", x, f"{y + shift:.1f}", anchor, mark.label)

    def _ring(self) -> Iterator[str]:
        if self.chosen is None:
            return
        point, label = self.chosen
        yield self._circle("ring", point, 8)
        x, y = self._x(point.x), self._y(point.y)
        away, rise = (14, -4.0) if self._is_near_a_mark(point) else (0, 14.0)  # label beside or above the ring
        anchor, shift = ("end", -away) if x > 28 else ("start", away)
        yield (
            f'<text class="strong halo" x="{x:.3f}%" dx="{shift}" y="{y - rise:.1f}" text-anchor="{anchor}">'
            f"{escape(label)}</text>"
        )

    def _is_near_a_mark(self, point: Point) -> bool:
        return any(abs(self._y(mark.at) - self._y(point.y)) < 40 for mark in self.marks)

    def _circle(self, style: str, point: Point, radius: float) -> str:
        title = f"<title>{escape(point.label)}</title>" if point.label else ""
        place = f'cx="{self._x(point.x):.3f}%" cy="{self._y(point.y):.1f}"'
        return f'<circle class="{style}" {place} r="{radius:g}">{title}</circle>'


def ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Two or more round numbers that enclose a range, at equal distances of 1, 2 or 5 times a power of ten.

    Args:
        low: the range's lowest value; the first number is not above it.
        high: the range's highest value; the last number is not below it.
        whole: return only whole numbers.
    """
    least = (high - low) / _MOST_INTERVALS or abs(high) / _MOST_INTERVALS or 1.0
    if whole:
        least = max(1.0, least)
    power = 10.0 ** math.floor(math.log10(least))
    step = next(each * power for each in (1, 2, 5, 10) if each * power >= least * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def decimals(step: float) -> Callable[[float], str]:
    """A function that writes numbers with enough decimals to show a difference of ``step``.

    For a very large or a very small ``step``, it writes three significant digits, if need be with an exponent.
    """
    places = -math.floor(math.log10(step) + 1e-9)
    if -6 < places < 6:
        return lambda value: f"{value:.{max(0, places)}f}"
    return "{:.3g}".format
