"""``scalegpt plan --html``: a page that needs nothing else, whose pictures and tables have the figures of the answer."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pages import Page, needs_nothing_else
from scalegpt.cli.main import main
from scalegpt.cli.plan import command as command
from scalegpt.hardware import detect
from scalegpt.hardware.gpus import GIB
from scalegpt.hardware.machine import Machine
from scalegpt.html.page import HUES, PALETTE
from scalegpt.plan_page import page as plan_page
from scalegpt.plan_page.wording import duration
from scalegpt.planner.memory import timeline as kinds
from scalegpt.planner.time import step_time, work
from scalegpt.units import gib

ROOT = Path(__file__).resolve().parents[2]

FITS = "--preset 500M_1024 --gpu a100-40gb"
EIGHT = "--preset 350M_1024 --gpu 4090 --gpus 8"
FIXED = "--preset 500M_1024 --gpu 3060 --backend plain --micro_batch 64 --recompute none"
UNNAMED = "--preset 150M_1024 --memory_gb 12"
NOTHING = "--preset 500M_1024 --memory_gb 2 --backend plain --recompute none --gpus 1"
STATUS = {FITS: 0, EIGHT: 0, FIXED: 3, UNNAMED: 0}


class Written:
    """A page, and the answer in JSON that the same command printed."""

    def __init__(self, source: str, answer: Any) -> None:
        self.source, self.answer, self.choice = source, answer, answer["choice"]
        self.page = Page(source)
        self.text = self.page.text
        body = source[source.index("<main>") : source.index("</main>") + len("</main>")]
        self.main = ET.fromstring(body)

    def picture(self, key: str) -> ET.Element:
        """The picture with that key."""
        return next(each for each in self.main.iter("svg") if each.get("aria-labelledby") == f"{key}-t {key}-d")

    def table(self, label: str) -> list[list[str]]:
        """The rows of a table, as text."""
        region = next(each for each in self.main.iter("div") if each.get("aria-label") == label)
        return [["".join(cell.itertext()) for cell in row] for row in region.iter("tr")]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALEGPT_CACHE", str(tmp_path / "cache"))
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")


@pytest.fixture
def written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Written]:
    """Run the command with ``--json`` and ``--html``."""

    def run(words: str, status: int | None = None) -> Written:
        capsys.readouterr()
        path = tmp_path / "page.html"
        expected = STATUS.get(words, 0) if status is None else status
        assert main(["plan", *shlex.split(words), "--json", "--html", str(path)]) == expected
        return Written(path.read_text(encoding="utf-8"), json.loads(capsys.readouterr().out))

    return run


def percent(value: str | None) -> float:
    assert value is not None
    assert value.endswith("%")
    return float(value[:-1])


# --- the page as such ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", STATUS)
def test_the_page_is_well_formed_and_needs_no_network(written: Any, words: str) -> None:
    made = written(words)
    assert made.source.startswith("<!doctype html>")
    needs_nothing_else(made.source, made.page)
    assert made.page.tags.count("h1") == 1
    identities = [value for name, value in made.page.attributes if name == "id"]
    assert len(identities) == len(set(identities))
    pictures = [each for each in made.main.iter("svg") if each.get("role") == "img"]
    assert len(pictures) == (2 if words == UNNAMED else 3)
    for picture in pictures:  # described by words that are there
        said = [made.main.find(f".//*[@id='{each}']") for each in str(picture.get("aria-labelledby")).split()]
        assert [each.tag for each in said if each is not None and each.text] == ["title", "desc"]


def test_it_is_for_light_and_dark(written: Any) -> None:
    source = written(FITS).source
    assert "color-scheme:light dark" in source
    assert "prefers-color-scheme:dark" in source
    assert set(re.findall(r"var\(--([a-z0-9]+)\)", source)) == PALETTE.keys()
    for name in PALETTE:
        for colour in PALETTE[name]:
            assert f"--{name}:{colour};" in source
    styles = {name for _, value in written(EIGHT).page.attributes for name in re.findall(r"\b[cr]\d\b", value or "")}
    assert {"c1", "c2", "c3", "r1", "r2"} <= styles
    for style in styles:
        assert f".{style}{{fill:var(--" in source


def _luminance(colour: str) -> float:
    """Relative luminance, as the Web Content Accessibility Guidelines 2.1 define it."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _contrast(one: str, other: str) -> float:
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_enough_in_both_schemes() -> None:
    assert _contrast("#000000", "#ffffff") == pytest.approx(21)
    fills = [*(f"c{hue}" for hue in range(1, HUES + 1)), "rest", "rest2"]
    for scheme in (0, 1):
        colours = {name: pair[scheme] for name, pair in PALETTE.items()}
        for text in ("ink", "soft", "warn", "good"):
            assert _contrast(colours[text], colours["page"]) >= 4.5, (text, scheme)
        for fill in fills:
            assert _contrast(colours["on"], colours[fill]) >= 4.5, (fill, scheme)  # a part's name within it
            assert _contrast(colours[fill], colours["page"]) >= 3, (fill, scheme)  # a part beside the page


def test_a_part_has_the_same_colour_in_every_plan(written: Any) -> None:
    seen: dict[str, str] = {}
    for words in (*STATUS, f"{EIGHT} --backend deepspeed --zero_stage 3", f"{EIGHT} --backend fsdp --recompute full",
                  f"{FITS} --loss full --precision fp16", "--preset 500M_1024 --gpu 3060 --offload optimizer"):  # fmt: skip
        made = written(words)
        for key in ("memory", "time"):
            if key == "time" and made.choice["time"] is None:
                continue
            found = {}
            for part in made.picture(key).iter("rect"):
                title = part.find("title")
                if title is not None and title.text:
                    found[title.text.split(":")[0]] = str(part.get("class")).split()[-1]
            coloured = [style for style in found.values() if style.startswith("c")]
            assert len(coloured) == len(set(coloured))  # no two parts of a picture share one
            for name, style in found.items():
                assert seen.setdefault(f"{key} {name}", style) == style
    assert len(seen) > 15


def test_every_part_that_the_planner_knows_has_a_colour() -> None:
    memory = {kinds.ACTIVATIONS, kinds.TEMPORARIES, kinds.COPIES, kinds.WEIGHTS, kinds.GRADIENTS, kinds.OPTIMIZER,
              kinds.INPUTS, kinds.LOSS, kinds.BUCKETS, kinds.GATHERED, kinds.GATHER_BUFFERS,
              kinds.REDUCE_BUFFERS}  # fmt: skip
    time = {work.MATMULS, work.ATTENTION, work.ELEMENTWISE, work.LOSS, work.RECOMPUTE, work.WEIGHTS, work.OPTIMIZER,
            step_time.LAUNCHES, step_time.COMMUNICATION, step_time.HOST}  # fmt: skip
    assert memory | time == set(plan_page.COLOURS)
    for parts in (memory, time):
        assert len({plan_page.COLOURS[part] for part in parts}) == len(parts)
    assert set(plan_page.COLOURS.values()) <= set(range(1, HUES + 1))


PROBE = """<script>parent.postMessage(innerWidth+":"+[...document.querySelectorAll(".scroll,body,html,pre")]
.filter(e=>e.scrollWidth>e.clientWidth+1).map(e=>e.tagName+" "+e.getAttribute("aria-label")).join(";"),"*")</script></body>"""
FRAME = """<body><script>onmessage=e=>{document.body.append("WIDE "+e.data+" END")}</script>
<iframe src="probe.html" style="border:0;width:390px;height:900px"></iframe>"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser")
@pytest.mark.parametrize("words", [FITS, EIGHT, FIXED])
def test_a_phone_shows_every_column(written: Any, words: str, tmp_path: Path) -> None:
    source = written(words).source.replace("</body>", PROBE)
    (tmp_path / "probe.html").write_text(source, encoding="utf-8")
    (tmp_path / "frame.html").write_text(FRAME, encoding="utf-8")
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    page = (tmp_path / "frame.html").as_uri()
    shown = subprocess.run([*browser, page], capture_output=True, text=True, timeout=120).stdout
    assert "WIDE 390: END" in shown.replace("WIDE 390:  END", "WIDE 390: END")


def test_the_command_says_where_the_page_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "page.html"
    assert main(["plan", "--preset", "tiny", "--gpu", "4090", "--html", str(path)]) == 0
    assert capsys.readouterr().err == f"scalegpt plan: the page is in {path}\n"


def test_the_page_shows_the_command_that_made_it(written: Any) -> None:
    made = written(FITS)
    said = re.search(r"Written by (scalegpt plan .*?page\.html) on \d{4}-\d\d-\d\d", made.text)
    assert said is not None
    assert command._parser().parse(shlex.split(said[1])[2:]).gpu == "a100-40gb"


# --- figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", STATUS)
def test_the_verdict_is_the_answers(written: Any, words: str) -> None:
    made = written(words)
    choice, usable = made.choice, made.answer["gpu"]["usable_bytes"]
    each = " on each GPU" if "--gpus 8" in words else ""
    if choice["fits"]:
        left = gib(usable - choice["total_bytes"])
        assert f"It fits. It needs {gib(choice['total_bytes'])}{each} of the {gib(usable)} that a run" in made.text
        assert f"leaves {left} free" in made.text
    else:
        assert f"It does not fit. It needs {gib(choice['total_bytes'])}" in made.text
        assert f"{gib(choice['missing_bytes'])} too much" in made.text
    known = choice["tokens_per_second"] is not None
    assert known == ("--gpu " in words)
    assert known == ("tokens/s on all GPUs" in made.text) == ("Where the time goes" in made.text)
    if known:
        assert f"{choice['tokens_per_second']:,.0f} tokens/s on all GPUs, {choice['mfu']:.0%} MFU" in made.text


@pytest.mark.parametrize("words", STATUS)
def test_the_memory_is_the_answers(written: Any, words: str) -> None:
    made = written(words)
    choice, usable = made.choice, made.answer["gpu"]["usable_bytes"]
    rows = {name: (size, share) for name, size, share in made.table("Memory on each GPU, by part")[1:]}
    parts = {name: size for name, size in {**choice["breakdown"], **choice["overheads"]}.items() if size}
    sums = {"the allocator's peak": "peak_bytes", "reserved": "reserved_bytes", "total": "total_bytes"}
    limit = int(usable * (1 - made.answer["margin"]))
    assert rows == {
        **{name: (gib(size), f"{size / choice['total_bytes']:.1%}") for name, size in parts.items()},
        **{name: (gib(choice[key]), f"{choice[key] / choice['total_bytes']:.1%}") for name, key in sums.items()},
        "limit of the card": (gib(usable), ""),
        f"limit less the margin of {100 * made.answer['margin']:g}%": (gib(limit), ""),
    }
    whole = max(usable, choice["total_bytes"])
    slices = made.picture("memory").findall("rect[title]")
    drawn = {str(each.findtext("title")).split(":")[0]: percent(each.get("width")) for each in slices}
    assert drawn == {name: pytest.approx(100 * size / whole, abs=0.001) for name, size in parts.items()}
    ends = [percent(each.get("x")) + percent(each.get("width")) for each in slices]
    assert [percent(each.get("x")) for each in slices[1:]] == pytest.approx(ends[:-1], abs=0.002)  # one after the other
    lines = {each.get("class"): percent(each.get("x1")) for each in made.picture("memory").iter("line")}
    assert lines["limit"] == pytest.approx(100 * usable / whole, abs=0.001)
    assert lines["margin"] == pytest.approx(100 * limit / whole, abs=0.001)


@pytest.mark.parametrize("words", [FITS, FIXED])
def test_the_phases_are_the_answers(written: Any, words: str) -> None:
    made = written(words)
    rows = made.table("The peak of each phase of a step")[1:]
    expected = {phase.replace("_", " "): gib(size) for phase, size in made.choice["phases"].items()}
    assert {row[0].removesuffix(", the peak"): row[1] for row in rows} == expected
    binding = [row[0] for row in rows if row[0].endswith(", the peak")]
    assert binding == [f"{made.choice['binding_phase'].replace('_', ' ')}, the peak"]


def test_a_trace_is_shown_beside_the_phases(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    phases = written(FITS).choice["phases"]
    doubled = {phase: 2 * size for phase, size in phases.items()}
    monkeypatch.setattr(command, "traced", lambda given: replace(given, trace=doubled))
    rows = written(f"{FITS} --trace").table("The peak of each phase of a step")
    assert rows[0] == ["phase", "peak", "traced", "error", ""]
    assert [row[2:4] for row in rows[1:]] == [[gib(2 * size), "-50.00%"] for size in phases.values()]


@pytest.mark.parametrize("words", [FITS, EIGHT, FIXED])
def test_the_time_is_the_answers(written: Any, words: str) -> None:
    made = written(words)
    seconds = made.choice["step_seconds"]
    rows = made.table("Time of a step, by part")[1:]
    expected = {name: [duration(time), f"{time / seconds:.1%}"] for name, time in made.choice["time"].items()}
    assert {name: rest for name, *rest in rows} == {**expected, "a step": [duration(seconds), "100.0%"]}
    slices = made.picture("time").findall("rect[title]")
    drawn = {str(each.findtext("title")).split(":")[0]: percent(each.get("width")) for each in slices}
    assert drawn == {name: pytest.approx(100 * time / seconds, abs=0.001) for name, time in made.choice["time"].items()}


@pytest.mark.parametrize("words", [FITS, EIGHT])
def test_the_alternatives_are_the_answers(written: Any, words: str) -> None:
    made = written(words)
    rows = made.table("Why not another")[1:]
    assert len(rows) == len(made.answer["alternatives"]) > 3
    for row, other in zip(rows, made.answer["alternatives"], strict=True):
        speed = f"{other['tokens_per_second']:,.0f}" if other["fits"] else ""
        assert row == [other["differs"], other["why_not"], gib(other["total_bytes"]), speed]


def test_the_settings_say_who_decided_them(written: Any) -> None:
    rows = {row[0]: row[1:] for row in written(FIXED).table("The settings that the planner may choose")[1:]}
    assert rows["backend"] == ["plain", "you"]
    assert rows["micro_batch"] == ["64", "you"]
    assert rows["recompute"] == ["none", "you"]
    assert rows["loss"] == ["chunked", "the planner"]


def test_the_command_is_shown(written: Any) -> None:
    made = written(FITS)
    assert ["".join(each.itertext()) for each in made.main.iter("pre")] == [made.choice["command"]]


def test_notes_are_shown(written: Any) -> None:
    made = written("--preset tiny --gpu a40")
    noted = ["".join(each.itertext()) for each in made.main.iter("li")]
    assert noted[: len(made.answer["notes"])] == made.answer["notes"] != []
    assert "the usable memory of A40 is estimated" in noted


# --- memory over micro batch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", STATUS)
def test_the_curves_pass_through_the_plan(written: Any, words: str) -> None:
    made = written(words)
    choice, usable = made.choice, made.answer["gpu"]["usable_bytes"]
    chart = made.picture("curves")
    height = float(str(chart.get("height")))
    ring = next(each for each in chart.iter("circle") if each.get("class") == "ring")
    assert str(ring.findtext("title")).startswith(
        f"micro batch {choice['micro_batch']}, recompute {choice['recompute']}: {gib(choice['total_bytes'])}"
    )
    points = [each for each in chart.iter("circle") if each.get("class") != "ring"]
    assert (ring.get("cx"), ring.get("cy")) in {(each.get("cx"), each.get("cy")) for each in points}
    lines = {each.get("class"): float(str(each.get("y1"))) for each in chart.iter("line") if "x1" in each.attrib}
    scale = (height - lines["limit"]) / usable  # pixels for each byte
    assert height - float(str(ring.get("cy"))) == pytest.approx(scale * choice["total_bytes"], abs=0.2)
    assert height - lines["margin"] == pytest.approx(scale * usable * (1 - made.answer["margin"]), abs=0.2)
    for each in points:
        size = re.search(r": ([\d.]+) GiB", str(each.findtext("title")))
        assert size is not None
        assert height - float(str(each.get("cy"))) == pytest.approx(scale * float(size[1]) * GIB, abs=0.3)
        assert 0 <= float(str(each.get("cy"))) <= height
        assert 0 <= percent(each.get("cx")) <= 100
    assert {str(each.get("class")) for each in chart.iter("polyline")} == {
        "curve s1 dash1", "curve s4 dash4", "curve s3 dash3",
    }  # fmt: skip


@pytest.mark.parametrize("words", [EIGHT, FIXED])
def test_the_table_of_the_curves_matches_single_plans(written: Any, words: str) -> None:
    made = written(words)
    heads, *rows = made.table("Total memory on each GPU over micro batch")
    per_rank = made.choice["micro_batch"] * made.choice["grad_accum"]
    assert [int(row[0]) for row in rows] == [size for size in range(1, per_rank + 1) if per_rank % size == 0]
    assert heads == ["micro batch", "recompute none", "recompute selective", "recompute full"]
    kept = ("backend", "zero_stage", "offload", "loss", "tokens_per_step")
    fixed = " ".join(f"--{name} {made.choice[name]}" for name in kept)
    start = " ".join(words.split()[:6] if "--gpus" in words else words.split()[:4])
    for row in (rows[0], rows[len(rows) // 2], rows[-1]):
        for recompute, cell in zip(("none", "selective", "full"), row[1:], strict=True):
            exact = f"{start} {fixed} --micro_batch {row[0]} --recompute {recompute}"
            asked = command._parser().parse(shlex.split(exact))
            flags = command.given_settings(asked)
            machine = Machine.of(command.MachineConfig.from_mapping(
                command.given_settings(asked, command.MachineConfig), "test"
            ))  # fmt: skip
            given = command.answer(
                command.Asked.of(preset=asked.preset, config_file=None, flags=flags, machine=machine), explain=False
            )
            assert cell == f"{'' if given.choice.fits else '✗ '}{given.choice.total_bytes / GIB:.2f}"


def test_the_plan_is_framed_in_the_table(written: Any) -> None:
    made = written(FITS)
    framed = ["".join(each.itertext()) for each in made.main.iter("span") if "here" in str(each.get("class"))]
    assert framed == [f"{made.choice['total_bytes'] / GIB:.2f}"]


def test_what_fits_only_without_the_margin_is_marked(written: Any) -> None:
    words = "--preset tiny --backend plain --loss full --recompute none --micro_batch 32 --gpu 4090"
    total = written(words).choice["total_bytes"]
    made = written(f"{words} --memory_gb {total * 1.005 / 1e9:.9f}")
    choice = made.choice
    assert choice["fits"]
    assert "free, less than the safety margin of 3%." in made.text
    assert f"~ {choice['total_bytes'] / GIB:.2f}" in made.text


def test_a_step_of_one_sequence_has_one_point(written: Any) -> None:
    made = written("--preset tiny --gpu 4090 --micro_batch 1 --tokens_per_step 256")
    chart = made.picture("curves")
    assert {each.get("cx") for each in chart.iter("circle")} == {"50.000%"}
    assert len(made.table("Total memory on each GPU over micro batch")) == 2


def test_a_processor_has_a_page_too(written: Any) -> None:
    made = written("--preset tiny --gpu cpu --micro_batch 1", status=None)
    assert "on all GPUs" not in made.text
    assert "memory is that of the whole process" in made.text


# --- what does not fit -----------------------------------------------------------------------------------------------


def test_what_does_not_fit_shows_what_would(written: Any) -> None:
    made = written(FIXED)
    assert "What would fit" in made.text
    assert "The command" not in made.text
    commands = ["".join(each.itertext()) for each in made.main.iter("pre")]
    assert commands == [remedy["command"] for remedy in made.answer["remedies"]]
    assert len(commands) > 1
    for remedy in made.answer["remedies"]:
        size, usable = gib(remedy["total_bytes"]), gib(remedy["gpu"]["usable_bytes"])
        assert f"It fits {remedy['what']}, taking {size} of {usable}" in made.text


def test_a_page_without_remedies_says_so(written: Any) -> None:
    huge = "--n_layer 96 --n_embd 12288 --n_head 96 --block_size 2048 --vocab_size 50304 --micro_batch 1"
    made = written(f"{huge} --backend plain --memory_gb 2 --recompute full --loss chunked", status=3)
    assert made.answer["remedies"] == []
    assert "Nothing lighter fits on this machine" in made.text
    assert "No micro batch fits with recompute none, selective and full." in made.text


# --- what users write ------------------------------------------------------------------------------------------------


def test_user_text_is_escaped(written: Any, tmp_path: Path) -> None:
    file = tmp_path / "<script>alert(1)</script>"
    file.mkdir(parents=True)
    file = file / "a & \"b\" <i>'c'.json"
    file.write_text(json.dumps({"model": {"n_layer": 2, "n_embd": 64, "n_head": 2, "block_size": 64}}))
    made = written(f"--config_file {shlex.quote(str(file))} --gpu 4090 --input_file '<b>&amp;.txt'")
    assert not {"script", "i"} & set(made.page.tags)
    assert "<script" not in made.source.lower()
    assert made.choice["command"] in made.text
    assert made.answer["model"]["name"] in made.text
    assert "<b>&amp;.txt" in made.text


def test_a_name_that_is_not_unicode_is_refused_and_shown_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "page.html"
    words = ["--preset", "tiny", "--gpu", "4090", "--input_file", "a\udcff.txt"]
    assert main(["plan", *words, "--html", str(path)]) == 2
    assert r"input_file 'a\udcff.txt' is not UTF-8; rename it" in capsys.readouterr().err
    assert not path.exists()


# --- bad input -------------------------------------------------------------------------------------------------------

BAD = {
    "--preset tiny --gpu 4090 --html {there}/no/such/folder/page.html": "page.html: No such file or directory; give a file",
    "--preset tiny --gpu 4090 --html {there}": "Is a directory; give a file that can be written",
    "--gpu 4090 --html {there}/page.html": "html and trace show one run; give --preset NAME too",
    "--preset tiny --html {there}/page.html": "html shows one run on one machine; give --gpu NAME or --memory_gb N too",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_line_and_leaves_no_page(
    words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detect, "planned_machine", lambda settings, torch=None: Machine.of(settings))
    assert main(["plan", *words.format(there=tmp_path).split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("scalegpt plan: error: html ")
    assert BAD[words] in captured.err
    assert list(tmp_path.iterdir()) == []


def test_nothing_heavy_is_loaded(tmp_path: Path) -> None:
    program = (
        "import sys; from scalegpt.cli.main import main\n"
        f"main(['plan', *{FITS.split()!r}, '--html', {str(tmp_path / 'page.html')!r}])\n"
        "print(sorted({'torch', 'numpy', 'deepspeed', 'rich'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stderr.splitlines()[-1] == "[]"
    assert (tmp_path / "page.html").is_file()
