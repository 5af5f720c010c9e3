"""What ``gpu_suite.py speed`` makes of its rows: findings against the limits, and the report."""

from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks.suite.frame import machine_table, table
from benchmarks.suite.speed_rows import LOOP, LOSS, PRESETS, PROFILE, TRAIN
from scalegpt.hardware.gpus import GIB

Values = dict[str, Any]

LEAST_MFU = {"500M_1024": 0.55, "350M_1024": 0.52, "150M_1024": 0.48}
"""Of the fastest of our rows."""

LEAST_OVER_LOOP = 1.3
"""Our fastest row's tokens a second, as a multiple of those of the plain loop, compiled, at its fastest."""

MOST_RECOMPUTE = {"full": 0.30, "selective": 0.10}
"""By how much longer a step may take than with nothing computed again, all else alike."""

MOST_BACKEND = 0.05
"""By how much fewer tokens a second ZeRO-1 and FSDP2 may do over one rank than the plain backend, all else alike."""

KERNELS_SHOWN, NAME_SHOWN = 20, 90

NOTES = (
    "All rows of a preset take steps of the same tokens: as many as keep a step short. A preset's own step has several times "
    "as many, so that the optimizer weighs less in it; by estimate that would raise all of these rates by about a hundredth.",
    "Of each row a step or two come before those that count. These run in a row, and nobody waits for the device between "
    "them but the step itself, which reads the gradient's norm. Rates are of the median step.",
    "Steps of ours are those of the trainer's backends, on random tokens made on the host and copied to the card. The plain "
    "loop is `benchmarks/steps/baseline.py`: nanoGPT's model and loop written afresh, of the same shape and with the same "
    "tokens of a step, full logits, bf16 autocast, and its own micro batch, the largest up to 32 sequences that is predicted "
    "to fit.",
    "MFU counts 6P + 12·L·H·T operations a token and the card's dense peak.",
    "Predictions are by the planner's tables alone, those of memory with cuBLAS's workspaces; errors are predicted ÷ "
    "measured − 1. For compiled blocks the predicted memory is an upper bound.",
    "The loss alone, over as many tokens of the chosen micro batch as are predicted to fit with full logits: forward and "
    "backward, hidden states in the compute dtype, an fp32 master of the head and its gradient. "
    "What others want in the compute dtype is cast, forth and back. Its extra memory is the peak beyond these inputs, "
    "gradients included. The distance is that of the gradients from those of full logits in fp32, over 4096 tokens at most.",
    "The profiler slows the processor down: where the card waits for it, the idle share is less without.",
)


# --- against the limits ----------------------------------------------------------------------------------------------


def limits() -> Values:
    """The limits as plain values."""
    return {
        "least_mfu": LEAST_MFU,
        "least_over_plain_loop": LEAST_OVER_LOOP,
        "most_recompute": MOST_RECOMPUTE,
        "most_backend": MOST_BACKEND,
    }


def findings(rows: Iterable[Values]) -> list[Values]:
    """Each limit for each preset: what was found, whether it keeps the limit; None where it was not measured."""
    ran = [row for row in rows if row["outcome"] == "ran"]
    return [
        found for preset in PRESETS for found in _of_preset(preset, [row for row in ran if row["preset"] == preset])
    ]


def _of_preset(preset: str, rows: list[Values]) -> Iterator[Values]:
    ours, loop = fastest(rows, TRAIN), fastest((row for row in rows if row["compiled"]), LOOP)
    share = ours["measured"]["mfu"] if ours else None
    unknown = "the card's peak is not known" if ours else ""
    yield _finding(f"{preset}: MFU", share, least=LEAST_MFU[preset], why_none=unknown)
    ratio = _rate(ours) / _rate(loop) if ours and loop else None
    yield _finding(f"{preset}: tokens/s over those of the compiled plain loop", ratio, least=LEAST_OVER_LOOP)
    for kind, most in MOST_RECOMPUTE.items():
        longest = max(
            (_longer(rows, row) for row in _trained(rows) if _is_recompute(row, kind)), key=_or_less, default=None
        )
        yield _finding(f"{preset}: recompute {kind} makes a step longer by", longest, most=most)
    for name, backend, stages in (("ZeRO-1", "deepspeed", {1}), ("FSDP2", "fsdp", {0, 2, 3})):
        mine = [row for row in _trained(rows) if row["backend"] == backend and row["zero_stage"] in stages]
        slowest = max((_slower(rows, row) for row in mine), key=_or_less, default=None)
        yield _finding(f"{preset}: {name} over one rank is slower than plain by", slowest, most=MOST_BACKEND)


def _finding(
    what: str, found: float | None, *, least: float | None = None, most: float | None = None, why_none: str = ""
) -> Values:
    kept = None if found is None else found >= least if least is not None else found <= (most or 0.0)
    return {"what": what, "found": found, "least": least, "most": most, "kept": kept, "why_none": why_none}


def _is_recompute(row: Values, kind: str) -> bool:
    return bool(row["backend"] == "plain" and row["flags"]["recompute"] == kind)


def _or_less(value: float | None) -> float:
    return float("-inf") if value is None else value


def _longer(rows: list[Values], row: Values) -> float | None:
    """By how much longer a step takes than with nothing computed again."""
    other = partner(rows, row, recompute="none")
    return None if other is None else _rate(other) / _rate(row) - 1


def _slower(rows: list[Values], row: Values) -> float | None:
    """By how much fewer tokens a second a row does than the plain backend."""
    other = partner(rows, row, backend="plain", zero_stage=0)
    return None if other is None else 1 - _rate(row) / _rate(other)


def partner(rows: Iterable[Values], row: Values, **changed: Any) -> Values | None:
    """The row that trains as another does but for what is changed; None: there is none."""
    wanted = {**_settings(row), **changed}
    return next((other for other in _trained(rows) if _settings(other) == wanted), None)


def _settings(row: Values) -> Values:
    layout = {key: row[key] for key in ("preset", "backend", "zero_stage", "grad_accum", "compiled")}
    return {**layout, "attention": "auto", **row["flags"]}


def _trained(rows: Iterable[Values]) -> list[Values]:
    return [row for row in rows if row["kind"] == TRAIN and row["outcome"] == "ran"]


def fastest(rows: Iterable[Values], kind: str) -> Values | None:
    """The row of a kind with most tokens a second; None: none ran."""
    return max((row for row in rows if row["kind"] == kind and row["outcome"] == "ran"), key=_rate, default=None)


def _rate(row: Values) -> float:
    rate: float = row["measured"]["tokens_per_second"]
    return rate


def verdicts(found: Iterable[Values]) -> list[str]:
    """A line for each limit."""
    return [_verdict(each) for each in found]


def _verdict(each: Values) -> str:
    as_share = each["least"] != LEAST_OVER_LOOP
    limit = each["most"] if each["least"] is None else each["least"]
    asked = f"at {'most' if each['least'] is None else 'least'} {_figure(limit, as_share=as_share)}"
    if each["kept"] is None:
        return f"{each['what']}: {each['why_none'] or 'not measured'}; {asked}"
    kept = "limit kept" if each["kept"] else "LIMIT NOT KEPT"
    return f"{each['what']}: {_figure(each['found'], as_share=as_share)}, {asked}; {kept}"


def _figure(value: float, *, as_share: bool) -> str:
    return f"{value:.1%}" if as_share else f"{value:.2f}"


# --- the report ------------------------------------------------------------------------------------------------------


def markdown(record: Values) -> str:
    """The report of a complete record, as :func:`benchmarks.suite.speed_suite.run` makes it."""
    rows, software = record["rows"], record["software"]
    parts = [
        f"# Speed: {record['gpu']['name']}",
        f"`{software['command']}`, {software['date']}, {record['seconds']:.0f} s",
        machine_table(record["gpu"], software),
        "## Against the limits\n\n" + "\n".join(f"- {line}" for line in verdicts(record["findings"])),
        f"## Beside the plain loop\n\n{_beside(rows)}",
        *(_training(preset, rows) for preset in PRESETS),
        _losses(rows),
        _profiles(rows),
        _not_measured(rows),
        "## Notes\n\n" + "\n".join(f"- {note}" for note in (*NOTES, *_remarks(rows))),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _beside(rows: list[Values]) -> str:
    body = []
    for preset in PRESETS:
        mine = [row for row in rows if row["preset"] == preset]
        ours = fastest(mine, TRAIN)
        loops = [row for row in mine if row["kind"] == LOOP and row["outcome"] == "ran"]
        for row in (*([ours] if ours else []), *sorted(loops, key=_rate, reverse=True)):
            ratio = f"{_rate(ours) / _rate(row):.2f}" if ours and row is not ours else ""
            body.append([row["name"], *_speed(row), _held(row, "allocated_bytes"), ratio])
    head = ["our fastest, and the loop", "tokens/s", "MFU", "ms a step", "middle half", "peak GiB", "ours is faster by"]
    return table(head, body) if body else "Nothing was measured."


def _training(preset: str, rows: list[Values]) -> str:
    """Everything of ours that was timed with a preset; the first is what the planner chooses."""
    mine = [row for row in _trained(rows) if row["preset"] == preset]
    if not mine:
        return ""
    body = []
    for row in mine:
        predicted, measured = row["predicted"], row["measured"]
        body.append([
            row["name"].removeprefix(f"{preset} "),
            *_speed(row),
            f"{_rate(row) / _rate(mine[0]):.3f}",
            _error(predicted["tokens_per_second"], _rate(row)),
            _held(row, "allocated_bytes"),
            _error(predicted["peak_bytes"], measured.get("allocated_bytes")),
            _held(row, "reserved_bytes"),
            _error(predicted["reserved_bytes"], measured.get("reserved_bytes")),
        ])  # fmt: skip
    head = [
        "configuration", "tokens/s", "MFU", "ms a step", "middle half", "of the first", "predicted tokens/s",
        "peak GiB", "predicted", "reserved GiB", "predicted",
    ]  # fmt: skip
    tokens = mine[0]["measured"]["tokens_per_step"]
    return f"## {preset}, {tokens:,} tokens a step\n\n{table(head, body)}"


def _speed(row: Values) -> list[str]:
    """Tokens a second, MFU, and milliseconds of a step with their middle half."""
    measured = row["measured"]
    low, high = measured["middle_half"]
    share = "" if measured["mfu"] is None else f"{measured['mfu']:.1%}"
    step = f"{1e3 * measured['step_seconds']:.1f}"
    return [f"{measured['tokens_per_second']:,.0f}", share, step, f"{1e3 * low:.1f} to {1e3 * high:.1f}"]


def _held(row: Values, key: str) -> str:
    held = row["measured"].get(key)
    return "" if held is None else f"{held / GIB:.2f}"


def _error(predicted: float | None, measured: float | None) -> str:
    return "" if predicted is None or not measured else f"{predicted / measured - 1:+.1%}"


def _losses(rows: list[Values]) -> str:
    mine = [row for row in rows if row["kind"] == LOSS and row["outcome"] == "ran"]
    body = []
    for row in mine:
        measured = row["measured"]
        low, high = measured["middle_half"]
        body.append([
            row["name"].replace(" loss alone", ""),
            f"{measured['tokens']:,}",
            f"{1e3 * measured['step_seconds']:.2f}",
            f"{1e3 * low:.2f} to {1e3 * high:.2f}",
            _held(row, "extra_bytes"),
            f"{row['gradient_error']:.1e}",
        ])  # fmt: skip
    head = ["loss", "tokens", "ms", "middle half", "extra GiB", "distance of gradients"]
    return f"## The loss alone\n\n{table(head, body)}" if body else ""


def _profiles(rows: list[Values]) -> str:
    return "\n\n".join(_profile(row) for row in rows if row["kind"] == PROFILE and row["outcome"] == "ran")


def _profile(row: Values) -> str:
    found = row["measured"]
    body = [
        [
            kernel["name"][:NAME_SHOWN].replace("|", "/"),
            f"{1e3 * kernel['seconds_of_step']:.2f}",
            f"{kernel['share']:.1%}",
            f"{kernel['calls_of_step']:.0f}",
        ]
        for kernel in found["kernels"][:KERNELS_SHOWN]
    ]
    words = (
        f"{row['name'][0].upper()}{row['name'][1:]}, {found['steps']} steps of {1e3 * found['step_seconds']:.1f} ms: no "
        f"kernel runs in {found['idle_share']:.1%} of the time; {found['kernels_of_step']:.0f} kernels a step, of "
        f"{found['kinds_of_kernels']} kinds."
    )
    return f"## Profile\n\n{words}\n\n{table(['kernel', 'ms a step', 'share', 'calls a step'], body)}"


def _not_measured(rows: list[Values]) -> str:
    body = [
        [row["name"], row["outcome"], row.get("reason", "").replace("\n", " ").replace("|", "/")]
        for row in rows
        if row["outcome"] != "ran"
    ]
    return f"## Not measured\n\n{table(['row', 'outcome', 'reason'], body, left=3)}" if body else ""


def _remarks(rows: list[Values]) -> Iterator[str]:
    for row in rows:
        for note in row.get("notes", []):
            yield f"{row['name']}: {note}"
