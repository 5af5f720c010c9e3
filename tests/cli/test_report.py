"""``scalegpt report``: a page of one or several runs, also while they train, and its zoom in a real browser."""

import json
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from browser import browser, findings
from pages import Page, needs_nothing_else
from scalegpt.training.runs.report.live import LiveReport
from scalegpt.training.runs.report.read import find_run

ROOT = Path(__file__).resolve().parents[2]


def add(folder: Path, first: int, last: int) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        for step in range(first, last + 1):
            line = {"step": step, "tokens": step * 64, "loss": 5 - step / 1000, "lr": 1e-3, "grad_norm": 1.0}
            file.write(json.dumps({**line, "step_seconds": 0.5, "tokens_per_second": 128.0}) + "\n")
            if step % 100 == 0:
                file.write(json.dumps({"step": step, "tokens": step * 64, "val_loss": 5 - step / 1000}) + "\n")


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    found = []
    for name, layers, steps in (("one", 2, 1000), ("two", 4, 300)):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        add(folder, 1, steps)
        (folder / "config.yaml").write_text(
            f"name: {name}\nmodel: {{n_layer: {layers}, bias: true}}\ntrain: {{seed: 1}}\n"
        )
        (folder / "plan.json").write_text(json.dumps({"device": "cpu", "speed": {"tokens_per_second": 64.0}}))
        (folder / "samples.txt").write_text(f"--- step 100\nsample of {name} {'word' * 99}\n")
        status = {"state": "running", "step": steps, "predicted_total_bytes": 2**20, "measured_peak_bytes": 2**21}
        (folder / "run_status.json").write_text(json.dumps(status))
        found.append(folder)
    return found


def test_one_run_is_written_into_its_folder(runs: list[Path], call: Callable[..., str]) -> None:
    assert call("report", runs[0]) == f"{runs[0] / 'report.html'}\n"
    source = (runs[0] / "report.html").read_text(encoding="utf-8")
    needs_nothing_else(source, Page(source), scripts=1)
    text = Page(source).text
    assert "one: running after 1,000 steps" in text
    assert "memory, prediction-50.0%" in text
    assert "tokens per second, prediction-50.0%" in text
    assert "data-live" not in source.partition("<script>")[0]


def test_several_runs_are_laid_over_one_another(runs: list[Path], call: Callable[..., str], tmp_path: Path) -> None:
    call("report", *runs, "--out", tmp_path / "both.html")
    source = (tmp_path / "both.html").read_text(encoding="utf-8")
    page = Page(source)
    needs_nothing_else(source, page, scripts=1)
    loss = re.search(r'<svg class="lines"[^>]*aria-labelledby="loss-t loss-d".*?</svg>.*?</svg>', source)
    assert loss is not None
    assert re.findall(r'<polyline class="curve (s\d)', loss[0]) == ["s1", "s2"]
    differ = page.text.partition("Settings that differ")[2].partition("Environment")[0]
    assert "n_layer24" in differ
    assert "bias" not in differ
    identities = [value for name, value in page.attributes if name == "id"]
    assert len(identities) == len(set(identities))
    assert call("report", *runs) == f"{tmp_path / 'runs' / 'report.html'}\n"


def test_runs_of_one_name_are_told_apart(runs: list[Path], call: Callable[..., str], tmp_path: Path) -> None:
    call("report", runs[0], runs[0], "--out", tmp_path / "same.html")
    text = Page((tmp_path / "same.html").read_text(encoding="utf-8")).text
    assert "one (1)one (2)" in text
    assert "Settings that differNone." in text


def test_files_that_are_missing_or_damaged_leave_gaps(runs: list[Path], call: Callable[..., str]) -> None:
    for name in ("config.yaml", "plan.json", "run_status.json", "samples.txt"):
        (runs[0] / name).unlink()
    with (runs[0] / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\x00{"step": 1001, "loss": ')
    call("report", runs[0])
    text = Page((runs[0] / "report.html").read_text(encoding="utf-8")).text
    assert "one: state unknown after 1,000 steps" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["no/such/run"], "no/such/run is not a run: there is no such folder"),
        (["{folder}"], "is not a run: it has neither metrics.jsonl nor config.yaml"),
        (["{empty}"], "has nothing to report: no step is in its metrics.jsonl"),
        (["{garbage}"], "has nothing to report: no step is in its metrics.jsonl"),
        (["{run}"] * 13, "13 runs are too many for one page; give at most 12"),
        (["{run}", "--out", "{folder}"], "cannot be written: Is a directory"),
        (["{run}", "--port", "80"], "--port is the port of the page that --live serves"),
        (["{run}", "--live", "--port", "66000"], "port 66000 is not a port"),
        (["{run}", "--live", "--out", "x.html"], "--live serves the page and --out writes it"),
    ],
)
def test_what_cannot_be_shown_is_one_line(
    words: list[str], said: str, runs: list[Path], call: Callable[..., str], tmp_path: Path
) -> None:
    folders = {"folder": tmp_path, "run": runs[0], "empty": tmp_path / "empty", "garbage": tmp_path / "garbage"}
    for name in ("empty", "garbage"):
        folders[name].mkdir()
        (folders[name] / "metrics.jsonl").write_bytes(b"" if name == "empty" else bytes(range(256)) * 9)
    error = call("report", *(word.format(**folders) for word in words), status=2)
    assert error.startswith("scalegpt report: error: ")
    assert error.count("\n") == 1
    assert said in error


# --- live ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def live(runs: list[Path]) -> Iterator[LiveReport]:
    server = LiveReport([find_run(run) for run in runs], 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def fetch(address: str, **headers: str) -> str:
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=10) as answer:
        return str(answer.read().decode())


def test_the_live_page_follows_the_files(live: LiveReport, runs: list[Path]) -> None:
    before = fetch(live.address + "version")
    assert f'<main data-live="{before}">' in fetch(live.address).replace("'", '"')
    assert fetch(live.address + "version") == before
    add(runs[1], 301, 400)
    assert fetch(live.address + "version") != before
    assert "<td>400</td>" in fetch(live.address)


@pytest.mark.parametrize(("path", "host", "status"), [("", "evil.example:80", 403), ("../config.yaml", None, 404)])
def test_the_live_server_gives_nothing_else(live: LiveReport, path: str, host: str | None, status: int) -> None:
    with pytest.raises(urllib.error.HTTPError) as raised:
        fetch(live.address + path, **({} if host is None else {"Host": host}))
    assert raised.value.code == status


def test_the_command_serves_until_it_is_interrupted(runs: list[Path]) -> None:
    command = [sys.executable, "-m", "scalegpt", "report", str(runs[0]), "--live"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    address = process.stdout.readline().split()[0]
    assert "one: running after 1,000 steps" in fetch(address)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == "scalegpt report: error: interrupted\n"
    assert process.returncode == 130


# --- in a browser ----------------------------------------------------------------------------------------------------


def test_a_browser_zooms_and_a_phone_shows_all(
    runs: list[Path], live: LiveReport, call: Callable[..., str], tmp_path: Path
) -> None:
    path = tmp_path / "both.html"
    call("report", *runs, "--out", path)
    with browser() as opened:
        for scheme, width in (("light", 390), ("dark", 1280)):
            page: Any = opened.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
            errors: list[str] = []
            page.on("pageerror", lambda error, errors=errors: errors.append(str(error)))
            page.goto(path.as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") == width
            assert findings(page) == []
            check_zoom(page)
            assert errors == []
            page.close()
        page = opened.new_page()
        page.goto(live.address)
        page.fill("input[name=to]", "150")
        page.press("input[name=to]", "Enter")
        add(runs[1], 301, 1200)
        page.wait_for_selector("text=1,200", timeout=20_000)
        assert page.inner_text("output") == "steps 0 to 150"  # what was zoomed in stays so


def check_zoom(page: Any) -> None:
    """Zoom with the keyboard, with the buttons and by dragging, and look at the axis, the curve and the dots."""
    chart = page.locator("svg[data-zoom]").first
    box = chart.locator("svg")
    assert box.get_attribute("viewBox") == "0 0 100 300"
    page.fill("input[name=from]", "200")
    page.fill("input[name=to]", "400")
    page.press("input[name=to]", "Enter")
    assert page.inner_text("output") == "steps 200 to 400"
    assert chart.locator(".columns text").all_text_contents() == [
        "200",
        "250",
        "300",
        "350",
        "400",
    ]
    x, _, wide, _ = map(float, box.get_attribute("viewBox").split())
    assert x + 0.02 * wide == pytest.approx(2 + 96 * 0.2)
    assert x + 0.98 * wide == pytest.approx(2 + 96 * 0.4)
    dots = page.locator("svg[data-zoom]").nth(1).locator("circle")
    assert sum(dot.is_visible() for dot in dots.all()) == 3 + 2  # steps 200, 300 and 400 of one run, two of the other
    page.focus("button[name=later]")
    page.keyboard.press("Enter")
    assert page.inner_text("output") == "steps 300 to 500"
    page.click("button[name=all]")
    assert page.inner_text("output") == "all steps"
    assert box.get_attribute("viewBox") == "0 0 100 300"
    chart.scroll_into_view_if_needed()
    area = chart.bounding_box()
    page.mouse.move(area["x"] + 0.26 * area["width"], area["y"] + 150)
    page.mouse.down()
    page.mouse.move(area["x"] + 0.5 * area["width"], area["y"] + 160, steps=2)
    page.mouse.up()
    assert page.inner_text("output") == "steps 250 to 500"
    page.click("button[name=all]")
