"""Advice on a chosen plan: why each alternative was not chosen, or changes that would make the run fit if no plan fits."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from scalegpt.config.run import PLANNED, ParallelConfig
from scalegpt.config.train import LOSSES, RECOMPUTE
from scalegpt.errors import InputError
from scalegpt.hardware.gpus import catalogue
from scalegpt.planner.batches import divisors
from scalegpt.planner.plan import Plan, host_words, make_plan
from scalegpt.planner.search.choose import best_of_layout, choose, with_tokens
from scalegpt.planner.search.layouts import layouts, without_other_sizes
from scalegpt.planner.search.question import Found, Question, Scheme
from scalegpt.planner.search.ranking import handicap, simplicity
from scalegpt.planner.time.calibration import Calibration
from scalegpt.units import gib

MOST_CARDS = 64
"""The largest number of cards that is tried for a run that does not fit on the user's cards."""


@dataclass(frozen=True)
class Alternative:
    """The best plan in which one setting differs from the chosen plan, and why it was not chosen.

    Attributes:
        plan: the best such plan that fits; if none fits, the plan that lacks the least memory.
        differs: all settings in which ``plan`` differs from the chosen plan, as flags with the values of ``plan``.
        why_not: why it was not chosen.
    """

    plan: Plan
    differs: str
    why_not: str


def alternatives(question: Question, chosen: Plan) -> list[Alternative]:
    """The best plan for each value of each setting that the chosen plan does not have.

    The settings are, in this order, layout (backend, ZeRO stage, offload), shard size, recompute, loss, micro batch (only
    the next larger one), and the number of cards (only all cards, if the chosen plan uses fewer). Settings that the user
    fixed are not varied.
    """
    question = with_tokens(question)  # the tokens per step of all cards, even if the chosen plan uses fewer
    seen = {_signature(chosen)}
    listed = []
    for found in _others(question, chosen):
        plan = found.best or found.closest
        if plan is None or _signature(plan) in seen:
            continue
        seen.add(_signature(plan))
        listed.append(
            Alternative(plan, differences(chosen, plan), _why_not(question, chosen, plan, fits=bool(found.best)))
        )
    return listed


def _others(question: Question, chosen: Plan) -> Iterator[Found]:
    own, train, asked = chosen.run.parallel, chosen.run.train, replace(question, machine=chosen.machine, fewer=False)
    every = layouts(asked)
    for layout in (
        *without_other_sizes(every, own.shard_size),
        *(each for each in every if _place(each) == _place(own)),
    ):
        if layout != own:
            yield best_of_layout(asked, layout)
    fixed = replace(
        asked,
        run=replace(question.run, parallel=own),
        open=asked.open - {"backend", "zero_stage", "offload", "shard_size"},
    )
    for name, values in (("recompute", RECOMPUTE), ("loss", LOSSES)):
        for value in values if name in question.open else ():
            if value != getattr(train, name):
                run = replace(fixed.run, train=fixed.run.train.changed(**{name: value}))
                yield choose(replace(fixed, run=run, open=fixed.open - {name}))
    if "micro_batch" in question.open:
        larger = [
            size
            for size in divisors(chosen.batch.micro_batch * chosen.batch.grad_accum)
            if size > chosen.batch.micro_batch
        ]
        if larger:
            changed = train.changed(micro_batch=larger[0], tokens_per_step=chosen.batch.tokens)
            run = replace(question.run, train=changed, parallel=own)
            yield choose(replace(fixed, run=run, open=frozenset()))
    if chosen.machine.ranks != question.machine.ranks:
        yield choose(replace(question, fewer=False))


def lighter(plan: Plan, calibration: Calibration) -> list[Plan]:
    """Plans to try after a plan ran out of memory: one with a smaller micro batch, and one with heavier recompute.

    Each of the two has the smallest change that lowers the predicted peak and fits the memory. If there is no such
    change, the plan is left out. The tokens per step stay the same.
    """
    batch, train = plan.batch, plan.run.train
    per_rank = batch.micro_batch * batch.grad_accum
    sizes = [size for size in reversed(divisors(per_rank)) if size < batch.micro_batch]
    smaller = (replace(batch, micro_batch=size, grad_accum=per_rank // size) for size in sizes)
    heavier = (
        replace(plan.run, train=train.changed(recompute=kind))
        for kind in RECOMPUTE[RECOMPUTE.index(train.recompute) + 1 :]
    )
    kinds = (
        (make_plan(plan.run, plan.machine, other, calibration) for other in smaller),
        (make_plan(run, plan.machine, batch, calibration) for run in heavier),
    )
    found = (
        next((other for other in kind if other.peak_bytes < plan.peak_bytes and other.fits is not False), None)
        for kind in kinds
    )
    return [other for other in found if other is not None]


def _place(layout: ParallelConfig) -> tuple[str, int, str]:
    return layout.backend, layout.stage, layout.offload


def _signature(plan: Plan) -> tuple[object, ...]:
    train = plan.run.train
    return (
        *_place(plan.run.parallel),
        plan.run.parallel.shard_size,
        train.recompute,
        train.loss,
        plan.batch.micro_batch,
        plan.machine.ranks,
    )


def differences(chosen: Plan, other: Plan) -> str:
    """The settings in which another plan differs from the chosen one, as flags with the other plan's values."""
    pairs = {
        "gpus": (chosen.machine.gpus, other.machine.gpus),
        "nodes": (chosen.machine.nodes, other.machine.nodes),
        "backend": (chosen.run.parallel.backend, other.run.parallel.backend),
        "zero_stage": (chosen.run.parallel.stage, other.run.parallel.stage),
        "offload": (chosen.run.parallel.offload, other.run.parallel.offload),
        "shard_size": (chosen.run.parallel.shard_size or "none", other.run.parallel.shard_size or "none"),
        "micro_batch": (chosen.batch.micro_batch, other.batch.micro_batch),
        "recompute": (chosen.run.train.recompute, other.run.train.recompute),
        "loss": (chosen.run.train.loss, other.run.train.loss),
    }
    return " ".join(f"--{name} {theirs}" for name, (ours, theirs) in pairs.items() if ours != theirs)


def _why_not(question: Question, chosen: Plan, plan: Plan, *, fits: bool) -> str:
    if not fits:
        over = plan.total_bytes - question.limit
        if not plan.fits_host:
            return f"does not fit: needs {host_words(plan)}"
        if over <= 0 or plan.fits:
            return "fits only without the safety margin"
        smallest = ", even with one sequence at a time" if plan.batch.micro_batch == 1 else ""
        return f"does not fit: {gib(plan.missing_bytes)} too much{smallest}"
    slower = plan.seconds / chosen.seconds - 1
    if slower > 0.0005:
        return f"takes {slower:.1%} longer"
    gain, scheme, ours = chosen.seconds / plan.seconds - 1, Scheme.of(plan.run), Scheme.of(chosen.run)
    own = Scheme.of(question.run)
    needed = handicap(scheme, own, plan.machine.ranks) / handicap(ours, own, chosen.machine.ranks) - 1
    if gain > 0.0005 and needed > 0.0005:
        return f"{gain:.1%} faster; more complexity must gain {needed:.1%}"
    return (
        "as fast, but more complex"
        if simplicity(scheme, own) >= simplicity(ours, own)
        else f"{gain:.1%} faster, which counts as equal"
    )


# --- where nothing fits ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Remedy:
    """A change that makes a run fit.

    Attributes:
        what: the change in words.
        plan: the plan that fits.
    """

    what: str
    plan: Plan


def remedies(question: Question) -> list[Remedy]:
    """Changes that make the run fit: let the planner choose the fixed settings, use more cards, or use a larger card.

    At most one change of each kind is listed. The number of cards is doubled until the run fits; the larger card is the
    smallest on which the run fits.
    """
    found = [_set_free(question), _more_cards(question), _larger_card(question)]
    return [remedy for remedy in found if remedy is not None]


def _set_free(question: Question) -> Remedy | None:
    fixed = PLANNED - question.open
    if not fixed:
        return None
    best = _try(replace(question, open=PLANNED))
    return None if best is None else Remedy("with other settings", best)


def _more_cards(question: Question) -> Remedy | None:
    machine, count = question.machine, 2 * question.machine.gpus
    if machine.is_gpu and question.run.parallel.spec.one_process and "backend" not in question.open:
        return None
    while machine.is_gpu and count * machine.nodes <= MOST_CARDS:
        gpus, nodes = (count, machine.nodes) if count <= 8 else (8, machine.nodes * count // 8)
        more = machine.with_cards(gpus=gpus, nodes=nodes)
        best = _try(replace(question, machine=more))
        if best is not None:
            return Remedy(f"on {more.ranks} of these GPUs", best)
        count *= 2
    return None


def _larger_card(question: Question) -> Remedy | None:
    machine = question.machine
    usable = machine.usable_bytes or 0
    for card in sorted(catalogue(), key=lambda card: card.usable_bytes):
        lacks_dtype = question.run.train.precision == "bf16" and not card.has_bf16
        if card.usable_bytes <= usable or lacks_dtype:
            continue
        best = _try(replace(question, machine=machine.with_other_card(card)))
        if best is not None:
            return Remedy(f"on {'an' if card.name[0] in 'AHLR' else 'a'} {card.name}", best)
    return None


def _try(question: Question) -> Plan | None:
    try:
        return choose(question).best
    except InputError:  # the step does not divide among the cards, or the backend does not support the question
        return None
