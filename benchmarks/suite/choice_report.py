"""What ``gpu_suite.py choice`` makes of its rows: a summary against the limits, and the report."""

from collections.abc import Iterable, Iterator
from itertools import combinations
from typing import Any

from benchmarks.suite.choice_rows import EMULATED, STEPS
from benchmarks.suite.frame import machine_table, table
from scalegpt.hardware.gpus import GIB
from scalegpt.planner.search.ranking import TIE
from scalegpt.units import gib

Values = dict[str, Any]

LEAST_RATIO = 0.9
"""A chosen micro batch, as a share of the largest that divides the step and runs."""

MOST_ERROR = 0.15
"""Of predicted tokens per second, as a share of those measured, either way."""

NOTES = (
    f"The memory of each size is that of a card that has it ({', '.join(EMULATED)}), as torch reports it. The rates are "
    "those of the card at hand.",
    "The allocator's cap is that memory less what lies outside the allocator: the context, loaded kernels, NCCL. That is "
    "measured, in a process that takes the same steps without a cap; not what the planner's tables say.",
    "Plans are by the planner's tables alone, with the default safety margin, everything open to choice, and no earlier "
    "measurements.",
    f"A chosen plan takes {STEPS} optimizer steps, with as much of its accumulation as time allows, two micro batches at "
    "least where it accumulates: memory is the same from two on. A trial of another micro batch takes two such steps.",
    "Steps are those of the trainer's backends, on random tokens made on the host and copied to the card; reading a data set "
    "is left out. Seconds are medians over the second half of the steps.",
    "Tokens per second are those of the plan with all its accumulation: what was not trained of it is made up by as many of "
    "the micro steps that are not a step's last, as measured. The error of the step as it was trained stands beside it.",
    "Errors are predicted ÷ measured − 1.",
    "The largest micro batch is looked for among the divisors of a step's sequences, all else as chosen. What follows from "
    "another trial is not tried: what ran, runs with fewer sequences and on a larger card; what ran out of memory, does so "
    "with more and on a smaller one.",
)


def limits() -> dict[str, float]:
    """The limits as plain values."""
    return {"out_of_memory": 0, "least_ratio": LEAST_RATIO, "most_error": MOST_ERROR}


def summarise(rows: Iterable[Values]) -> Values:
    """How the limits are kept; a part of which nothing was measured says that it has no rows, and keeps nothing."""
    rows = list(rows)
    return {
        "plans": _plans(rows),
        "largest": _ratios(rows, "largest"),
        "single_sequences": _ratios(rows, "single_sequences"),
        "speed": _speeds(rows),
        "order": _order(rows),
    }


def _plans(rows: list[Values]) -> Values:
    ended = [row for row in rows if row["outcome"] in {"ran", "out of memory"}]
    over = [row["name"] for row in ended if row["outcome"] == "out of memory"]
    return {"rows": len(ended), "out_of_memory": over, "keeps_limits": bool(ended) and not over}


def _ratios(rows: list[Values], part: str) -> Values:
    """Of the rows whose search came to its end; where nothing ran, the chosen plan's own row says so."""
    found = {row["name"]: row[part]["ratio"] for row in rows if row.get(part, {}).get("ratio") is not None}
    below = [name for name, ratio in found.items() if ratio < LEAST_RATIO]
    least = min(found.values(), default=None)
    return {"rows": len(found), "least_ratio": least, "below": below, "keeps_limits": bool(found) and not below}


def _speeds(rows: list[Values]) -> Values:
    errors = {row["name"]: row["speed"]["error"] for row in rows if row.get("speed")}
    if not errors:
        return {"rows": 0, "mean_error": None, "worst_error": None, "beyond": [], "keeps_limits": False}
    beyond = [name for name, error in errors.items() if abs(error) > MOST_ERROR]
    return {
        "rows": len(errors),
        "mean_error": sum(map(abs, errors.values())) / len(errors),
        "worst_error": max(errors.values(), key=abs),
        "beyond": beyond,
        "keeps_limits": not beyond,
    }


def _order(rows: list[Values]) -> Values:
    """Of pairs of plans that are predicted to differ by more than a tie: was the faster one not slower by more than that?"""
    wrong: list[str] = []
    pairs = 0
    for row in rows:
        for faster, slower in _unequal_pairs(row):
            pairs += 1
            if faster["measured_step_seconds"] > slower["measured_step_seconds"] * (1 + TIE):
                wrong.append(f"{row['name']}: {faster['name']} before {slower['name']}")
    return {"pairs": pairs, "right": pairs - len(wrong), "wrong": wrong}


def _unequal_pairs(row: Values) -> Iterator[tuple[Values, Values]]:
    """Pairs of the row's plans, the one that is predicted to be faster first."""
    named = [(row["chosen"], row.get("speed")), *((other, other.get("speed")) for other in row["alternatives"])]
    plans = [{"name": plan["name"], **found} for plan, found in named if found]
    for pair in combinations(sorted(plans, key=lambda plan: plan["predicted_step_seconds"]), 2):
        faster, slower = pair
        if slower["predicted_step_seconds"] > faster["predicted_step_seconds"] * (1 + TIE):
            yield faster, slower


def verdicts(summary: Values) -> list[str]:
    """The summary in a line for each limit."""
    plans, ratio, single, speeds, order = (
        summary[part] for part in ("plans", "largest", "single_sequences", "speed", "order")
    )
    lines = [
        f"chosen plans: {plans['rows']} trained, {len(plans['out_of_memory'])} out of memory; {_kept(plans)}",
        f"largest micro batch that divides the step: {_least(ratio)}; {_kept(ratio)}",
        f"largest of all: {_least(single)}",
    ]
    if speeds["rows"]:
        errors = f"mean error {speeds['mean_error']:.1%}, worst {speeds['worst_error']:+.1%}"
        lines.append(f"tokens per second of {speeds['rows']} plans: {errors}; {_kept(speeds)}")
    else:
        lines.append("tokens per second: no row")
    return [*lines, f"predicted order: right in {order['right']} of {order['pairs']} pairs"]


def _kept(part: Values) -> str:
    if not part["rows"]:
        return "nothing was measured"
    return "limit kept" if part["keeps_limits"] else "LIMIT NOT KEPT"


def _least(part: Values) -> str:
    if not part["rows"]:
        return "no row"
    return f"chosen at least {part['least_ratio']:.0%} of it in {part['rows']} rows"


def markdown(record: Values) -> str:
    """The report of a complete record, as :func:`benchmarks.suite.choice_suite.run` makes it."""
    rows, software, summary = record["rows"], record["software"], record["summary"]
    compiled = "compiled blocks" if record["compiled"] else "uncompiled"
    parts = [
        f"# Chosen plans on emulated cards: {record['gpu']['name']}",
        f"`{software['command']}`, {software['date']}, {record['seconds']:.0f} s, {compiled}, "
        f"rates of {record['rates_of'] or 'a card that stands in: this one is not in the catalogue'}",
        machine_table(record["gpu"], software),
        "## Against the limits\n\n" + "\n".join(f"- {line}" for line in verdicts(summary)),
        _beyond(summary),
        f"## The chosen plans\n\n{_chosen(rows)}",
        _out_of_memory(rows),
        f"## Their micro batches\n\n{_micro_batches(rows)}",
        _alternatives(rows),
        _others(rows),
        "## Notes\n\n" + "\n".join(f"- {note}" for note in (*NOTES, *_remarks(rows))),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _beyond(summary: Values) -> str:
    """The rows that break a limit, by limit."""
    broken = {
        "out of memory": summary["plans"]["out_of_memory"],
        f"a micro batch under {LEAST_RATIO:.0%}": summary["largest"]["below"],
        f"tokens per second off by more than {MOST_ERROR:.0%}": summary["speed"]["beyond"],
        "predicted in the wrong order": summary["order"]["wrong"],
    }
    return "\n".join(f"- {what}: {'; '.join(names)}" for what, names in broken.items() if names)


def _chosen(rows: list[Values]) -> str:
    body = []
    for row in rows:
        if not row.get("speed"):
            continue
        measured, found, chosen = row["trained"]["measured"], row["speed"], row["chosen"]
        body.append([
            row["name"],
            chosen["name"].removeprefix(f"{row['preset']} "),
            _gib(chosen["predicted_reserved_bytes"]),
            _gib(measured["reserved_bytes"]),
            _gib(row["trained"]["cap_bytes"]),
            str(measured["allocation_retries"]),
            f"{found['predicted_tokens_per_second']:,.0f}",
            f"{found['measured_tokens_per_second']:,.0f}",
            f"{found['error']:+.1%}",
            f"{found['short']['error']:+.1%}",
        ])  # fmt: skip
    head = [
        "row (sizes in GiB)", "plan", "reserved, predicted", "measured", "cap", "retries",
        "tokens/s, predicted", "measured", "error", "as trained",
    ]  # fmt: skip
    return table(head, body, left=2) if body else "Nothing was measured."


def _out_of_memory(rows: list[Values]) -> str:
    over = [row for row in rows if row["outcome"] == "out of memory"]
    lines = [
        f"- **{row['name']}**: {row['chosen']['name']}, {gib(row['chosen']['predicted_total_bytes'])} predicted of "
        f"{gib(row['usable_bytes'])}: {row['reason']}"
        for row in over
    ]
    return "\n".join(["Out of memory:", "", *lines]) if lines else ""


def _micro_batches(rows: list[Values]) -> str:
    body = []
    for row in rows:
        found = row.get("largest")
        if found is None:
            continue
        single = row.get("single_sequences")
        tried = ", ".join(_trial(each) for each in found["trials"])
        body.append([
            row["name"], tried or "none was needed", str(row["chosen"]["micro_batch"]), *_found(found),
            *(("", "") if single is None else _found(single)),
        ])  # fmt: skip
    head = ["row", "tried", "chosen", "largest that divides", "ratio", "largest of all", "ratio"]
    return table(head, body, left=2) if body else "Nothing was measured."


def _trial(trial: Values) -> str:
    follows = " (follows)" if "by" in trial else ""
    return f"{trial['micro_batch']} {trial['outcome']}{follows}"


def _found(found: Values) -> tuple[str, str]:
    if found["micro_batch"] is None:
        return "not found in time", ""
    return str(found["micro_batch"]), "" if found["ratio"] is None else f"{found['ratio']:.2f}"


def _alternatives(rows: list[Values]) -> str:
    """The chosen plans beside the next best."""
    body = []
    for row in rows:
        ran = [other for other in row["alternatives"] if other.get("speed")]
        if not ran or not row.get("speed"):
            continue
        for plan, found in ((row["chosen"], row["speed"]), *((other, other["speed"]) for other in ran)):
            body.append([
                row["name"],
                plan["name"].removeprefix(f"{row['preset']} "),
                f"{found['predicted_step_seconds']:.3f}",
                f"{found['measured_step_seconds']:.3f}",
                f"{found['predicted_step_seconds'] / found['measured_step_seconds'] - 1:+.1%}",
            ])  # fmt: skip
    if not body:
        return ""
    head = ["row", "plan, the chosen one first", "seconds of a step, predicted", "measured", "error"]
    return f"## The next best\n\n{table(head, body, left=2)}"


def _others(rows: list[Values]) -> str:
    """What there is no figure of, and why."""
    body = []
    for row in rows:
        for each in (row, *row["alternatives"]):
            if each["outcome"] in {"ran", "out of memory"}:
                continue
            what = f"{row['name']}, next best: {each['name']}" if each is not row else row["name"]
            body.append([what, each["outcome"], each.get("reason", "").replace("\n", " ").replace("|", "/")])
    return f"## Not measured\n\n{table(['row', 'outcome', 'reason'], body, left=3)}" if body else ""


def _remarks(rows: list[Values]) -> Iterator[str]:
    for row in rows:
        for note in (*row["notes"], *row.get("trained", {}).get("notes", [])):
            yield f"{row['name']}: {note}"


def _gib(count: int) -> str:
    return f"{count / GIB:.2f}"
