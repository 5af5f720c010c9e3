"""``report.html``: one page that is well formed, needs nothing else, and shows what the run's files say."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pages import Page, needs_nothing_else
from scalegpt.config.presets import resolve
from scalegpt.html.page import PALETTE
from scalegpt.html.svg import decimals, ticks
from scalegpt.training.runs.directory import RunDirectory
from scalegpt.training.runs.report.curves import Curve, chart, thinned
from scalegpt.training.runs.report.page import write_report
from scalegpt.training.runs.report.read import read_run


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    made = RunDirectory(tmp_path / "a-run")
    made.create(resolve(flags={"sample_prompt": "</pre><script>alert(1)</script>"}, name="a-run"), {})
    made.write_status(
        state="finished", step=3, cause="all <steps> taken & done", val_loss=2.5, best_val_loss=2.25,
        measured_peak_bytes=300 * 2**20,
    )  # fmt: skip
    return made


def add_steps(directory: RunDirectory, count: int, **changes: Any) -> None:
    line = {"loss": 3.0, "tokens_per_second": 20_000.0, "step_seconds": 0.5, **changes}
    with directory.metrics.open("a") as file:
        for step in range(1, count + 1):
            file.write(json.dumps({"step": step, "tokens": step * 100, **line}) + "\n")
        file.write(json.dumps({"step": count, "tokens": count * 100, "val_loss": 2.5}) + "\n")


def page_of(directory: RunDirectory) -> tuple[str, Page]:
    write_report(directory)
    source = directory.report.read_text(encoding="utf-8")
    return source, Page(source)


def test_the_figures_are_those_of_the_files(directory: RunDirectory) -> None:
    add_steps(directory, 3)
    directory.add_sample(1, "early")
    directory.add_sample(3, "late")
    _, page = page_of(directory)
    for words in (
        "a-run: finished after 3 steps", "all <steps> taken & done", "tokens300", "time in steps2 s",
        "median tokens per second20.0k", "last training loss3.0000", "held-out loss2.5000", "best held-out loss2.2500",
        "memory, measured on rank 0300 MiB", "Sample after 1 stepsearly", "Sample after 3 stepslate",
        "learning_rate: 0.001",
    ):  # fmt: skip
        assert words in page.text
    assert page.attributes.count(("role", "img")) == 2  # loss and tokens per second; the others have no point
    assert page.tags.count("circle") == 1


def test_the_page_needs_nothing_else(directory: RunDirectory) -> None:
    add_steps(directory, 3)
    source, page = page_of(directory)
    assert source.startswith("<!doctype html>")
    needs_nothing_else(source, page, scripts=1)


def test_light_and_dark(directory: RunDirectory) -> None:
    source, _ = page_of(directory)
    assert "color-scheme:light dark" in source
    assert "prefers-color-scheme:dark" in source
    colours = Counter(re.findall(r"--([a-z]+[0-9]*):#", source))
    assert colours == dict.fromkeys(PALETTE, 2)  # each has one for either


def test_what_a_model_or_a_user_wrote_stays_text(directory: RunDirectory) -> None:
    directory.add_sample(3, "</pre><script>alert('sample')</script>&amp;")
    source, page = page_of(directory)
    assert page.tags.count("script") == source.count("<script") == 1
    assert "</pre><script>alert('sample')</script>&amp;" in page.text


def test_without_steps_or_numbers_there_is_still_a_page(directory: RunDirectory) -> None:
    _, page = page_of(directory)
    assert page.attributes.count(("role", "img")) == 0
    add_steps(directory, 2, loss=None)
    directory.write_status(state="failed", step=0, cause=None, val_loss=None, best_val_loss=None, measured_peak_bytes=0)
    _, page = page_of(directory)
    assert "last training loss?" in page.text
    assert "held-out loss?" in page.text


def test_figures_and_curves_are_read(directory: RunDirectory) -> None:
    add_steps(directory, 2)
    run = read_run(directory)
    assert run.curves["loss"] == [(1, 3.0), (2, 3.0)]
    assert run.curves["val_loss"] == [(2, 2.5)]
    assert (run.step, run.seconds, run.tokens, run.speed, run.last("lr")) == (3, 1.0, 200, 20_000.0, None)


def test_a_thinned_curve_hides_no_value() -> None:
    points = [(float(step), float(step % 7)) for step in range(1, 1001)]
    points[499] = (500.0, 99.0)
    means, lowest, highest = thinned(points, most=100)
    assert len(means) == len(lowest) == len(highest) == 100
    assert means[0] == (10.0, sum(step % 7 for step in range(1, 11)) / 10)
    assert highest[49] == (500.0, 99.0)
    assert min(value for _, value in lowest) == 0.0
    assert means[-1][0] == 1000.0
    assert thinned(points[:50], most=100).means == points[:50]
    assert thinned([]).means == []


def test_the_band_and_the_axis_reach_the_outliers() -> None:
    points = [(float(step), 1.0) for step in range(1, 1001)]
    points[499] = (500.0, 40.0)
    picture = chart("key", "title", [Curve("run", points, 1)])
    Page(picture)
    assert picture.count("<polygon") == 1
    assert 'data-y="0.0 40.0"' in picture
    assert "the mean of up to 3 steps" in picture
    assert "<polygon" not in chart("key", "title", [Curve("run", points[:300], 1)])


@pytest.mark.parametrize("points", [[(0.0, 1.0)], [(5.0, 2.0), (10.0, 2.0)], [(1.0, -1e9), (2.0, 1e9)]])
def test_every_point_lies_within_the_picture(points: list[tuple[float, float]]) -> None:
    picture = chart("key", "title", [Curve("one", points, 1), Curve("two", points, 2, has_dots=True)])
    Page(picture)
    assert "nan" not in picture
    places = re.findall(r"(-?[\d.]+),(-?[\d.]+)", " ".join(re.findall('points="([^"]*)"', picture)))
    assert len(places) == 2 * len(points)  # of the line and of the dots
    assert picture.count("<circle") == len(points)
    for x, y in places:
        assert 0 <= float(x) <= 100
        assert 0 <= float(y) <= 300


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (4.27, 5.26, [4.2, 4.4, 4.6, 4.8, 5.0, 5.2, 5.4]),
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0, 812, [0, 200, 400, 600, 800, 1000]),
        (2.0, 2.0, [2.0, 2.5]),
        (0, 0, [0, 1]),
        (-3, 4, [-4, -2, 0, 2, 4]),
        (1e-9, 3e-9, [1e-9, 1.5e-9, 2e-9, 2.5e-9, 3e-9]),
    ],
)
def test_axes_have_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize("right", [1, 2, 3, 4, 7, 60, 999, 1_000_000, 10**12])
def test_steps_are_whole_and_few(right: int) -> None:
    found = ticks(0, right, whole=True)
    assert all(each == int(each) for each in found)
    assert 2 <= len(found) <= 8
    assert found[-1] >= right


def test_neighbours_differ() -> None:
    assert [decimals(0.005)(value) for value in (2.0, 2.005)] == ["2.000", "2.005"]
    assert [decimals(2000.0)(value) for value in (2000.0, 4000.0)] == ["2000", "4000"]
    assert decimals(1e8)(1e9) == "1e+09"
