"""What ``gpu_suite.py plan`` makes of its answers: signed errors, a summary against the limits, and the report."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.suite.frame import machine_table, table
from scalegpt.hardware.gpus import GIB
from scalegpt.units import gib

Values = dict[str, Any]


@dataclass(frozen=True)
class Limit:
    """What the errors of a figure may be; shares of the measured figure, positive where too much is predicted.

    Attributes:
        mean: of the absolute errors.
        worst: the largest absolute error.
        under: how much too little may be predicted.
    """

    mean: float
    worst: float
    under: float

    def badness(self, error: float) -> float:
        """The error as a multiple of what is allowed."""
        return max(abs(error) / self.worst, -error / self.under)


LIMITS = {"peak": Limit(0.02, 0.05, 0.05), "reserved": Limit(0.04, 0.08, 0.02), "driver": Limit(0.04, 0.08, 0.02)}
"""Peak: the allocator's, cuBLAS's workspaces included. Reserved: what it took. Driver: what the driver counts."""

FIGURES = tuple(LIMITS)

WORST_SHOWN = 5

DRIVER_NOTE = (
    "One process measures many configurations, one after the other, and what it has loaded stays loaded (kernels, NCCL): "
    "the driver's figures hold that too. `outside` is what the driver counts beyond what the allocator has reserved; a run "
    "of its own would show no more. The allocator is emptied between configurations, workspaces included."
)
FAKE_NOTE = (
    "W > 1 is rank 0 of a fake process group: its allocations are real, nothing is sent, there is no communicator, and the "
    "predicted total has none either."
)


def limits() -> dict[str, Values]:
    """The limits as plain values."""
    return {figure: asdict(limit) for figure, limit in LIMITS.items()}


def add_errors(row: Values) -> None:
    """Put predicted, measured and signed error of each figure into a measured row."""
    predicted, measured = row["predicted"], row["measured"]
    pairs = {
        "peak": (predicted["peak_bytes"] + predicted["workspace_bytes"], measured["allocated_bytes"]),
        "reserved": (predicted["reserved_bytes"], measured["reserved_bytes"]),
        "driver": (predicted["total_bytes"], measured["driver_bytes"]),
    }
    row["compared"] = {
        figure: {"predicted_bytes": ours, "measured_bytes": theirs, "error": ours / theirs - 1}
        for figure, (ours, theirs) in pairs.items()
    }


def badness(row: Values) -> float:
    """How far a measured row's worst figure goes towards its limit; over 1: beyond."""
    return max(LIMITS[figure].badness(row["compared"][figure]["error"]) for figure in FIGURES)


def worst_first(rows: Iterable[Values]) -> list[Values]:
    """The measured rows, the worst first."""
    return sorted((row for row in rows if row["outcome"] == "measured"), key=badness, reverse=True)


def summarise(rows: Iterable[Values]) -> dict[str, Values]:
    """Mean and worst of each figure's errors, and whether they keep the limits; nothing where no row was measured."""
    compared = [row["compared"] for row in rows if row["outcome"] == "measured"]
    if not compared:
        return {}
    return {figure: _summary([row[figure]["error"] for row in compared], LIMITS[figure]) for figure in FIGURES}


def _summary(errors: list[float], limit: Limit) -> Values:
    mean = sum(map(abs, errors)) / len(errors)
    worst = max(errors, key=abs)
    return {
        "rows": len(errors),
        "mean_error": mean,
        "worst_error": worst,
        "most_under": min(0.0, *errors),
        "keeps_limits": mean <= limit.mean and all(limit.badness(error) <= 1 for error in errors),
    }


def verdicts(rows: Iterable[Values]) -> dict[str, int]:
    """How often "fits" and "does not fit" came true."""
    counts = {"fits, ran": 0, "does not fit, out of memory": 0, "fits, out of memory": 0, "does not fit, ran": 0}
    for row in rows:
        ended = {"measured": "ran", "out of memory": "out of memory"}.get(row["outcome"])
        if ended is not None:
            counts[f"{'fits' if row['predicted']['fits'] else 'does not fit'}, {ended}"] += 1
    return counts


def markdown(record: Values) -> str:
    """The report of a complete record, as :func:`benchmarks.suite.plan_suite.run` makes it."""
    rows, gpu, software = record["rows"], record["gpu"], record["software"]
    counted = [row for row in rows if not row["apart"]]
    parts = [
        f"# Predicted against measured memory: {gpu['name']}",
        f"`{software['command']}`, {software['date']}, {record['seconds']:.0f} s",
        machine_table(gpu, software),
        f"## Errors\n\nPredicted ÷ measured − 1.\n\n{_summary_table(record['summary'])}",
        _apart(rows),
        f"Whether it fits: {', '.join(f'{count} × {what}' for what, count in verdicts(rows).items() if count) or 'no row'}.",
        f"## The worst\n\n{_worst(worst_first(counted)[:WORST_SHOWN])}",
        f"## All that was measured, worst first\n\n{_all(worst_first(rows))}",
        _not_measured(rows),
        f"## Notes\n\n- {DRIVER_NOTE}\n- {FAKE_NOTE}",
        *(f"- {row['name']}: {note}" for row in rows for note in row.get("notes", [])),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _summary_table(summary: dict[str, Values]) -> str:
    if not summary:
        return "Nothing was measured."
    body = []
    for figure, found in summary.items():
        limit = LIMITS[figure]
        body.append([
            figure,
            str(found["rows"]),
            f"{found['mean_error']:.2%}",
            f"{limit.mean:.0%}",
            f"{found['worst_error']:+.2%}",
            f"±{limit.worst:.0%}",
            f"{found['most_under']:+.2%}",
            f"−{limit.under:.0%}",
            "yes" if found["keeps_limits"] else "**no**",
        ])  # fmt: skip
    head = ["figure", "rows", "mean", "limit", "worst", "limit", "most under", "limit", "kept"]
    return table(head, body)


def _apart(rows: list[Values]) -> str:
    """The summaries of what docs/MEMORY.md promises less of."""
    parts = []
    for reason in dict.fromkeys(row["apart"] for row in rows if row["apart"]):
        summary = summarise(row for row in rows if row["apart"] == reason)
        if summary:
            parts.append(f"Not counted above ({reason}):\n\n{_summary_table(summary)}")
    return "\n\n".join(parts)


def _worst(rows: list[Values]) -> str:
    return "\n\n".join(map(_explained, rows)) or "Nothing was measured."


def _explained(row: Values) -> str:
    """One row with all that may tell why it errs."""
    predicted, measured = row["predicted"], row["measured"]
    errors = ", ".join(f"{figure} {row['compared'][figure]['error']:+.2%}" for figure in FIGURES)
    return "\n".join((
        f"**{row['name']}**: {errors}",
        "",
        f"- predicted to bind: {predicted['binding_phase']}; phases: {_sizes(predicted['phases'])}",
        f"- predicted peak: {_sizes(predicted['breakdown'])}",
        f"- predicted beside it: {_sizes(predicted['overheads'])}",
        f"- measured peak by part: {_sizes(measured['allocated_by_part'])}; "
        f"outside the allocator {gib(measured['outside_bytes'])}; {measured['allocation_retries']} allocation retries; "
        f"held before: {gib(measured['before']['allocated_bytes'])}",
    ))  # fmt: skip


def _sizes(parts: dict[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {gib(size)}" for name, size in parts.items() if size)


def _all(rows: list[Values]) -> str:
    if not rows:
        return "Nothing was measured."
    body = []
    for row in rows:
        cells = [row["name"], row["predicted"]["binding_phase"]]
        for figure in FIGURES:
            found = row["compared"][figure]
            cells += [
                f"{found['predicted_bytes'] / GIB:.3f}",
                f"{found['measured_bytes'] / GIB:.3f}",
                f"{found['error']:+.2%}",
            ]
        body.append([*cells, f"{row['measured']['outside_bytes'] / GIB:.3f}", f"{row['seconds']:.1f}"])
    head = ["configuration (sizes in GiB)", "binds"]
    for figure in FIGURES:
        head += [f"{figure} predicted", "measured", "error"]
    return table([*head, "outside", "seconds"], body, left=2)


def _not_measured(rows: list[Values]) -> str:
    others = [row for row in rows if row["outcome"] != "measured"]
    if not others:
        return ""
    body = []
    for row in others:
        known = row.get("predicted")
        fits = "" if known is None else f"{gib(known['total_bytes'])}, {'fits' if known['fits'] else 'does not fit'}"
        body.append([row["name"], row["outcome"], fits, row.get("reason", "").replace("\n", " ").replace("|", "/")])
    return f"## Not measured\n\n{table(['configuration', 'outcome', 'predicted', 'reason'], body, left=4)}"
