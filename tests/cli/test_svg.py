"""Pictures: every part has its place, names stand only where they have room, and nothing lies outside."""

import re

import pytest

from pages import Page
from scalegpt.html.svg import Chart, Line, Mark, Point, Slice, Words, _step, small_bar, stack

WORDS = Words("key", "a <title>", "a description & more")


def _names(picture: str) -> list[tuple[str, str]]:
    return re.findall(r'<text class="(inside[ a-z]*)"[^>]*>([^<]*)<', picture)


def test_names_stand_where_they_have_room() -> None:
    slices = [Slice("wide", 60, "", "c1"), Slice("twelve chars", 30, "", "c2"), Slice("narrow", 1, "", "c3")]
    picture = stack(WORDS, slices, 100)
    Page(picture)
    assert _names(picture) == [("inside", "wide"), ("inside", "twelve chars")]
    assert _names(stack(WORDS, slices, 200)) == [("inside", "wide"), ("inside wide", "twelve chars")]
    assert "<title>narrow: </title>" in picture  # a part too narrow for its name is named when pointed at


def test_no_name_is_crossed_by_a_mark() -> None:
    slices = [Slice("crossed", 50, "", "c1"), Slice("not crossed", 50, "", "c2")]
    marks = [Mark(25, "limit", "limit"), Mark(99, "margin", "margin")]
    assert [name for _, name in _names(stack(WORDS, slices, 100, "head", marks))] == ["not crossed"]


def test_words_are_escaped() -> None:
    picture = stack(WORDS, [Slice("a <b>", 1, "c & d", "c1")], 1, "e <f>", [Mark(1, "g > h", "limit")])
    page = Page(picture)
    assert {"b", "f"}.isdisjoint(page.tags)
    for words in ("a <title>", "a description & more", "a <b>: c & d", "e <f>", "g > h"):
        assert words in page.text


@pytest.mark.parametrize(("share", "width"), [(0.5, "50.00%"), (-1, "0.00%"), (2, "100.00%")])
def test_a_bar_stays_in_its_cell(share: float, width: str) -> None:
    assert f'width="{width}"' in small_bar(share, "c1")


def _chart(points: list[Point], chosen: Point, top: float = 100) -> str:
    marks = [Mark(0.8 * top, "limit", "limit"), Mark(0.75 * top, "margin", "margin")]
    return Chart(WORDS, [Line(1, points)], marks, chosen, "this one", "along", "GiB", top).draw()


def test_points_above_the_picture_are_left_out() -> None:
    points = [Point(1, 10, "low"), Point(2, 90, "high"), Point(4, 500, "beyond")]
    picture = _chart(points, points[0])
    Page(picture)
    assert "<title>high</title>" in picture
    assert "<title>beyond</title>" not in picture
    assert ",-1200.0" in picture  # the line goes on to it, and is cut off where the picture ends


@pytest.mark.parametrize(
    ("chosen", "anchor", "of_marks"),
    [(Point(1, 10, ""), "start", "end"), (Point(64, 10, ""), "end", "end"), (Point(64, 78, ""), "end", "start")],
)
def test_names_keep_out_of_each_others_way(chosen: Point, anchor: str, of_marks: str) -> None:
    picture = _chart([Point(1, 5, ""), Point(64, 80, "")], chosen)
    assert re.search(rf'text-anchor="{anchor}">this one<', picture)
    for mark in ("limit", "margin"):
        assert re.search(rf'text-anchor="{of_marks}">{mark}<', picture)


@pytest.mark.parametrize("largest", [1, 2, 48, 1000, 65_536])
def test_there_are_few_powers_along_it(largest: int) -> None:
    point = Point(largest, 10, "")
    powers = [int(each) for each in re.findall(r'text-anchor="middle">(\d+)<', _chart([point], point))]
    assert 1 <= len(powers) <= 11
    assert powers[0] == 1
    assert all(power <= largest and power & (power - 1) == 0 for power in powers)


@pytest.mark.parametrize("top", [0.01, 0.9, 1, 6, 7, 23.5, 60, 100, 1e6])
def test_values_up_it_are_round_and_few(top: float) -> None:
    step = _step(top)
    assert 2 <= top / step <= 6
    assert f"{step:e}"[0] in "125"
