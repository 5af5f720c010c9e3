"""The page of a report: one file that needs no network, with curves, figures, settings, samples and environment."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scalegpt.html import svg
from scalegpt.html.page import Table, document, escape, facts
from scalegpt.text import distinct
from scalegpt.training.runs.files import write_whole, writing
from scalegpt.training.runs.records import RunRecords
from scalegpt.training.runs.report.curves import Curve, chart
from scalegpt.training.runs.report.read import Points, ReportedRun, differing, read_run
from scalegpt.units import human_count, human_time

MOST_RUNS = 12
"""The most runs on a page, and curves of sources in a chart: a reader can distinguish this many colours."""

MOST_SAMPLES = 12
"""The most samples of a run on a page.

If there are more, the first, the last, and some evenly between them are shown.
"""

_STYLE = """
.zoom{position:sticky;top:0;background:var(--page);border-bottom:1px solid var(--line);padding:.5rem 0;z-index:1;
display:flex;flex-wrap:wrap;gap:.4rem;align-items:center}.zoom[hidden]{display:none}
.zoom input{width:6.5em;font:inherit}.zoom button{font:inherit;min-height:2rem}
.note,.zoom output{color:var(--soft);font-size:13px}
svg[data-zoom]{touch-action:pan-y;cursor:crosshair}.pick{fill:var(--c1);opacity:.15}
summary{cursor:pointer}details{margin:.4rem 0}td{overflow-wrap:anywhere}
"""

_FORM = (
    '<form class="zoom" hidden><label>steps <input type="number" name="from" min="0" step="1"></label>'
    '<label>to <input type="number" name="to" min="0" step="1"></label><button>show</button>'
    + "".join(
        f'<button type="button" name="{name}">{label}</button>'
        for name, label in (
            ("in", "zoom in"),
            ("out", "zoom out"),
            ("earlier", "earlier"),
            ("later", "later"),
            ("all", "all"),
        )
    )
    + '<output aria-live="polite"></output></form>'
)


def write_report(records: RunRecords) -> None:
    """Write ``report.html`` into a run's folder.

    Raises:
        InputError: ``metrics.jsonl`` cannot be read.
        RunError: the report cannot be written.
    """
    with writing(records.report):
        write_whole(records.report, report_page([read_run(records)]))


def report_page(runs: Sequence[ReportedRun], live: str = "") -> str:
    """The page of one run or of several runs, as HTML.

    Args:
        runs: the runs, at most :data:`MOST_RUNS`.
        live: the version of the runs' files, if a server shows the page while the runs train.
    """
    names = distinct([run.name for run in runs], "{} ({})")
    title = names[0] if len(runs) == 1 else f"{len(runs)} runs"
    parts = [
        f"<h1>{escape(_headline(runs[0]) if len(runs) == 1 else title)}</h1>",
        _figures(runs, names),
        _predictions(runs, names),
        *_charts(runs, names),
        _differences(runs, names),
        _environment(runs, names),
        *(_samples(run, name, alone=len(runs) == 1) for run, name in zip(runs, names, strict=True)),
        *(_configuration(run, name) for run, name in zip(runs, names, strict=True)),
    ]
    body = f'<main{f" data-live={live!r}" if live else ""}>{_FORM}<div id="runs">{"".join(parts)}</div></main>'
    script = (Path(svg.__file__).with_name("zoom.js")).read_text(encoding="utf-8")
    return document(title, body, svg.STYLE + _STYLE, script)


def _headline(run: ReportedRun) -> str:
    return f"{run.name}: {run.status.get('state', 'state unknown')} after {run.step:,} steps"


def _figures(runs: Sequence[ReportedRun], names: list[str]) -> str:
    """A table of the main figures, with a column for each run."""
    columns = [
        {
            "state": str(run.status.get("state", "?")),
            "cause of the end": str(run.status.get("cause")),
            "steps": f"{run.step:,}",
            "tokens": f"{run.tokens:,}",
            "time in steps": human_time(run.seconds),
            "median tokens per second": _count(run.speed),
            "last training loss": _number(run.last("loss")),
            "held-out loss": _number(run.status.get("val_loss", run.last("val_loss"))),
            "best held-out loss": _number(run.status.get("best_val_loss", lowest(run.curves["val_loss"]))),
        }
        for run in runs
    ]
    return _table("Key figures", names, columns)


def _predictions(runs: Sequence[ReportedRun], names: list[str]) -> str:
    """The section that compares predicted with measured values: memory of a GPU or of the process, and speed."""
    columns = []
    for run in runs:
        on_gpu = run.status.get("measured_reserved_bytes") is not None
        memory = run.status.get("predicted_peak_bytes" if on_gpu else "predicted_total_bytes")
        speed = _nested(run.plan, "speed", "tokens_per_second")
        columns.append({
            "memory, predicted": _mib(memory),
            "memory, measured on rank 0": _mib(run.status.get("measured_peak_bytes")),
            "memory, prediction": _off(memory, run.status.get("measured_peak_bytes")),
            "tokens per second, predicted": _count(speed),
            "tokens per second, measured": _count(run.speed),
            "tokens per second, prediction": _off(speed, run.speed),
        })  # fmt: skip
    return "<h2>Predicted and measured</h2>" + _table("Predicted and measured", names, columns)


def _charts(runs: Sequence[ReportedRun], names: list[str]) -> list[str]:
    def of(key: str, *, dots: bool = False) -> list[Curve]:
        return [
            Curve(name, run.curves[key], hue, dots) for hue, (run, name) in enumerate(zip(runs, names, strict=True), 1)
        ]

    if len(runs) == 1:
        held_out = Curve("held-out", runs[0].curves["val_loss"], 2, has_dots=True)
        sources = [
            Curve(label, points, hue, has_dots=True)
            for hue, (label, points) in enumerate(list(runs[0].by_source.items())[:MOST_RUNS], start=1)
        ]
        losses = [
            chart("loss", "Loss", [Curve("training", runs[0].curves["loss"], 1), held_out]),
            chart("sources", "Held-out loss by source", sources),
        ]
    else:
        losses = [chart("loss", "Training loss", of("loss")), chart("held", "Held-out loss", of("val_loss", dots=True))]
    return [
        *losses,
        chart("lr", "Learning rate", of("lr"), write="{:.3g}".format),
        chart("norm", "Gradient norm", of("grad_norm")),
        chart("speed", "Tokens per second", of("tokens_per_second"), kind="count", write=human_count),
        chart("host", "Memory of the process, bytes", of("process_bytes"), kind="count", write=human_count),
        chart("card", "Memory in use on the GPU, bytes", of("gpu_used_bytes"), kind="count", write=human_count),
        chart("busy", "GPU utilization", of("gpu_utilization"), kind="percent", write="{:.0%}".format),
    ]


def _differences(runs: Sequence[ReportedRun], names: list[str]) -> str:
    if len(runs) == 1:
        return ""
    found = differing(list(runs))
    if not found:
        return "<h2>Settings that differ</h2><p>None.</p>"
    columns = [{key: values[at] for key, values in found.items()} for at in range(len(runs))]
    return "<h2>Settings that differ</h2>" + _table("Settings that differ", names, columns)


def _environment(runs: Sequence[ReportedRun], names: list[str]) -> str:
    keys = ("device", "ranks", "backend", "zero_stage", "precision", "torch")
    columns = [{key.replace("_", " "): str(run.plan.get(key, "?")) for key in keys} for run in runs]
    return "<h2>Environment</h2>" + _table("Environment", names, columns)


def _samples(run: ReportedRun, name: str, *, alone: bool) -> str:
    if not run.samples:
        return ""
    last = len(run.samples) - 1
    chosen = sorted({round(at * last / max(1, MOST_SAMPLES - 1)) for at in range(MOST_SAMPLES)})
    parts = [f"<h2>Samples{'' if alone else f' of {escape(name)}'}</h2>"]
    for at in chosen:
        step, text = run.samples[at]
        is_open = " open" if at == last else ""
        parts.append(
            f"<details{is_open}><summary>Sample after {step:,} steps</summary><pre>{escape(text)}</pre></details>"
        )
    return "".join(parts)


def _configuration(run: ReportedRun, name: str) -> str:
    if not run.config:
        return ""
    text = f"<details><summary>config.yaml</summary><pre>{escape(run.config)}</pre></details>"
    return f"<h2>Configuration of {escape(name)}</h2>{text}"


def _table(label: str, names: list[str], columns: Sequence[dict[str, str]]) -> str:
    """A table with a row for each key and a column for each run. With one run it has no heading."""
    if len(columns) == 1:
        return facts(columns[0])
    table = Table(label, ["", *names], ["", *("" for _ in names)])
    for key in columns[0]:
        table.add(escape(key), *(escape(column[key]) for column in columns))
    return table.draw()


def lowest(points: Points) -> float | None:
    """The lowest value of a curve; None if it has no point."""
    return min((value for _, value in points), default=None)


def _nested(values: Any, *keys: str) -> Any:
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "?"


def _count(value: Any) -> str:
    return human_count(value) if isinstance(value, int | float) else "?"


def _mib(value: Any) -> str:
    return f"{value / 2**20:,.0f} MiB" if isinstance(value, int | float) else "?"


def _off(predicted: Any, measured: Any) -> str:
    """The relative error of a prediction; a question mark where the prediction or the measurement is not known."""
    known = all(isinstance(each, int | float) for each in (predicted, measured))
    return f"{predicted / measured - 1:+.1%}" if known and measured else "?"
