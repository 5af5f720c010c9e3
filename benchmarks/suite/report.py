"""The report on the suite's rows: each limit and whether it is met, and the tables in Markdown."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from benchmarks.suite.rows import LOOP, LOSS, PROFILE, SPEED_PRESETS, TRAIN, Values, named, ran_within
from benchmarks.tables.markdown import table
from scalegpt.hardware.gpus import GIB
from scalegpt.planner.batches import divisors

LEAST_MFU = {"500M_1024": 0.55, "350M_1024": 0.52, "150M_1024": 0.48}
LEAST_OVER_LOOP = 1.3
MOST_LONGER = (
    ({"recompute": "full"}, {"recompute": "none"}, 0.30),
    ({"recompute": "selective"}, {"recompute": "none"}, 0.10),
    ({"backend": "deepspeed", "zero_stage": 1}, {"backend": "plain"}, 0.05),
    ({"backend": "fsdp", "zero_stage": 2}, {"backend": "plain"}, 0.05),
)
"""(settings A, settings B, the largest share by which a step with A may take longer than one with B)."""

LEAST_MICRO_BATCH, MOST_TIME_ERROR = 0.9, 0.15
"""Limits on the planner's choices: the least ratio of the chosen micro batch to the largest that runs, and the largest
relative error of predicted tokens per second."""

MEMORY = {"peak": (0.02, 0.05, 0.05), "reserved": (0.04, 0.08, 0.02), "driver": (0.04, 0.08, 0.02)}
"""Figure of memory → limits on its relative errors: their mean, the largest, and the largest underestimate."""

NOTES = """\
Errors are predicted ÷ measured − 1, by the planner's tables alone. Peak: the allocator's, cuBLAS's workspaces included.
Reserved: what it took. Driver: what the driver counts; what a process has loaded for earlier rows stays loaded and counts.
W > 1 is rank 0 of a fake process group: its allocations are real, nothing is sent. For compiled blocks the predicted
memory is an upper bound. Times are medians by `torch.utils.benchmark` over steps of the trainer's backends on random
tokens; MFU counts 6P + 12·L·H·T operations a token and the card's dense peak. The plain loop is
`benchmarks/steps/baseline.py`, compiled, with the same tokens in a step. An emulated card has another card's memory and
this card's speed; a chosen plan runs with as much of its accumulation as time allows, two micro batches at least, and is
compared with the prediction for that. The search for the largest micro batch tries the divisors of a step's sequences."""

Verdict = tuple[str, float | None, str, float]
"""A limit and its result: the name of the value, the measured value (None: not measured), ``least`` or ``most``, and
the limit."""


def said(verdict: Verdict) -> str:
    """A verdict as one line of text."""
    what, found, kind, limit = verdict
    kept = found is not None and (found >= limit if kind == "least" else found <= limit)
    shown = "not measured" if found is None else f"{found:.4g}"
    return f"{what}: {shown}, at {kind} {limit:g}{'' if found is None else '; kept' if kept else '; NOT KEPT'}"


def verdicts(rows: Iterable[Values]) -> list[Verdict]:
    """The verdict on each limit, in the order of the parts. Parts without rows are left out."""
    rows, judges = list(rows), {"smoke": _of_smoke, "plan": _of_plan, "speed": _of_speed, "choice": _of_choice}
    parts = {part: [row for row in rows if row["part"] == part] for part in judges}
    return [verdict for part, mine in parts.items() if mine for verdict in judges[part](mine)]


def _of_smoke(rows: list[Values]) -> Iterator[Verdict]:
    yield "smoke: rows that failed", sum(row["outcome"] not in {"ran", "skipped"} for row in rows), "most", 0


def _of_plan(rows: list[Values]) -> Iterator[Verdict]:
    for words, compiled in (("", "off"), (", compiled", "on")):
        compared = [errors(row) for row in rows if row["outcome"] == "ran" and row["flags"]["compile"] == compiled]
        for figure, (mean, worst, under) in MEMORY.items():
            found = [each[figure] for each in compared]
            average = sum(map(abs, found)) / len(found) if found else None
            least = max(0.0, -min(found)) if found else None
            yield f"plan: mean error of {figure}{words}", average, "most", mean
            yield f"plan: worst error of {figure}{words}", max(map(abs, found), default=None), "most", worst
            yield f"plan: most under in {figure}{words}", least, "most", under


def _of_speed(rows: list[Values]) -> Iterator[Verdict]:
    for preset in SPEED_PRESETS:
        mine = [row for row in rows if row["preset"] == preset and row["outcome"] == "ran"]
        trained = [row for row in mine if row["kind"] == TRAIN]
        ours = max(trained, key=rate, default=None)
        loop = max((row for row in mine if row["kind"] == LOOP), key=rate, default=None)
        yield f"{preset}: MFU", ours["measured"]["mfu"] if ours else None, "least", LEAST_MFU[preset]
        over = rate(ours) / rate(loop) if ours and loop else None
        yield f"{preset}: tokens/s over those of the compiled plain loop", over, "least", LEAST_OVER_LOOP
        for changed, base, most in MOST_LONGER:
            words = named({**base, **changed})
            yield f"{preset}: a step is longer with {words} by", longer(trained, changed, base), "most", most


def _of_choice(rows: list[Values]) -> Iterator[Verdict]:
    chosen = [row for row in rows if "chosen" in row["name"] and row["outcome"] in {"ran", "out of memory"}]
    yield "choice: chosen plans that ran out of memory", sum(not _fits(row) for row in chosen), "most", 0
    for row in chosen:
        if row["outcome"] == "ran":
            error, share = speed_error(row), share_of_largest(row, rows)
            yield f"{row['name']}: chosen micro batch ÷ largest that runs", share, "least", LEAST_MICRO_BATCH
            yield f"{row['name']}: error of tokens/s", None if error is None else abs(error), "most", MOST_TIME_ERROR


def errors(row: Values) -> dict[str, float]:
    """Figure of memory → its relative error, predicted ÷ measured − 1."""
    predicted, measured = row["predicted"], row["measured"]
    peak = predicted["peak_bytes"] + predicted["workspace_bytes"]
    return {
        "peak": peak / measured["allocated_bytes"] - 1,
        "reserved": predicted["reserved_bytes"] / measured["reserved_bytes"] - 1,
        "driver": predicted["total_bytes"] / measured["driver_bytes"] - 1,
    }


def rate(row: Mapping[str, Any]) -> float:
    """Measured tokens per second of a row."""
    found: float = row["measured"]["tokens_per_second"]
    return found


def speed_error(row: Values) -> float | None:
    """Relative error of tokens per second, predicted ÷ measured − 1; None if the card's rates are not known."""
    predicted = row["predicted"].get("tokens_per_second")
    return None if not predicted else predicted / rate(row) - 1


def longer(rows: list[Values], changed: Values, base: Values) -> float | None:
    """The share by which a step takes longer with settings ``changed`` than with ``base``, with all other settings equal.

    It is None if one of the two rows was not measured.
    """
    for row in rows:
        if changed.items() <= row["flags"].items():
            other_flags = {key: value for key, value in {**row["flags"], **base}.items() if key != "zero_stage"}
            for other in rows:
                if other["flags"] == other_flags and other["grad_accum"] == row["grad_accum"]:
                    return rate(other) / rate(row) - 1
    return None


def share_of_largest(row: Values, rows: Iterable[Values]) -> float | None:
    """The chosen micro batch ÷ the largest that ran on the same card; None if the search for it has not ended."""
    start = f"{row['name'].split('chosen')[0]}trial {row['preset']} "
    trials = [row, *(each for each in rows if each["name"].startswith(start))]
    failed = {each["flags"]["micro_batch"] for each in trials if not _fits(each)}
    most = max((each["flags"]["micro_batch"] for each in trials if _fits(each)), default=0)
    larger = next((size for size in divisors(row["more"]["sequences"]) if size > most), None)
    return row["flags"]["micro_batch"] / most if most and (larger is None or larger in failed) else None


def _fits(row: Values) -> bool:
    return ran_within(row, row["usable_bytes"])


# --- Markdown --------------------------------------------------------------------------------------------------------

Column = Callable[[Values], str]


def _memory(figure: str, key: str) -> Column:
    return lambda row: f"{row['measured'][key] / GIB:.3f} ({errors(row)[figure]:+.1%})"


COLUMNS: dict[str, Column] = {
    "tokens/s": lambda row: f"{rate(row):,.0f}",
    "prediction": lambda row: f"{speed_error(row):+.1%}",
    "MFU": lambda row: f"{row['measured']['mfu']:.1%}",
    "ms (IQR)": lambda row: f"{1e3 * row['measured']['step_seconds']:.2f} ({1e3 * row['measured']['iqr_seconds']:.2f})",
    "peak GiB (prediction)": _memory("peak", "allocated_bytes"),
    "reserved": _memory("reserved", "reserved_bytes"),
    "driver": _memory("driver", "driver_bytes"),
    "outside": lambda row: f"{row['measured']['outside_bytes'] / GIB:.3f}",
    "extra GiB": lambda row: f"{row['measured']['extra_bytes'] / GIB:.3f}",
    "error of gradients": lambda row: f"{row['gradient_error']:.1e}",
}


def markdown(record: Values) -> str:
    """The report in Markdown on the rows that have been measured so far."""
    rows: list[Values] = record["rows"]
    about = [(key, str(value)) for key, value in record.items() if key != "rows"]
    parts = {part: [row for row in rows if row["part"] == part] for part in ("smoke", "plan", "speed", "choice")}
    of_speed = {kind: [row for row in parts["speed"] if row["kind"] == kind] for kind in (TRAIN, LOOP, LOSS, PROFILE)}
    blocks = [(f"Failed: {row['name']}", row["traceback"]) for row in rows if row.get("traceback")]
    blocks += [(row["name"], row["measured"]["kernels"]) for row in of_speed[PROFILE] if "measured" in row]
    sections = [
        f"# GPU suite: {record['card']}",
        "**Tiny models on a CPU, to see that every row runs. The figures mean nothing.**" * record["dry"],
        table(("", ""), about),
        "\n".join(f"- {said(verdict)}" for verdict in verdicts(rows)),
        _section("Smoke", parts["smoke"]),
        _section("Predicted and measured memory", parts["plan"]),
        _section("Speed", [*of_speed[TRAIN], *of_speed[LOOP]]),
        _section("The loss alone", of_speed[LOSS]),
        _section("Choices on emulated cards", parts["choice"]),
        *(f"## {title}\n\n```\n{text}\n```" for title, text in blocks),
        f"## Notes\n\n{NOTES}",
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _section(title: str, rows: list[Values]) -> str:
    """A section with the table of some rows, without columns that are empty in all of them."""
    if not rows:
        return ""
    cells = {heading: [_cell(column, row) for row in rows] for heading, column in COLUMNS.items()}
    cells = {heading: column for heading, column in cells.items() if any(column)}
    remarks = ["; ".join([*row.get("reason", "").splitlines()[:1], *row.get("notes", [])]) for row in rows]
    columns = {
        "row": [row["name"] for row in rows], "outcome": [row["outcome"] for row in rows], **cells,
        "seconds": [f"{row['seconds']:.1f}" for row in rows], "remarks": [text.replace("|", "/") for text in remarks],
    }  # fmt: skip
    return f"## {title}\n\n{table(list(columns), zip(*columns.values(), strict=True), right=range(2, 3 + len(cells)))}"


def _cell(column: Column, row: Values) -> str:
    try:
        return column(row)
    except (KeyError, TypeError):  # the row does not have this figure
        return ""
