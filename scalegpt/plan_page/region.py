"""The page's section on the feasible region: a table of layouts and micro batches, with the recompute that fits."""

from scalegpt.html.page import Table, escape, section
from scalegpt.plan_page.wording import layout
from scalegpt.planner.query import Answer
from scalegpt.planner.search.region import LayoutRegion, feasible_region

MOST_COLUMNS = 12
"""The most micro batches that are shown; if there are more, powers of two, the plan's own and the largest come first."""

_WORDS = {"none": "yes", "selective": "selective", "full": "full", None: "no"}
"""Lightest recompute that fits → the words of a cell."""


def what_fits(given: Answer) -> str:
    """The whole section: a sentence, the table, and what its cells mean."""
    plan = given.choice
    rows = list(feasible_region(given.question, plan))
    sizes = _columns(list(rows[0].lightest), plan.batch.micro_batch)
    heads = ("layout, micro batch", *map(str, sizes))
    table = Table("What fits, by layout and micro batch", heads, ["layout", *["cell"] * len(sizes)])
    for row in rows:
        table.add(escape(layout(row.layout)), *(_cell(given, row, micro) for micro in sizes))
    return section(
        "What fits",
        "<p>Which micro batches fit with each layout, for the same sequences on each GPU in a step and within the "
        "safety margin of "
        f"{100 * given.question.margin:g}%.</p>",
        table.draw(),
        '<p class="soft">yes: fits without recompute. selective, full: fits with that recompute. no: does not fit. '
        "Framed: this plan.</p>",
    )


def _columns(sizes: list[int], own: int) -> list[int]:
    if len(sizes) <= MOST_COLUMNS:
        return sizes
    ranked = sorted(sizes, key=lambda size: (size != own, size != sizes[-1], size & (size - 1) != 0, size))
    return sorted(ranked[:MOST_COLUMNS])


def _cell(given: Answer, row: LayoutRegion, micro: int) -> str:
    lightest, plan = row.lightest[micro], given.choice
    here = " here" if row.layout == plan.run.parallel and micro == plan.batch.micro_batch else ""
    return f'<span class="fit-{lightest or "not"}{here}">{_WORDS[lightest]}</span>'
