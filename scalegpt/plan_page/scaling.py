"""The page's section on other numbers of GPUs: a chart of tokens per second over GPUs, and a table of the same figures."""

from math import ceil, floor, log2, log10

from scalegpt.html.page import Table, escape, section
from scalegpt.html.svg import Axis, Caption, Chart, Line, Point, legend
from scalegpt.plan_page.wording import duration, layout
from scalegpt.planner.length import total_steps
from scalegpt.planner.plan import Plan
from scalegpt.planner.query import Answer
from scalegpt.planner.tables import Row
from scalegpt.units import human_count

_PLANNED, _RANGE, _EVEN = 1, 3, 4
"""The colours of the lines: the plans, their low and high estimates, and a speed proportional to the number of GPUs."""


def over_gpus(given: Answer, rows: list[Row]) -> str:
    """The whole section: a sentence, the chart, its legend, and the table.

    Args:
        given: the answer, for a named card.
        rows: the same run on other numbers of cards, the fewest first; see :func:`~scalegpt.planner.tables.over_counts`.
    """
    plans = {int(row.name): row.plan for row in rows if row.plan is not None and row.fits}
    grows = given.asked.run.train.tokens_per_step is None
    step = (
        "A step has more tokens on more GPUs." if grows else f"A step keeps its {given.choice.batch.tokens:,} tokens."
    )
    said = f"<p>The fastest plan on each number of {escape(given.choice.machine.name or 'GPU')}s. {step}</p>"
    chart = _chart(given, plans) if len(plans) > 1 else ""
    return section("More or fewer GPUs", said, chart, _table(given, rows))


def _chart(given: Answer, plans: dict[int, Plan]) -> str:
    def line(hue: int, speeds: dict[int, float], *, dots: bool = False) -> Line:
        points = [Point(log2(gpus), log10(speed), _label(gpus, speed)) for gpus, speed in speeds.items()]
        return Line(hue, points, has_dots=dots)

    first = min(plans)
    each = plans[first].tokens_per_second / first
    lines = [
        line(_EVEN, {gpus: each * gpus for gpus in plans}),
        *(line(_RANGE, {gpus: plan.tokens_per_second_range[end] for gpus, plan in plans.items()}) for end in (0, 1)),
        line(_PLANNED, {gpus: plan.tokens_per_second for gpus, plan in plans.items()}, dots=True),
    ]
    heights = [point.y for each_line in lines for point in each_line.points]
    low, high = floor(min(heights) * 4) / 4, ceil(max(heights) * 4) / 4
    marks = [power + step for power in range(floor(low), ceil(high) + 1) for step in (0, log10(2), log10(5))]
    own, count = given.choice, given.asked.machine.ranks
    last = plans[max(plans)]
    chart = Chart(
        Caption(
            "scaling",
            "Tokens per second over GPUs",
            f"Rises from {_label(first, plans[first].tokens_per_second)} to "
            f"{_label(max(plans), last.tokens_per_second)}; both axes are logarithmic.",
        ),
        lines,
        x_axis=Axis(log2(first), log2(max(plans)), [log2(gpus) for gpus in plans], lambda power: f"{round(2**power)}"),
        y_axis=Axis(low, high, [mark for mark in marks if low <= mark <= high], lambda power: _short(10**power)),
        chosen=(Point(log2(count), log10(own.tokens_per_second)), "this plan") if count in plans else None,
        x_label="GPUs, on all machines",
    )
    names = {_PLANNED: "tokens/s", _RANGE: "likely range", _EVEN: f"{first} GPU{'s' if first > 1 else ''}, multiplied"}
    return chart.draw() + legend((Line(hue, ()).style, meaning) for hue, meaning in names.items())


def _short(speed: float) -> str:
    """A round number without needless decimals: ``500k`` or ``2M``."""
    speed = float(f"{speed:.2g}")
    return f"{speed / 1e6:g}M" if speed >= 1e6 else f"{speed / 1e3:g}k" if speed >= 1e3 else f"{speed:g}"


def _label(gpus: int, speed: float) -> str:
    return f"{human_count(speed)} tokens/s on {gpus} GPU{'s' if gpus > 1 else ''}"


def _table(given: Answer, rows: list[Row]) -> str:
    heads = ("GPUs", "tokens/s", "likely", "whole run", "layout", "micro batch")
    table = Table("Tokens per second over GPUs", heads, ("number", "number", "number", "number", "layout", "number"))
    for row in rows:
        plan = row.plan
        here = "chosen" if int(row.name) == given.asked.machine.ranks else ""
        if plan is None or not row.fits:
            table.add(row.name, "", "", "", escape(row.why_not or "does not fit"), "", kind=here)
            continue
        low, high = (human_count(speed) for speed in plan.tokens_per_second_range)
        whole = duration(total_steps(plan.run.train, plan.batch.tokens) * plan.seconds)
        used = f" on {plan.machine.ranks}" if plan.machine.ranks < int(row.name) else ""
        table.add(
            row.name, f"{plan.tokens_per_second:,.0f}", f"{low} to {high}", whole,
            escape(layout(plan.run.parallel) + used), str(plan.batch.micro_batch), kind=here,
        )  # fmt: skip
    return table.draw()
