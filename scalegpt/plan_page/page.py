"""A plan as HTML: its sections, and the page of ``scalegpt plan --html``, which is one file and needs no network.

Tables repeat every figure of the charts.
"""

from collections.abc import Callable, Sequence
from datetime import date
from itertools import cycle

from scalegpt.html import svg
from scalegpt.html.page import Table, command, document, escape, facts, section
from scalegpt.html.svg import Caption, Mark, Slice, small_bar, stack, swatch
from scalegpt.plan_page import wording
from scalegpt.plan_page.curves import over_micro_batches
from scalegpt.plan_page.wording import NOTHING_LIGHTER, Sum, duration, speed
from scalegpt.planner.plan import Plan, host_words
from scalegpt.planner.query import Answer
from scalegpt.planner.search.advice import differences
from scalegpt.units import gib

STYLE = (
    svg.STYLE
    + """
.verdict{font-size:1.1rem;border-left:4px solid var(--good);padding-left:.8rem}.verdict.no{border-color:var(--warn)}
.verdict b{color:var(--good)}.verdict.no b,.over{color:var(--warn)}
table{margin:.6rem 0}td.bar{width:40%;min-width:5rem;padding-top:.4rem}td.why{min-width:9rem}
tr.sum>*{color:inherit;font-weight:600;border-top:1px solid var(--line)}th.flags{min-width:12rem}
.here{font-weight:700;outline:2px solid var(--ink);outline-offset:2px}
thead td{border-bottom:1px solid var(--line)}.soft{color:var(--soft)}
code,pre{font-family:ui-monospace,monospace;overflow-wrap:anywhere}code{font-size:13px}pre{user-select:all}
@media (max-width:640px){code{font-size:12px}td.bar{min-width:3rem}
table:has(.flags),table:has(.flags) thead,table:has(.flags) tbody{display:block}
table:has(.flags) tr{display:grid;grid-template-columns:1fr 5rem 4.5rem;padding:.3rem 0;border-bottom:1px solid var(--line)}
table:has(.flags) .flags{grid-column:1/-1}table:has(.flags) thead th{border:0;padding:0 .7rem 0 0}}
"""
)

COLOURS = {
    "activations": 1, "optimizer state": 2, "weights": 3, "gradients": 4, "weight copies": 5, "loss": 6,
    "gathered weights": 7, "temporaries": 8, "buckets": 9, "inputs": 10, "gather buffers": 11, "reduce buffers": 12,
    "matmuls": 1, "optimizer": 2, "attention": 3, "elementwise": 4, "weights and gradients": 5, "communication": 7,
    "recompute": 8, "host memory": 9, "waiting for Python": 10,
}  # fmt: skip
"""Part of the memory or of a step's time → the number of its colour in the palette, the same on every page."""

GREYS = ("r1", "r2")
"""The CSS classes of the parts of memory outside the step's tensors, used alternately."""


def page(given: Answer, asked_by: str | None = None, written: date | None = None) -> str:
    """The plan as a whole HTML page.

    Args:
        given: the answer, for a machine whose memory is known.
        asked_by: the command that made the page; None: not shown.
        written: the day on which the page was made; None: not shown.
    """
    plan = given.choice
    title = f"{plan.run.name} on {wording.cards(plan.machine)}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        verdict(given),
        command_section(given) if plan.can_train else remedies_section(given),
        settings_section(given),
        memory_section(given),
        phases_section(plan, given.trace),
        over_micro_batches(given),
        time_section(plan) if plan.machine.card is not None else "",
        alternatives_section(given) if plan.can_train else "",
        notes_section(given, asked_by, written),
    ]
    return document(title, f"<main>{''.join(parts)}</main>", STYLE)


def verdict(given: Answer) -> str:
    """A paragraph: whether the plan fits, and its speed if the card is known."""
    plan, question = given.choice, given.question
    each = " on each GPU" if plan.machine.ranks > 1 else ""
    needs, usable = f"It needs {gib(plan.total_bytes)}{each}", gib(plan.machine.usable_bytes or 0)
    if plan.fits is False:
        said = f"<b>It does not fit.</b> {needs}, but a run may use {usable}: {gib(plan.missing_bytes)} too much."
    elif not plan.fits_host:
        said = f"<b>It does not fit.</b> Offload needs {host_words(plan)}."
    else:
        tight = plan.total_bytes > question.limit
        margin = f", less than the safety margin of {100 * question.margin:g}%" if tight else ""
        left = f"{gib(-plan.missing_bytes)} free{margin}"
        said = f"<b>It fits.</b> {needs} of the {usable} that a run may use, and leaves {left}."
        if plan.host_needed:
            said += f" Offload needs {host_words(plan)}."
        if plan.machine.card is not None:
            said += f" It trains at about {escape(speed(plan))}."
    return f'<p class="verdict{"" if plan.can_train else " no"}">{said}</p>'


def command_section(given: Answer) -> str:
    """The section with the command that trains as the plan says."""
    return section("The command", f"<pre>{command(given.command())}</pre>")


def remedies_section(given: Answer) -> str:
    """The section of plans that would fit instead, each with the command that trains it."""
    lines = [] if given.remedies else [f"<p>{NOTHING_LIGHTER[0].upper()}{NOTHING_LIGHTER[1:]}.</p>"]
    for remedy in given.remedies:
        plan = remedy.plan
        changes = differences(given.choice, plan)
        flags = f": <code>{command(changes)}</code>" if changes else ", with the same settings."
        size = f"{gib(plan.total_bytes)} of {gib(plan.machine.usable_bytes or 0)}"
        lines.append(
            f"<p>It fits {escape(remedy.what)}, taking {size}{flags}</p><pre>{command(given.command(plan))}</pre>"
        )
    return section("What would fit", *lines)


def settings_section(given: Answer) -> str:
    """The section on the model, the optimizer step, and the settings, each with who decided it: the planner or the user."""
    plan = given.choice
    train, parallel = plan.run.train, plan.run.parallel
    about = {
        "model": wording.model(plan.run),
        "machine": f"{wording.cards(plan.machine)}, {gib(plan.machine.usable_bytes or 0)} usable on each",
        "step": wording.step(plan),
        "training": f"{train.precision}, {train.optimizer}",
    }
    settings = {
        "backend": parallel.backend,
        "zero_stage": str(parallel.stage),
        "offload": parallel.offload,
        "micro_batch": str(plan.batch.micro_batch),
        "recompute": train.recompute,
        "loss": train.loss,
    }
    if parallel.shard_size is not None or "shard_size" in given.question.open:
        settings["shard_size"] = str(parallel.shard_size or "all ranks")
    table = Table("The settings that the planner may choose", ("setting", "value", "decided by"), ("", "", ""))
    for name, value in settings.items():
        table.add(name, escape(value), "the planner" if name in given.question.open else "you")
    return section("The plan", facts(about), table.draw())


Figures = Callable[[float], tuple[str, str]]
"""A function from a size (bytes or seconds) to two texts: the size with its unit, and its share of the whole."""


def memory_section(given: Answer) -> str:
    """The section on the parts of a GPU's memory: a bar with the card's limit marked, and a table."""
    plan, question = given.choice, given.question
    usable, margin = plan.machine.usable_bytes or 0, f"{100 * question.margin:g}%"
    marks = [Mark(usable, f"limit of the card: {gib(usable)}", "limit")]
    if question.margin:
        marks.append(Mark(question.limit, f"less the margin of {margin}: {gib(int(question.limit))}", "margin"))

    def figures(size: float) -> tuple[str, str]:
        return gib(int(size)), f"{size / plan.total_bytes:.1%}"

    sums = list(wording.memory(plan))
    slices = _slices(sums, figures)
    within = "within" if plan.fits else "beyond"
    described = (
        f"{gib(plan.total_bytes)} in all, {within} the card's limit of {gib(usable)}; "
        f"the largest part is {sums[0].parts[0][0]}."
    )
    caption = Caption("memory", "Memory on each GPU, by part", described)
    whole, head = max(usable, plan.total_bytes), f"this plan: {gib(plan.total_bytes)}"
    table = _parts_table(caption.title, "size", sums, slices, figures)
    table.add("limit of the card", gib(usable), "")
    if question.margin:
        table.add(f"limit less the margin of {margin}", gib(int(question.limit)), "")
    return section(
        "Where the memory goes",
        "<p>What each GPU holds at the peak of a step.</p>",
        stack(caption, slices, whole, head, marks),
        table.draw(),
        f"<p>In host memory, for each GPU: {gib(plan.host_bytes)}.</p>" if plan.host_bytes else "",
    )


def time_section(plan: Plan) -> str:
    """The section on the parts of a step's time: a bar and a table."""

    def figures(seconds: float) -> tuple[str, str]:
        return duration(seconds), f"{seconds / plan.seconds:.1%}"

    step = Sum("a step", plan.seconds, wording.times(plan))
    slices = _slices([step], figures)
    described = f"{duration(plan.seconds)} in all; most of it is {step.parts[0][0]}."
    caption = Caption("time", "Time of a step, by part", described)
    takes = "takes" if plan.can_train else "does not fit; it would take"
    return section(
        "Where the time goes",
        f"<p>A step {takes} {duration(plan.seconds)}: {escape(speed(plan))}.</p>",
        stack(caption, slices, plan.seconds),
        _parts_table(caption.title, "time", [step], slices, figures).draw(),
    )


def _slices(sums: Sequence[Sum], figures: Figures) -> list[Slice]:
    """A bar's slices, one for each part of each cumulative sum.

    Parts of the first sum are coloured, all others grey.
    """
    greys = cycle(GREYS)
    return [
        Slice(name, size, ", ".join(figures(size)), next(greys) if place else f"c{COLOURS[name]}")
        for place, each in enumerate(sums)
        for name, size in each.parts
    ]


def _parts_table(label: str, head: str, sums: Sequence[Sum], slices: Sequence[Slice], figures: Figures) -> Table:
    """A table of the parts, each with its colour; each cumulative sum has a row below the parts that it adds."""
    table = Table(label, ("part", head, "share"), ("", "number", "number"))
    drawn = iter(slices)
    for each in sums:
        for name, size in each.parts:
            table.add(swatch(next(drawn).style) + escape(name), *figures(size))
        table.add(escape(each.name), *figures(each.size), kind="sum")
    return table


def phases_section(plan: Plan, trace: dict[str, int] | None) -> str:
    """The section on the peak memory of each phase, beside the traced peak if there is a trace."""
    heads, phases = wording.phases(plan, trace)
    table = Table("The peak of each phase of a step", [*heads, ""], ["", *["number"] * (len(heads) - 1), "bar"])
    for each in phases:
        drawn = small_bar(each.size / plan.peak_bytes, "c1" if each.binds else "r2")
        name, kind = (f"{each.name}, the peak", "binds") if each.binds else (each.name, "")
        table.add(name, *each.figures, drawn, kind=kind)
    said = "<p>Only tensors are counted; the phase with the highest peak decides how much memory is needed.</p>"
    return section("The peak of each phase", said, table.draw())


def alternatives_section(given: Answer) -> str:
    """The section on plans with other layouts or settings: the best plan for each, and why it was not chosen."""
    if not given.alternatives:
        why = "there is nothing else to choose" if given.question.open else "every setting was fixed"
        return section("Why not another", f"<p>Nothing was compared: {why}.</p>")
    heads, classes = ("instead", "why not", "total", "tokens/s"), ("flags", "why", "number", "number")
    table = Table("Why not another", heads, classes)
    for each in given.alternatives:
        total, speed = wording.total_and_speed(each.plan)
        table.add(f"<code>{command(each.differs)}</code>", escape(each.why_not), total, speed)
    return section(
        "Why not another", "<p>For every other layout or setting, the best plan that uses it.</p>", table.draw()
    )


def notes_section(given: Answer, asked_by: str | None, written: date | None) -> str:
    """The section of remarks, with the command that made the page and the day; None: not shown."""
    lines = "".join(f"<li>{escape(note)}</li>" for note in (*given.notes, *wording.sources(given.choice)))
    said = [f"by <code>{command(asked_by)}</code>"] if asked_by else []
    said += [f"on {written.isoformat()}"] if written else []
    return section("Notes", f"<ul>{lines}</ul>", f'<p class="soft">Written {" ".join(said)}</p>' if said else "")
