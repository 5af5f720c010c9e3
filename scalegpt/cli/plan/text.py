"""The text that ``scalegpt plan`` prints: the plan, its memory, its time, and why other plans were not chosen."""

from scalegpt.cli.output import aligned
from scalegpt.plan_page import wording
from scalegpt.plan_page.wording import NOTHING_LIGHTER, duration
from scalegpt.planner.plan import Plan, host_words
from scalegpt.planner.query import Answer
from scalegpt.planner.search.advice import differences
from scalegpt.units import gib

BAR_WIDTH = 40
_EIGHTHS = " ▏▎▍▌▋▊▉"
_FULL = "█"


def report(given: Answer) -> str:
    """The answer as the text that the command prints."""
    plan = given.choice
    parts = [_heading(plan), _phases(plan, given.trace), _memory(plan), _verdict(plan)]
    if plan.machine.card is not None:
        parts.append(_time(plan))
    if not plan.can_train:
        parts.append(_remedies(given))
    else:
        parts.append(f"the command:\n  {given.command()}")
    if given.alternatives:
        parts.append(_alternatives(given))
    starting = (_STARTING,) if plan.can_train and plan.machine.nodes > 1 else ()
    said = (*given.notes, *starting, *wording.sources(plan))
    lines = [f"note: {note}" for note in said if not note.startswith("warning")]
    return "\n\n".join([*parts, "\n".join(lines)])


_STARTING = (
    "start the command on every machine, with the first one's host name for FIRST_MACHINE; --launch has other launchers"
)


def bar(share: float, width: int = BAR_WIDTH) -> str:
    """A share from 0 to 1 as a bar of block characters, in steps of an eighth of a character.

    >>> bar(0.5, 4)
    '██'
    """
    eighths = round(min(1.0, max(0.0, share)) * width * 8)
    return (_FULL * (eighths // 8) + _EIGHTHS[eighths % 8]).rstrip()


def _heading(plan: Plan) -> str:
    train = plan.run.train
    settings = f"{train.precision}, recompute {train.recompute}, {train.loss} loss, {train.optimizer}"
    return (
        f"model   {wording.model(plan.run)}\n"
        f"layout  {wording.cards(plan.machine)}, {wording.layout(plan.run.parallel)}, {settings}\n"
        f"step    {wording.step(plan)}"
    )


def _phases(plan: Plan, trace: dict[str, int] | None) -> str:
    """A table of the peak memory of each phase, beside the traced peak if there is a trace."""
    heads, phases = wording.phases(plan, trace)
    rows = [(*heads, ""), *((each.name, *each.figures, "◀ binds" if each.binds else "") for each in phases)]
    table = aligned(rows, right=range(1, len(heads)))
    if trace:
        peak = max(trace.values())
        table += f"\n\npeak {gib(plan.peak_bytes)} calculated, {gib(peak)} traced: {plan.peak_bytes / peak - 1:+.2%}"
    return table


def _memory(plan: Plan) -> str:
    """A table of the parts of the memory and their cumulative sums; on GPUs, a line on host memory follows."""
    sums = list(wording.memory(plan))
    total, largest = max(1, plan.total_bytes), max([1, *(size for each in sums for _, size in each.parts)])
    rows = [("on each GPU" if plan.machine.is_gpu else "in each process", "size", "share", "")]
    for each in sums:
        rows += [(name, gib(int(size)), f"{size / total:.1%}", bar(size / largest)) for name, size in each.parts]
        rows.append((f"= {each.name}", gib(int(each.size)), f"{each.size / total:.1%}", ""))
    return aligned(rows, right={1, 2}) + _host_memory(plan)


def _host_memory(plan: Plan) -> str:
    """A line on the host memory that each GPU needs for offload and for the checkpoint copy; empty if it needs none."""
    if not plan.machine.is_gpu:
        return ""  # on a processor the table has all memory of the process
    copy = plan.checkpoint_copy_bytes
    more = f"{gib(copy)} for the copy from which a checkpoint is written" if copy else ""
    if not plan.host_bytes:
        return f"\n\nin host memory, for each GPU: {more}" if more else ""
    return f"\n\nin host memory, for each GPU: {gib(plan.host_bytes)}" + (f", and {more}" if more else "")


def _verdict(plan: Plan) -> str:
    usable, name = plan.machine.usable_bytes, plan.machine.name
    if usable is None:
        return f"{gib(plan.total_bytes)} needed on each GPU; --gpu NAME or --memory_gb N shows whether it fits"
    share = plan.total_bytes / usable
    picture = bar(share) if plan.fits else _FULL * BAR_WIDTH
    line = f"[{picture.ljust(BAR_WIDTH)}] {gib(plan.total_bytes)} of {gib(usable)} ({name}), {share:.1%}"
    left = gib(abs(plan.missing_bytes))
    if not plan.fits:
        return f"{line}\ndoes not fit: {left} too much"
    if not plan.fits_host:
        return f"{line}\ndoes not fit: offload needs {host_words(plan)}"
    host = f"; offload needs {host_words(plan)}" if plan.host_needed else ""
    return f"{line}\nfits, with {left} to spare{host}"


def _time(plan: Plan) -> str:
    """A table of the parts of a step's time, the largest first; parts below 0.05% of the step are not shown."""
    parts = wording.times(plan)
    rows = [("of each step", "time", "share", "")]
    rows += [
        (name, duration(seconds), f"{seconds / plan.seconds:.1%}", bar(seconds / parts[0][1], BAR_WIDTH // 2))
        for name, seconds in parts
        if seconds >= 0.0005 * plan.seconds
    ]
    rows.append(("= a step", duration(plan.seconds), "", ""))
    return f"{aligned(rows, right={1, 2})}\n\n{wording.speed(plan)}"


def _remedies(given: Answer) -> str:
    if not given.remedies:
        return NOTHING_LIGHTER
    lines = []
    for remedy in given.remedies:
        plan = remedy.plan
        changes = differences(given.choice, plan) if plan.machine.card == given.choice.machine.card else ""
        where = f" {remedy.what}" if changes.find("--gpus") < 0 and not remedy.what.startswith("with") else ""
        what = f"would fit{where}, with {gib(plan.total_bytes)}" + (f": {changes}" if changes else "")
        lines.append(f"{what}\n  {given.command(plan)}")
    return "\n".join(lines)


def _alternatives(given: Answer) -> str:
    """A table of plans with other layouts or settings: the best plan for each, and why it was not chosen."""
    rows = [(each.differs, *wording.total_and_speed(each.plan), each.why_not) for each in given.alternatives]
    return aligned([("instead", "total", "tokens/s", "why not"), *rows], right={1, 2})
