"""What ``scalegpt plan`` prints: the model, the layout, the phases, and where the memory goes."""

from collections.abc import Sequence

from scalegpt.cli.table import aligned
from scalegpt.planner.parameters import count_parameters
from scalegpt.planner.plan import Plan, gib

BAR_WIDTH = 40
_EIGHTHS = " ▏▎▍▌▋▊▉"
_FULL = "█"


def report(
    plan: Plan,
    command: str,
    notes: Sequence[str],
    lighter: Plan | None,
    advice: str | None,
    trace: dict[str, int] | None,
) -> str:
    """The whole answer as text.

    Args:
        plan: the plan.
        command: what trains by it.
        notes: remarks, a line each.
        lighter: the nearest plan that fits, where this one does not.
        advice: what trains by that one.
        trace: phase → bytes by the trace, where there is one.
    """
    parts = [_heading(plan), _phases(plan, trace), _memory(plan), _verdict(plan)]
    if lighter is not None and advice is not None:
        parts.append(f"would fit, with {gib(lighter.total_bytes)}: {_changes(plan, lighter)}\n  {advice}")
    elif plan.fits is False:
        parts.append("nothing lighter on this machine fits either: a smaller model, more GPUs, or a larger card")
    if plan.fits is not False:
        parts.append(f"to train so:\n  {command}")
    lines = [f"note: {note}" for note in (*notes, _sources(plan)) if not note.startswith("warning")]
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

    waste = ("cuBLAS workspaces", "fragmentation")
    rows = [("on each GPU", "size", "share", "")]
    rows += [row(name, size) for name, size in inside if size]
    rows.append(row("= the allocator's peak", plan.peak_bytes, drawn=False))
    rows += [row(name, outside[name]) for name in waste if outside[name]]
    rows.append(row("= reserved", plan.reserved_bytes, drawn=False))
    rows += [row(name, size) for name, size in outside.items() if size and name not in waste]
    rows.append(row("= total", plan.total_bytes, drawn=False))
    table = aligned(rows, right={1, 2})
    return table + (f"\n\nin host memory, for each GPU: {gib(plan.host_bytes)}" if plan.host_bytes else "")


def _verdict(plan: Plan) -> str:
    usable, name = plan.machine.usable_bytes, plan.machine.name
    if usable is None:
        return f"{gib(plan.total_bytes)} needed on each GPU; --gpu NAME or --memory_gb N says whether that is there"
    share = plan.total_bytes / usable
    picture = bar(share) if plan.fits else _FULL * BAR_WIDTH
    line = f"[{picture.ljust(BAR_WIDTH)}] {gib(plan.total_bytes)} of {gib(usable)} ({name}), {share:.1%}"
    left = gib(abs(plan.missing_bytes))
    return f"{line}\nfits, with {left} to spare" if plan.fits else f"{line}\ndoes not fit: {left} too much"


def _changes(plan: Plan, lighter: Plan) -> str:
    """What the lighter plan has otherwise."""
    pairs = {
        "loss": (plan.run.train.loss, lighter.run.train.loss),
        "micro_batch": (plan.batch.micro_batch, lighter.batch.micro_batch),
        "recompute": (plan.run.train.recompute, lighter.run.train.recompute),
        "zero_stage": (plan.run.parallel.stage, lighter.run.parallel.stage),
        "offload": (plan.run.parallel.offload, lighter.run.parallel.offload),
    }
    return " ".join(f"--{name} {new}" for name, (old, new) in pairs.items() if old != new)


def _sources(plan: Plan) -> str:
    runs = plan.overheads.measured
    if runs:
        return f"what lies outside the peak is corrected by {runs} measured run{'s' if runs > 1 else ''} like this one"
    return "what lies outside the peak rests on published figures and estimates, not on runs of this trainer yet"
