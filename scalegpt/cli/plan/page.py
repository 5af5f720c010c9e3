"""``scalegpt plan --html``: a plan as one page with pictures, which needs nothing else and reads without them too."""

from datetime import date
from itertools import chain, cycle

from scalegpt.cli.plan import wording
from scalegpt.cli.plan.curves import over_micro_batches
from scalegpt.cli.plan.wording import NOTHING_LIGHTER, Sum, duration, speed
from scalegpt.html import svg
from scalegpt.html.page import Table, command, document, escape, facts
from scalegpt.html.svg import Mark, Slice, Words, small_bar, stack, swatch
from scalegpt.planner.plan import Plan, host_words
from scalegpt.planner.query import Answer
from scalegpt.planner.search.advice import Remedy, differences
from scalegpt.units import gib

_STYLE = (
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
"""Part of the memory, or of the time → the number of its colour: it has the same in every plan."""

GREYS = ("r1", "r2")
"""The styles that take turns among the parts that lie outside the step's tensors."""


def page(given: Answer, asked_by: str | None = None, written: date | None = None) -> str:
    """The plan as a whole page.

    Args:
        given: the answer, of a run on a machine whose memory is known.
        asked_by: the command that asked for it; None: omitted.
        written: the day on which the page is written; None: omitted.
    """
    plan = given.choice
    title = f"{plan.run.name} on {wording.cards(plan.machine)}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        _verdict(given),
        _to_train(given) if _fits(plan) else _remedies(given),
        _planned(given),
        _memory(given),
        _phases(plan, given.trace),
        over_micro_batches(given),
        _time(plan) if plan.machine.card is not None else "",
        _alternatives(given) if _fits(plan) else "",
        _notes(given),
        _origin(asked_by, written),
    ]
    return document(title, f"<main>{''.join(parts)}</main>", _STYLE)


def _fits(plan: Plan) -> bool:
    """Whether the card holds it, and the host what is offloaded."""
    return plan.fits is not False and plan.fits_host


def _verdict(given: Answer) -> str:
    """Whether it fits, in a sentence; and how fast it is, where that is known."""
    plan, question = given.choice, given.question
    each = " on each GPU" if plan.machine.ranks > 1 else ""
    needs, usable = f"It needs {gib(plan.total_bytes)}{each}", gib(plan.machine.usable_bytes or 0)
    if plan.fits is False:
        said = f"<b>It does not fit.</b> {needs}, where a run may use {usable}: {gib(plan.missing_bytes)} too much."
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
    return f'<p class="verdict{"" if _fits(plan) else " no"}">{said}</p>'


def _to_train(given: Answer) -> str:
    return f"<h2>The command</h2><pre>{command(given.command())}</pre>"


def _remedies(given: Answer) -> str:
    """What would fit, each with its command."""
    if not given.remedies:
        said = f"<p>{NOTHING_LIGHTER[0].upper()}{NOTHING_LIGHTER[1:]}.</p>"
    else:
        said = "".join(_remedy(given, remedy) for remedy in given.remedies)
    return f"<h2>What would fit</h2>{said}"


def _remedy(given: Answer, remedy: Remedy) -> str:
    plan = remedy.plan
    changes = differences(given.choice, plan)
    flags = f": <code>{command(changes)}</code>" if changes else ", all else left as it is."
    size = f"{gib(plan.total_bytes)} of {gib(plan.machine.usable_bytes or 0)}"
    return f"<p>It fits {escape(remedy.what)}, taking {size}{flags}</p><pre>{command(given.command(plan))}</pre>"


# --- what is planned -------------------------------------------------------------------------------------------------


def _planned(given: Answer) -> str:
    """The model, its step, and the settings, each with who decided it."""
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
    table = Table("The settings that the planner may choose", ("setting", "value", "decided by"), ("", "", ""))
    for name, value in settings.items():
        table.add(name, escape(value), "the planner" if name in given.question.open else "you")
    return f"<h2>The plan</h2>{facts(about)}{table.draw()}"


# --- memory ----------------------------------------------------------------------------------------------------------


def _memory(given: Answer) -> str:
    """The bar of the parts against the card, and their table."""
    plan, question = given.choice, given.question
    usable = plan.machine.usable_bytes or 0
    sums = list(wording.memory(plan))
    slices = _slices(plan, sums)
    marks = [Mark(usable, f"limit of the card: {gib(usable)}", "limit")]
    if question.margin:
        marks.append(
            Mark(question.limit, f"less the margin of {100 * question.margin:g}%: {gib(int(question.limit))}", "margin")
        )
    words = Words("memory", "Memory on each GPU, by part", _described(plan))
    picture = stack(
        words,
        list(chain.from_iterable(slices)),
        max(usable, plan.total_bytes),
        f"this plan: {gib(plan.total_bytes)}",
        marks,
    )
    table = Table("Memory on each GPU, by part", ("part", "size", "share"), ("", "number", "number"))
    for whole, parts in zip(sums, slices, strict=True):
        for each in parts:
            table.add(swatch(each.style) + escape(each.name), *_figures(plan, int(each.size)))
        table.add(escape(whole.name), *_figures(plan, whole.size), kind="sum")
    table.add("limit of the card", gib(usable), "")
    if question.margin:
        table.add(f"limit less the margin of {100 * question.margin:g}%", gib(int(question.limit)), "")
    host = f"<p>In host memory, for each GPU: {gib(plan.host_bytes)}.</p>" if plan.host_bytes else ""
    return (
        "<h2>Where the memory goes</h2>"
        f"<p>What each GPU holds at the fullest moment of a step.</p>{picture}{table.draw()}{host}"
    )


def _slices(plan: Plan, sums: list[Sum]) -> list[list[Slice]]:
    """The parts of each sum: those of the step's tensors in their colours, the others in greys."""
    greys = cycle(GREYS)
    styles = [
        [f"c{COLOURS[name]}" for name, _ in sums[0].parts],
        *([next(greys) for _ in each.parts] for each in sums[1:]),
    ]
    return [
        [
            Slice(name, size, ", ".join(_figures(plan, size)), style)
            for (name, size), style in zip(each.parts, drawn, strict=True)
        ]
        for each, drawn in zip(sums, styles, strict=True)
    ]


def _figures(plan: Plan, size: int) -> tuple[str, str]:
    return gib(size), f"{size / plan.total_bytes:.1%}"


def _described(plan: Plan) -> str:
    """The bar in words."""
    usable = plan.machine.usable_bytes or 0
    beside = "within" if plan.fits else "beyond"
    largest = max(plan.prediction.breakdown, key=plan.prediction.breakdown.__getitem__)
    return f"{gib(plan.total_bytes)} in all, {beside} the card's limit of {gib(usable)}; the largest part is {largest}."


def _phases(plan: Plan, trace: dict[str, int] | None) -> str:
    """The peak of each phase, beside the trace where there is one."""
    heads, phases = wording.phases(plan, trace)
    table = Table("The peak of each phase of a step", [*heads, ""], ["", *["number"] * (len(heads) - 1), "bar"])
    for each in phases:
        drawn = small_bar(each.size / plan.peak_bytes, "c1" if each.binds else "r2")
        name, kind = (f"{each.name}, the peak", "binds") if each.binds else (each.name, "")
        table.add(name, *each.figures, drawn, kind=kind)
    return (
        "<h2>The peak of each phase</h2>"
        f"<p>Tensors alone; the fullest phase decides how much is needed.</p>{table.draw()}"
    )


# --- time and the others ---------------------------------------------------------------------------------------------


def _time(plan: Plan) -> str:
    """What a step's time goes into."""
    parts = wording.times(plan)
    slices = [
        Slice(name, time, f"{duration(time)}, {time / plan.seconds:.1%}", f"c{COLOURS[name]}") for name, time in parts
    ]
    words = Words("time", "Time of a step, by part", f"{duration(plan.seconds)} in all; most of it is {parts[0][0]}.")
    table = Table("Time of a step, by part", ("part", "time", "share"), ("", "number", "number"))
    for each in slices:
        table.add(swatch(each.style) + escape(each.name), duration(each.size), f"{each.size / plan.seconds:.1%}")
    table.add("a step", duration(plan.seconds), "100.0%", kind="sum")
    takes = "takes" if _fits(plan) else "does not fit; it would take"
    return (
        "<h2>Where the time goes</h2>"
        f"<p>A step {takes} {duration(plan.seconds)}: {escape(speed(plan))}.</p>"
        f"{stack(words, slices, plan.seconds)}{table.draw()}"
    )


def _alternatives(given: Answer) -> str:
    """Why not the others."""
    if not given.alternatives:
        why = "there is nothing else to choose" if given.question.open else "every setting was fixed"
        return f"<h2>Why not another</h2><p>Nothing was compared: {why}.</p>"
    known = given.choice.machine.card is not None
    heads, classes = ("instead", "why not", "total", "tokens/s"), ("flags", "why", "number", "number")
    table = Table("Why not another", heads, classes)
    for each in given.alternatives:
        plan = each.plan
        fast = f"{plan.tokens_per_second:,.0f}" if known and plan.fits else ""
        table.add(f"<code>{command(each.differs)}</code>", escape(each.why_not), gib(plan.total_bytes), fast)
    return f"<h2>Why not another</h2><p>The best of each other kind, against this plan.</p>{table.draw()}"


def _notes(given: Answer) -> str:
    lines = "".join(f"<li>{escape(note)}</li>" for note in (*given.notes, *wording.sources(given.choice)))
    return f"<h2>Notes</h2><ul>{lines}</ul>"


def _origin(asked_by: str | None, written: date | None) -> str:
    """Where the page comes from."""
    said = [f"by <code>{command(asked_by)}</code>"] if asked_by else []
    said += [f"on {written.isoformat()}"] if written else []
    return f'<p class="soft">Written {" ".join(said)}</p>' if said else ""
