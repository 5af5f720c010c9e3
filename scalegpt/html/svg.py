"""Pictures for a page: a bar of parts, and lines over powers of two, as SVG whose text does not shrink with the page.

Places along a picture are shares of its width, those down it are pixels: it becomes as wide as there is room for, and text
and strokes keep their size, on a phone as in print. Every picture is described in words, and its numbers are to stand in a
table beside it. Colours are classes ``c1``, ``c2``, …, see :data:`STYLE`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from scalegpt.html.page import HUES, escape

STYLE = """
svg{display:block;width:100%}svg.swatch{display:inline-block;width:12px;margin-right:.5rem;vertical-align:-1px}
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
""" + "".join(f".c{hue}{{fill:var(--c{hue})}}.s{hue}{{stroke:var(--c{hue})}}" for hue in range(1, HUES + 1))

_WIDE, _NARROW, _LETTER = 760, 330, 7.2
"""Pixels of a bar on a desktop and on a phone, and of a letter: what a part's name needs to stand within it."""

_ABOVE, _BAR, _BELOW = 34, 38, 20
"""Pixels of a bar's marks over it, of the bar, and of those under it."""


@dataclass(frozen=True)
class Slice:
    """A part of a bar.

    Attributes:
        name: what it is.
        size: how much of it.
        label: the same in words.
        style: its class.
    """

    name: str
    size: float
    label: str
    style: str


@dataclass(frozen=True)
class Mark:
    """A value that is marked: across a bar, or along a chart.

    Attributes:
        at: the value.
        label: what it is.
        style: its class: ``limit`` or ``margin``.
    """

    at: float
    label: str
    style: str


@dataclass(frozen=True)
class Point:
    """A point of a chart: its place, and what it says when pointed at."""

    x: float
    y: float
    label: str


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        hue: the number of its colour, and of its dashes: 1 has none, 4 long ones, 3 short ones.
        points: its points, in rising order.
    """

    hue: int
    points: Sequence[Point]

    @property
    def style(self) -> str:
        """Its class."""
        return f"curve s{self.hue} dash{self.hue}"


@dataclass(frozen=True)
class Words:
    """What describes a picture to those who do not see it.

    Attributes:
        key: tells it from the others of its page.
        title: what it shows.
        description: what is to be seen.
    """

    key: str
    title: str
    description: str

    def open(self, kind: str, height: int) -> str:
        """The tag that begins the picture, and its description."""
        return (
            f'<svg class="{kind}" height="{height}" role="img" aria-labelledby="{self.key}-t {self.key}-d">'
            f'<title id="{self.key}-t">{escape(self.title)}</title><desc id="{self.key}-d">{escape(self.description)}</desc>'
        )


def swatch(style: str) -> str:
    """A small square in the colour of a part, for the table beside the picture."""
    return f'<svg class="swatch" height="12" aria-hidden="true"><rect class="{style}" width="12" height="12" rx="2"/></svg>'


def sample(style: str) -> str:
    """A short piece of a line of that class, for the words beside the picture."""
    return f'<svg class="sample" height="12" aria-hidden="true"><line class="{style}" x2="30" y1="6" y2="6"/></svg>'


def small_bar(share: float, style: str) -> str:
    """A share from 0 to 1 as a bar in a cell of a table that has the number too."""
    width = f"{100 * min(1.0, max(0.0, share)):.2f}%"
    return f'<svg height="12" aria-hidden="true"><rect class="{style}" width="{width}" height="12" rx="2"/></svg>'


# --- a bar of parts --------------------------------------------------------------------------------------------------


def stack(words: Words, slices: Sequence[Slice], whole: float, head: str = "", marks: Sequence[Mark] = ()) -> str:
    """A bar of parts, one after the other.

    Args:
        words: its description.
        slices: the parts.
        whole: what the whole width stands for; parts and marks lie within it.
        head: what stands over the bar.
        marks: values marked across the bar; the first is named over it, the second under it.
    """
    top = _ABOVE if head or marks else 0
    height = top + _BAR + (_BELOW if len(marks) > 1 else 2)
    drawn = [words.open("stack", height)]
    if head:
        drawn.append(f'<text class="strong" x="0" y="12">{escape(head)}</text>')
    start = 0.0
    for each in slices:
        drawn += _slice(each, start / whole, each.size / whole, top, [mark.at / whole for mark in marks])
        start += each.size
    drawn.append(f'<rect class="whole" x="0" y="{top}" width="100%" height="{_BAR}"/>')
    drawn += [_down("edge", mark.at / whole, top) for mark in marks]
    for mark, y in zip(marks, (top - 6, top + _BAR + 16), strict=False):
        drawn += _across(mark, mark.at / whole, top, y)
    return "".join([*drawn, "</svg>"])


def _slice(each: Slice, start: float, share: float, top: int, marks: Sequence[float]) -> Iterator[str]:
    """A part of a bar, with its name where that has room and no mark runs through it."""
    place = f'x="{100 * start:.3f}%" width="{100 * share:.3f}%"'
    yield (
        f'<rect class="slice {each.style}" {place} y="{top}" height="{_BAR}">'
        f"<title>{escape(each.name)}: {escape(each.label)}</title></rect>"
    )
    needed, middle = _LETTER * len(each.name) + 8, start + share / 2
    room = min([share / 2, *(abs(middle - mark) for mark in marks)])
    if needed / 2 <= room * _WIDE:
        kind = "inside" if needed / 2 <= room * _NARROW else "inside wide"
        x, y = f"{100 * middle:.3f}%", top + _BAR / 2 + 4
        yield f'<text class="{kind}" x="{x}" y="{y:g}" text-anchor="middle">{escape(each.name)}</text>'


def _across(mark: Mark, share: float, top: int, y: int) -> Iterator[str]:
    x = f"{100 * share:.3f}%"
    anchor = "end" if share > 0.5 else "start"
    yield _down(mark.style, share, top)
    yield f'<text class="limit-text" x="{x}" y="{y}" text-anchor="{anchor}">{escape(mark.label)}</text>'


def _down(style: str, share: float, top: int) -> str:
    """A line down across the bar."""
    x = f"{100 * share:.3f}%"
    return f'<line class="{style}" x1="{x}" x2="{x}" y1="{top - 4}" y2="{top + _BAR + 4}"/>'


# --- lines over powers of two ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chart:
    """Lines over powers of two.

    Attributes:
        words: its description.
        lines: the lines.
        marks: values marked along the chart; the first is named over its line, the second under it.
        chosen: the point that is ringed.
        chosen_label: its name.
        x_label: what is along it.
        unit: of what is up it.
        top: the largest value there is room for; lines leave the picture above it.
    """

    words: Words
    lines: Sequence[Line]
    marks: Sequence[Mark]
    chosen: Point
    chosen_label: str
    x_label: str
    unit: str
    top: float

    HEIGHT = 300

    def draw(self) -> str:
        """The picture."""
        return "".join([
            self.words.open("lines", self.HEIGHT),
            *self._beyond(),
            *self._values(),
            *self._powers(),
            *self._curves(),
            *self._levels(),
            *self._ring(),
            "</svg>",
        ])  # fmt: skip

    @property
    def _doublings(self) -> float:
        return math.log2(max(point.x for line in self.lines for point in line.points))

    def _x(self, value: float) -> float:
        """The place along the picture, in percent of its width."""
        return 2 + 96 * math.log2(value) / self._doublings if self._doublings else 50.0

    def _y(self, value: float) -> float:
        """The place down the picture, in pixels."""
        return self.HEIGHT * (1 - value / self.top)

    def _beyond(self) -> Iterator[str]:
        """The part of the picture above the first mark."""
        for mark in self.marks[:1]:
            yield f'<rect class="beyond" x="0" y="0" width="100%" height="{self._y(mark.at):.1f}"/>'

    def _values(self) -> Iterator[str]:
        step = _step(self.top)
        for place in range(math.floor(self.top / step) + 1):
            y = self._y(place * step)
            yield f'<line class="{"grid" if place else "axis"}" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>'
            yield f'<text x="-8" y="{y + 4:.1f}" text-anchor="end">{place * step:g} {self.unit}</text>'

    def _powers(self) -> Iterator[str]:
        last = math.floor(self._doublings)
        for power in range(0, last + 1, 1 + last // 10):
            x = f"{self._x(2**power):.3f}%"
            yield f'<line class="axis" x1="{x}" x2="{x}" y1="{self.HEIGHT}" y2="{self.HEIGHT + 4}"/>'
            yield f'<text x="{x}" y="{self.HEIGHT + 18}" text-anchor="middle">{2**power}</text>'
        yield f'<text x="50%" y="{self.HEIGHT + 38}" text-anchor="middle">{escape(self.x_label)}</text>'

    def _curves(self) -> Iterator[str]:
        yield f'<svg width="100%" height="{self.HEIGHT}" viewBox="0 0 100 {self.HEIGHT}" preserveAspectRatio="none">'
        for line in self.lines:
            places = " ".join(f"{self._x(point.x):.3f},{self._y(point.y):.1f}" for point in line.points)
            yield f'<polyline class="{line.style}" points="{places}"/>'
        yield "</svg>"
        for line in self.lines:
            for point in line.points:
                if point.y <= self.top:
                    yield (
                        f'<circle class="c{line.hue}" {self._place(point)} r="3.5">'
                        f"<title>{escape(point.label)}</title></circle>"
                    )

    def _levels(self) -> Iterator[str]:
        """The marks, named on the right, where lines have left the picture, unless the chosen point is there."""
        left = self._near_a_mark() and self._x(self.chosen.x) > 60
        x, anchor = ("6", "start") if left else ("100%", "end")
        for mark, shift in zip(self.marks, (-6, 16), strict=False):
            y = self._y(mark.at)
            yield f'<line class="{mark.style}" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>'
            yield (
                f'<text class="limit-text halo" x="{x}" y="{y + shift:.1f}" text-anchor="{anchor}">'
                f"{escape(mark.label)}</text>"
            )

    def _ring(self) -> Iterator[str]:
        x, y = self._x(self.chosen.x), self._y(self.chosen.y)
        yield f'<circle class="ring" {self._place(self.chosen)} r="8"><title>{escape(self.chosen.label)}</title></circle>'
        near = self._near_a_mark()
        away, rise = (14, -4.0) if near else (0, 14.0)  # beside the ring, or over it where nothing else is
        anchor, shift = ("end", -away) if x > 28 else ("start", away)
        yield (
            f'<text class="strong halo" x="{x:.3f}%" dx="{shift}" y="{y - rise:.1f}" text-anchor="{anchor}">'
            f"{escape(self.chosen_label)}</text>"
        )

    def _near_a_mark(self) -> bool:
        return any(abs(self._y(mark.at) - self._y(self.chosen.y)) < 40 for mark in self.marks)

    def _place(self, point: Point) -> str:
        return f'cx="{self._x(point.x):.3f}%" cy="{self._y(point.y):.1f}"'


def _step(top: float) -> float:
    """A round distance of at most six lines up to a value.

    >>> [_step(top) for top in (0.9, 7, 48, 100)]
    [0.2, 2, 10, 20]
    """
    power = 10.0 ** math.floor(math.log10(top / 6))
    return next(times * power for times in (1, 2, 5, 10) if top / (times * power) <= 6)
