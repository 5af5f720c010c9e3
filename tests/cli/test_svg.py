"""Charts: every part has its place, names are shown only where they fit, and nothing lies outside."""

import re

import pytest

from pages import Page
from scalegpt.html.svg import Axis, Caption, Chart, Line, Mark, Point, Slice, small_bar, stack, ticks

CAPTION = Caption("key", "a <title>", "a description & more")


def _names(picture: str) -> list[tuple[str, str]]:
    return re.findall(r'<text class="(inside[ a-z]*)"[^>]*>([^<]*)<', picture)


def test_names_are_shown_where_they_fit() -> None:
    slices = [Slice("wide", 60, "", "c1"), Slice("twelve chars", 30, "", "c2"), Slice("narrow", 1, "", "c3")]
    picture = stack(CAPTION, slices, 100)
    Page(picture)
    assert _names(picture) == [("inside", "wide"), ("inside", "twelve chars")]
    assert _names(stack(CAPTION, slices, 200)) == [("inside", "wide"), ("inside wide", "twelve chars")]
    assert "<title>narrow: </title>" in picture  # a part too narrow for its name is named when pointed at


def test_no_name_is_crossed_by_a_mark() -> None:
    slices = [Slice("crossed", 50, "", "c1"), Slice("not crossed", 50, "", "c2")]
    marks = [Mark(25, "limit", "limit"), Mark(99, "margin", "margin")]
    assert [name for _, name in _names(stack(CAPTION, slices, 100, "head", marks))] == ["not crossed"]


def test_words_are_escaped() -> None:
    picture = stack(CAPTION, [Slice("a <b>", 1, "c & d", "c1")], 1, "e <f>", [Mark(1, "g > h", "limit")])
    page = Page(picture)
    assert {"b", "f"}.isdisjoint(page.tags)
    for words in ("a <title>", "a description & more", "a <b>: c & d", "e <f>", "g > h"):
        assert words in page.text


@pytest.mark.parametrize(("share", "width"), [(0.5, "50.00%"), (-1, "0.00%"), (2, "100.00%")])
def test_a_bar_stays_in_its_cell(share: float, width: str) -> None:
    assert f'width="{width}"' in small_bar(share, "c1")


def _chart(points: list[Point], chosen: Point, top: float = 100) -> str:
    marks = [Mark(0.8 * top, "limit", "limit"), Mark(0.75 * top, "margin", "margin")]
    x_axis = Axis(0, max(point.x for point in points), [0], str)
    return Chart(
        CAPTION, [Line(1, points)], x_axis, Axis(0, top, [0], str), marks, (chosen, "this one"), "x_label"
    ).draw()


def test_points_above_the_chart_are_not_drawn() -> None:
    points = [Point(0, 10, "low"), Point(1, 90, "high"), Point(2, 500, "beyond")]
    picture = _chart(points, points[0])
    Page(picture)
    assert "<title>high</title>" in picture
    assert "<title>beyond</title>" not in picture
    assert ",-1200.0" in picture  # the line leads to it, and is cut off where the chart ends


@pytest.mark.parametrize(
    ("chosen", "anchor", "of_marks"),
    [(Point(0, 10), "start", "end"), (Point(6, 10), "end", "end"), (Point(6, 78), "end", "start")],
)
def test_labels_do_not_overlap(chosen: Point, anchor: str, of_marks: str) -> None:
    picture = _chart([Point(0, 5), Point(6, 80)], chosen)
    assert re.search(rf'text-anchor="{anchor}">this one<', picture)
    for mark in ("limit", "margin"):
        assert re.search(rf'text-anchor="{of_marks}">{mark}<', picture)


def test_a_chart_of_one_place_has_it_in_the_middle() -> None:
    picture = _chart([Point(0, 10, "alone")], Point(0, 10, "alone"))
    assert re.findall(r'<circle[^>]* cx="([\d.]+)%"', picture) == ["50.000"] * 2


@pytest.mark.parametrize("right", [9, 1000, 12_345, 1_000_000, 123_456_789])
@pytest.mark.parametrize("width", [320, 760])
def test_no_label_is_cut_off(right: int, width: int) -> None:
    """On a phone and on a desktop: a digit is at most 7 wide at this size of type; the chart has margins of 60 and 12."""
    x_axis = Axis(0, right, [each for each in ticks(0, right, whole=True) if each <= right], "{:,.0f}".format)
    y_axis = Axis(-1e9, 1e9, ticks(-1e9, 1e9), "{:.3g}".format)
    picture = Chart(CAPTION, [Line(1, [Point(0, 1e9), Point(right, -1e9)])], x_axis, y_axis).draw()
    labels = re.findall(r'<text x="(-?[\d.]+)(%?)" y="[\d.]+" text-anchor="(\w+)">([^<]*)', picture)
    assert len(labels) == picture.count("<text") >= 4  # two on each axis
    for place, percent, anchor, text in labels:
        x = float(place) * (width - 72) / 100 if percent else float(place)
        left = x - {"end": 7, "middle": 3.5}[anchor] * len(text)
        assert left >= -60, text
        assert left + 7 * len(text) <= width - 60, text
