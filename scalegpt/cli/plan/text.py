"""What ``scalegpt plan`` prints: the plan, where its memory and its time go, and why not the others."""

from scalegpt.architecture.counting import count_parameters
from scalegpt.cli.table import aligned
from scalegpt.planner.length import total_steps
from scalegpt.planner.plan import Plan, host_words
from scalegpt.planner.query import Answer
from scalegpt.planner.search.advice import differences
from scalegpt.planner.time.rates import basis
from scalegpt.units import gib

BAR_WIDTH = 40
_LARGE = ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"))
_EIGHTHS = " ▏▎▍▌▋▊▉"
_FULL = "█"


def report(given: Answer) -> str:
    """The whole answer as text: the plan, its memory, its time, the command, and why not the others."""
    plan = given.plan
    parts = [_heading(plan), _phases(plan, given.trace), _memory(plan), _verdict(plan)]
    if plan.machine.card is not None:
        parts.append(_time(plan))
    if plan.fits is False or not plan.fits_host:
        parts.append(_remedies(given))
    else:
        parts.append(f"the command:\n  {given.command()}")
    if given.alternatives:
        parts.append(_alternatives(given))
    lines = [f"note: {note}" for note in (*given.notes, *sources(plan)) if not note.startswith("warning")]
    return "\n\n".join([*parts, "\n".join(lines)])


def bar(share: float, width: int = BAR_WIDTH) -> str:
    """A share from 0 to 1 as a bar of block characters, to an eighth of a character.

    >>> bar(0.5, 4)
    '██'
    """
    eighths = round(min(1.0, max(0.0, share)) * width * 8)
    return (_FULL * (eighths // 8) + _EIGHTHS[eighths % 8]).rstrip()


def _heading(plan: Plan) -> str:
    run, machine, batch = plan.run, plan.machine, plan.batch
    model, train, parallel = run.model, run.train, run.parallel
    stage = "" if parallel.backend == "plain" else f" stage {parallel.stage}"
    offload = "" if parallel.offload == "none" else f", {parallel.offload} offloaded"
    machines = f" in each of {machine.nodes} machines" if machine.nodes > 1 else ""
    return "\n".join((
        f"model   {run.name}: {count_parameters(model).total:,} parameters, {model.n_layer} layers, {model.n_embd} wide, "
        f"{model.n_head} heads, block {model.block_size}, vocabulary {model.vocab_size:,}",
        f"layout  {machine.gpus} × {machine.name or 'GPU'}{machines}, {parallel.backend}{stage}{offload}, {train.precision}, "
        f"recompute {train.recompute}, {train.loss} loss, {train.optimizer}",
        f"step    {batch.tokens:,} tokens = {machine.ranks} rank{'s' if machine.ranks > 1 else ''} × micro batch "
        f"{batch.micro_batch} × accumulation {batch.grad_accum} × block {batch.block_size}",
    ))  # fmt: skip


def _phases(plan: Plan, trace: dict[str, int] | None) -> str:
    """The peak of each phase, beside the trace where there is one."""
    prediction = plan.prediction
    rows = [("phase", "peak", *(("traced", "error") if trace else ()), "")]
    for phase, size in prediction.phases.items():
        beside: tuple[str, ...] = ()
        if trace:
            traced = trace.get(phase, 0)
            beside = (gib(traced), f"{size / traced - 1:+.2%}" if traced else "?")
        rows.append((phase.replace("_", " "), gib(size), *beside, "◀ binds" if phase == prediction.phase else ""))
    table = aligned(rows, right={1, 2, 3} if trace else {1})
    if trace:
        peak = max(trace.values())
        table += f"\n\npeak {gib(plan.peak_bytes)} by arithmetic, {gib(peak)} traced: {plan.peak_bytes / peak - 1:+.2%}"
    return table


def _memory(plan: Plan) -> str:
    """Where the memory goes: the parts of the peak, those outside of it, and their sums."""
    inside = sorted(plan.prediction.breakdown.items(), key=lambda item: -item[1])
    outside = plan.overheads.parts(plan.peak_bytes)
    total = max(1, plan.total_bytes)
    largest = max([size for _, size in (*inside, *outside.items())], default=1) or 1

    def row(name: str, size: int, *, drawn: bool = True) -> tuple[str, str, str, str]:
        return name, gib(size), f"{size / total:.1%}", bar(size / largest) if drawn else ""

    waste = plan.overheads.reserved_parts
    rows = [("on each GPU" if plan.machine.is_gpu else "in each process", "size", "share", "")]
    rows += [row(name, size) for name, size in inside if size]
    rows.append(row("= the allocator's peak", plan.peak_bytes, drawn=False))
    rows += [row(name, outside[name]) for name in waste if outside[name]]
    rows.append(row("= reserved", plan.reserved_bytes, drawn=False))
    rows += [row(name, size) for name, size in outside.items() if size and name not in waste]
    rows.append(row("= total", plan.total_bytes, drawn=False))
    table = aligned(rows, right={1, 2})
    return table + _host_memory(plan)


def _host_memory(plan: Plan) -> str:
    """What lies in host memory, and whether anybody knows that there is so much."""
    if not plan.machine.is_gpu:
        return ""  # it is part of the table
    copy = plan.checkpoint_copy_bytes
    more = f"{gib(copy)} for the copy that a checkpoint is written from" if copy else ""
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
    """What a step's time goes into, the largest part first."""
    parts = sorted(plan.time.parts.items(), key=lambda item: -item[1])
    longest = max(seconds for _, seconds in parts)
    rows = [("of each step", "time", "share", "")]
    rows += [
        (name, duration(seconds), f"{seconds / plan.seconds:.1%}", bar(seconds / longest, BAR_WIDTH // 2))
        for name, seconds in parts
        if seconds >= 0.0005 * plan.seconds
    ]
    rows.append(("= a step", duration(plan.seconds), "", ""))
    return f"{aligned(rows, right={1, 2})}\n\n{speed(plan)}"


def speed(plan: Plan) -> str:
    """Tokens a second, the share of the cards' peak, and how long the whole run takes."""
    share = f" on all GPUs, {plan.mfu:.0%} MFU" if plan.machine.is_gpu else ""
    return f"{plan.tokens_per_second:,.0f} tokens/s{share}{_whole_run(plan)}"


def _whole_run(plan: Plan) -> str:
    """How long the run takes from beginning to end."""
    tokens = total_steps(plan.run.train, plan.batch.tokens) * plan.batch.tokens
    amount = next((f"{tokens / size:.3g} {word}" for size, word in _LARGE if tokens >= size), str(tokens))
    return f"; {amount} tokens in {duration(tokens / plan.tokens_per_second)}"


def duration(seconds: float) -> str:
    """A time with its unit, to three digits.

    >>> [duration(each) for each in (0.0123, 1.5, 7200, 864000)]
    ['12.3 ms', '1.5 s', '2 h', '10 days']
    """
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= size * (2 if unit in {"days", "min"} else 1):
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1000:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def _remedies(given: Answer) -> str:
    if not given.remedies:
        return "nothing lighter fits on this machine: use a smaller model, more GPUs, or a larger card"
    lines = []
    for remedy in given.remedies:
        plan = remedy.plan
        changes = differences(given.plan, plan) if plan.machine.card == given.plan.machine.card else ""
        where = f" {remedy.what}" if changes.find("--gpus") < 0 and not remedy.what.startswith("with") else ""
        what = f"would fit{where}, with {gib(plan.total_bytes)}" + (f": {changes}" if changes else "")
        lines.append(f"{what}\n  {given.command(plan)}")
    return "\n".join(lines)


def _alternatives(given: Answer) -> str:
    """Why not the others, a line each."""
    rows = [("instead", "total", "tokens/s", "why not")]
    for each in given.alternatives:
        plan = each.plan
        speed = f"{plan.tokens_per_second:,.0f}" if plan.machine.card is not None and plan.fits else ""
        rows.append((each.differs, gib(plan.total_bytes), speed, each.why_not))
    return aligned(rows, right={1, 2})


def sources(plan: Plan) -> tuple[str, ...]:
    """What the figures rest on."""
    if not plan.machine.is_gpu:
        return ("memory is that of a whole process; times are estimates, of a processor whose rates are not known",)
    runs = plan.overheads.measured
    memory = "what lies outside the peak rests on published figures and estimates, not on runs of this trainer"
    if runs:
        memory = (
            f"what lies outside the peak is corrected by {runs} measured run{'s' if runs > 1 else ''} like this one"
        )
    if plan.machine.card is None:
        return (
            memory,
            "a card that is not named has no rates: no times are printed, and an A100's decide what is faster",
        )
    return memory, basis(plan.machine.card)
