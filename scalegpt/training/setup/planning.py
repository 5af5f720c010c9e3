"""Lets the planner choose the layout of a run that is about to start. Rank 0 plans, and all ranks use its answer.

The micro batch is chosen unless the user gives it, the recompute policy unless the user or the preset gives it. Backend,
ZeRO stage, offload, shard size and loss are chosen only where they are ``auto``.
"""

from dataclasses import dataclass, replace

import torch

from scalegpt.backends import World
from scalegpt.backends.host_memory import give_back_freed_memory
from scalegpt.config import RunConfig
from scalegpt.config.run import PLANNED_BY_DEFAULT
from scalegpt.errors import InputError
from scalegpt.hardware.machine import Machine
from scalegpt.planner.batches import BatchPlan, plan_batches
from scalegpt.planner.checks import installed_backends
from scalegpt.planner.memory.overheads import Overheads
from scalegpt.planner.plan import Plan, host_words
from scalegpt.planner.search.advice import Remedy, differences, remedies
from scalegpt.planner.search.question import Question
from scalegpt.planner.search.room import choose_in_room, fixed_in_room
from scalegpt.planner.time import calibration
from scalegpt.training.memory import machine_of
from scalegpt.units import gib

TOLERANCE = 0.1
"""On a card, a run whose settings are all given is refused if it lacks more than this share of the memory that it needs."""

NOTABLE = 0.02
"""Memory of other processes up to this share of a card's memory is neither reported nor subtracted."""


@dataclass(frozen=True)
class Planned:
    """The run with its layout chosen.

    Attributes:
        run: the configuration, in which no setting is left to the planner.
        plan: the predicted memory and time of the run.
        notes: lines to print.
    """

    run: RunConfig
    plan: Plan
    notes: tuple[str, ...]

    @property
    def batch(self) -> BatchPlan:
        """How a step's tokens are divided into ranks and micro batches."""
        return self.plan.batch


def choose_layout(
    run: RunConfig, world: World, *, open_: frozenset[str], margin: float, reopen: frozenset[str] = frozenset()
) -> Planned:
    """Choose the open settings of a run; all ranks must call it together.

    On a CPU, it also makes this process return freed memory to the system, if the plan assumes that.

    Args:
        run: the configuration, whose precision and vocabulary are known.
        world: the ranks.
        open_: names of the settings to choose.
        margin: share of a card's memory to leave free.
        reopen: names of settings that an earlier process of the run chose; they are chosen again if they no longer fit.

    Raises:
        InputError: the step cannot be divided among the ranks, or nothing fits.
    """
    machine, notes = _machine(run, world)
    run, backends = replace(run, auto=frozenset()), installed_backends()
    planned = world.on_first(
        lambda: _choose(
            Question(run, machine, open_, margin, calibration.load(), fewer=False, backends=backends), notes, reopen
        )
    )
    if not machine.is_gpu and not planned.plan.machine.keeps_freed_memory:
        give_back_freed_memory()
    return planned


def _choose(question: Question, notes: tuple[str, ...], reopen: frozenset[str] = frozenset()) -> Planned:
    batch = plan_batches(question.run, question.machine.ranks, micro_fixed="micro_batch" not in question.open)
    if not question.open:
        plan, compromises = fixed_in_room(question, batch)
        if not _is_too_large(plan):
            return Planned(plan.run, plan, (*notes, *compromises))
        if not reopen:
            raise InputError(_refusal(question, plan))
        return _choose(replace(question, open=reopen), notes)
    roomed = choose_in_room(question)
    margin_notes: tuple[str, ...] = ()
    if roomed.found.best is None and question.margin:
        roomed = choose_in_room(replace(question, margin=0.0))
        margin_notes = (f"what fits leaves less than the safety margin of {question.margin:.0%} free",)
    best = roomed.found.best
    if best is not None:
        return Planned(best.run, best, (*notes, *margin_notes, *roomed.notes, *_chosen_line(question, best)))
    if reopen - question.open:
        return _choose(replace(question, open=question.open | reopen), notes)
    raise InputError(_refusal(question, roomed.found.closest))


def _is_too_large(plan: Plan) -> bool:
    """Whether a plan whose settings are all given is refused.

    On a card the plan may exceed the memory a little, since the prediction may be too high. On a CPU it may not, since
    the whole machine would run out of memory.
    """
    if not plan.fits_host:
        return True
    allowed = TOLERANCE * plan.total_bytes if plan.machine.is_gpu else 0
    return plan.missing_bytes > allowed


def _machine(run: RunConfig, world: World) -> tuple[Machine, tuple[str, ...]]:
    """Describe this machine, with the least memory that any rank has for the run; all ranks must call it together.

    Returns:
        The machine, and lines to print if cards differ or other processes hold memory.
    """
    machine = machine_of(world)
    usable, host = machine.usable_bytes, machine.host_bytes
    if usable is None:
        return machine, ()
    smallest = -world.largest(-usable)
    machine = replace(machine, host_bytes=None if host is None else -world.largest(-host))
    if not machine.is_gpu:
        return replace(machine, usable_bytes=smallest), ()
    free, total = torch.cuda.mem_get_info(world.device)
    context = Overheads.of(run, machine.card, 1).context  # bytes of the CUDA context that torch made in this process
    taken = world.largest(max(0, total - free - context))
    notes = []
    if smallest < usable:
        notes.append(f"the smallest card of the ranks has {gib(smallest)}, and all ranks are planned for it")
    if taken > NOTABLE * smallest:
        notes.append(
            f"other processes hold {gib(taken)} of a card, so the run is planned for the remaining {gib(smallest - taken)}"
        )
        smallest -= taken
    return replace(machine, usable_bytes=smallest), tuple(notes)


def _chosen_line(question: Question, plan: Plan) -> tuple[str, ...]:
    """The line that the run prints on the chosen settings.

    It is empty on a CPU if only micro batch and recompute were open, the micro batch stays as it was, and nothing is
    recomputed.
    """
    wanted, taken = question.run.train.micro_batch, plan.batch.micro_batch
    if not question.machine.is_gpu and question.open <= PLANNED_BY_DEFAULT:
        changed = [f"micro batch {taken} rather than {wanted}"] if taken < wanted else []
        changed += [f"recompute {plan.run.train.recompute}"] if plan.run.train.recompute != "none" else []
        sequences = plan.batch.sequences // plan.batch.ranks
        why = f"it fits, and divides the {sequences} sequences per rank of a step" if taken < wanted else "it fits"
        return (f"{', '.join(changed)}: {why}",) if changed else ()
    train, parallel, machine = plan.run.train, plan.run.parallel, question.machine
    words = {
        "micro_batch": f"micro batch {plan.batch.micro_batch}",
        "backend": parallel.backend,
        "zero_stage": f"stage {parallel.stage}",
        "offload": f"offload {parallel.offload}",
        "shard_size": f"shard size {parallel.shard_size or 'all ranks'}",
        "recompute": f"recompute {train.recompute}",
        "loss": f"{train.loss} loss",
    }
    chosen = ", ".join(text for name, text in words.items() if name in question.open)
    room = "" if machine.usable_bytes is None else f", {gib(plan.total_bytes)} of {gib(machine.usable_bytes)}"
    return (f"chosen   {chosen}: the fastest that fits{room}",)


def _refusal(question: Question, closest: Plan | None) -> str:
    """The error message for a run that does not fit: memory needed and available, and settings that would fit."""
    machine, run = question.machine, question.run
    if closest is not None and closest.fits and not closest.fits_host:
        return f"{run.name} does not fit: offload needs {host_words(closest)}; {_advice(remedies(question), closest)}"
    room = gib(machine.usable_bytes or 0) + ("" if machine.is_gpu else " of memory available for each rank")
    needs = f"{gib(closest.total_bytes)} at least" if closest else "more than that for its model states alone"
    fixed = "" if "recompute" in question.open else f" with recompute {run.train.recompute}"
    advice = _advice(remedies(question), closest)
    return f"{run.name} does not fit{fixed}: {machine.name} has {room}, and it needs {needs}; {advice}"


def _advice(found: list[Remedy], closest: Plan | None) -> str:
    if not found:
        return "use a smaller model, more GPUs, or --offload"
    lines = []
    for remedy in found:
        flags = ""
        has_same_ranks = closest is not None and remedy.plan.machine.ranks == closest.machine.ranks
        if closest is not None and has_same_ranks and remedy.what.startswith("with"):
            flags = differences(closest, remedy.plan)
        lines.append(f"use {flags}" if flags else f"run it {remedy.what}")
    return ", or ".join(lines)
