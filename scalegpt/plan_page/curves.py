"""The page's section on memory by micro batch size: a chart with the card's limit, and a table of the same figures."""

from math import log2

from scalegpt.hardware.gpus import GIB
from scalegpt.html.page import Table, escape, section
from scalegpt.html.svg import Axis, Caption, Chart, Line, Mark, Point, legend, ticks
from scalegpt.planner.plan import Plan
from scalegpt.planner.query import Answer
from scalegpt.planner.search.curves import Curves, memory_curves
from scalegpt.units import gib

_HUES = {"none": 1, "selective": 4, "full": 3}
"""Recompute policy → the number of its line's colour in the palette."""


def over_micro_batches(given: Answer) -> str:
    """The whole section: a sentence on the largest micro batches that fit, the chart, its legend, and the table."""
    curves = memory_curves(given.question, given.choice)
    largest, batch = _largest(given, curves), given.choice.batch
    return section(
        "Memory over micro batch",
        "<p>Memory on each GPU with other micro batches, for the same "
        f"{batch.micro_batch * batch.grad_accum:,} sequences on each GPU in a step, the same layout and "
        f"{escape(given.choice.run.train.loss)} loss. {escape(largest)}</p>",
        _chart(given, curves, largest),
        _legend(given, curves),
        _table(given, curves),
    )


def _largest(given: Answer, curves: Curves) -> str:
    """Sentences that name the largest micro batch that fits with each recompute policy."""
    fitting, none = list[str](), list[str]()
    for recompute, curve in curves.items():
        sizes = [micro for micro, plan in curve.items() if plan.total_bytes <= given.question.limit]
        if sizes:
            fitting.append(f"{max(sizes)} with recompute {recompute}")
        else:
            none.append(recompute)
    said = [f"The largest micro batch that fits with the safety margin is {_listed(fitting)}."] if fitting else []
    return " ".join([*said, *([f"No micro batch fits with recompute {_listed(none)}."] if none else [])])


def _listed(words: list[str]) -> str:
    """The words as a list in a sentence: ``a, b and c``."""
    return " and ".join([*([", ".join(words[:-1])] if words[1:] else []), words[-1]])


def _chart(given: Answer, curves: Curves, largest: str) -> str:
    plan, usable = given.choice, given.choice.machine.usable_bytes or 0
    lines = [Line(_HUES[name], [_point(given, other) for other in curve.values()]) for name, curve in curves.items()]
    marks = [Mark(usable / GIB, "limit", "limit")]
    if given.question.margin:
        marks.append(Mark(given.question.limit / GIB, "margin", "margin"))
    doublings = max(point.x for line in lines for point in line.points)
    top = max(1.25 * usable, 1.12 * plan.total_bytes) / GIB
    chart = Chart(
        Caption(
            "curves",
            "Total memory on each GPU over micro batch",
            f"One line for each recompute setting, rising with the micro batch, and the card's limit of {gib(usable)}. "
            f"{largest} The plan is marked: micro batch {plan.batch.micro_batch}, {gib(plan.total_bytes)}.",
        ),
        lines,
        x_axis=Axis(
            0, doublings, range(0, int(doublings) + 1, 1 + int(doublings) // 10), lambda power: f"{2**power:g}"
        ),
        y_axis=Axis(0, top, [each for each in ticks(0, top) if each <= top], lambda size: f"{size:g} GiB"),
        marks=marks,
        chosen=(_point(given, plan), "this plan"),
        x_label="sequences in a micro batch, on each GPU",
    )
    return chart.draw()


def _point(given: Answer, plan: Plan) -> Point:
    """A plan as a point of the chart: x is the logarithm to base 2 of its micro batch, y its total memory in GiB."""
    micro, remark = plan.batch.micro_batch, _remark(given, plan)
    words = f"micro batch {micro}, recompute {plan.run.train.recompute}: {gib(plan.total_bytes)}"
    return Point(log2(micro), plan.total_bytes / GIB, f"{words}, {remark}" if remark else words)


def _remark(given: Answer, plan: Plan) -> str:
    """How a plan exceeds a limit: ``does not fit``, ``within the margin`` (leaves less free than the margin), or empty."""
    if plan.fits is False:
        return "does not fit"
    return "within the margin" if plan.total_bytes > given.question.limit else ""


def _legend(given: Answer, curves: Curves) -> str:
    """The chart's legend, which names each line."""
    usable, margin, limit = given.choice.machine.usable_bytes or 0, given.question.margin, given.question.limit
    named = [(Line(_HUES[name], ()).style, f"recompute {name}") for name in curves]
    named.append(("limit", f"limit of the card, {gib(usable)}"))
    if margin:
        named.append(("margin", f"limit less the margin of {100 * margin:g}%, {gib(int(limit))}"))
    return legend(named)


def _table(given: Answer, curves: Curves) -> str:
    own = given.choice.batch.micro_batch, given.choice.run.train.recompute
    table = Table(
        "Total memory on each GPU over micro batch",
        ("micro batch", *(f"recompute {name}" for name in curves)),
        ["number"] * (1 + len(curves)),
    )
    for micro in sorted({micro for curve in curves.values() for micro in curve}):
        cells = [_cell(given, curve.get(micro), here=(micro, name) == own) for name, curve in curves.items()]
        table.add(str(micro), *cells)
    return (
        f'{table.draw()}<p class="soft">Totals in GiB. Framed: this plan. ✗: does not fit. ~: fits only without the '
        "safety margin. The largest micro batch needs no gradient accumulation, and therefore no memory for "
        "accumulated gradients.</p>"
    )


def _cell(given: Answer, plan: Plan | None, *, here: bool) -> str:
    """A cell with a plan's total in GiB: marked if :func:`_remark` is not empty, framed (``here``) for the chosen plan."""
    if plan is None:
        return '<abbr title="not possible with this DeepSpeed file">–</abbr>'
    remark = _remark(given, plan)
    sign = {"": "", "does not fit": "✗ ", "within the margin": "~ "}[remark]
    total = f"{plan.total_bytes / GIB:.2f}"
    kind = " ".join([*(["over"] if remark else []), *(["here"] if here else [])])
    return f'<span class="{kind}">{sign}{total}</span>' if kind else total
