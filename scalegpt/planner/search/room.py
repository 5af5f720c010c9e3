"""What gives way where memory is short, before a plan is refused: the same for the planner and the trainer.

On a processor a run keeps the memory that it frees, and copies its state so that a checkpoint is written while training
continues. Where that has no room, it gives freed memory back, which makes steps slower; then training waits for its
checkpoints. On a GPU the copy lies in host memory, as what is offloaded does; without room for it, training waits too.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from scalegpt.config.train import RECOMPUTE
from scalegpt.hardware.machine import ASSUMED
from scalegpt.planner.batches import BatchPlan
from scalegpt.planner.plan import Plan, make_plan
from scalegpt.planner.search.choose import choose
from scalegpt.planner.search.question import Found, Question

GIVES_BACK = "freed memory is returned to the system, which needs less memory but makes steps slower"
WAITS = "training waits while checkpoints are written: memory has no room for a copy to write them from"


@dataclass(frozen=True)
class Roomed:
    """What was found, and what was given up for it, a line each."""

    found: Found
    notes: tuple[str, ...] = ()


def choose_in_room(question: Question) -> Roomed:
    """The plan with the least recompute that fits, and of those the one that gives up least speed.

    Recompute costs more time than anything that gives way here.

    Raises:
        InputError: as for :func:`~scalegpt.planner.search.choose.choose`.
    """
    lightest = 0 if "recompute" in question.open else RECOMPUTE.index(question.run.train.recompute)
    ways: list[Roomed] = []
    fitting: dict[int, Roomed] = {}  # recompute → the first way with it, which gives up least
    for each, notes in _ways(question):
        ways.append(Roomed(choose(each), notes))
        best = ways[-1].found.best
        if best is not None:
            fitting.setdefault(RECOMPUTE.index(best.run.train.recompute), ways[-1])
        if lightest in fitting:
            break
    return _without_copy(fitting[min(fitting)]) if fitting else ways[-1]


def fixed_in_room(question: Question, batch: BatchPlan) -> tuple[Plan, tuple[str, ...]]:
    """The plan of a run in which nothing is open, with what gives way for it; where none fits, the one that lacks least.

    Raises:
        InputError: as for :func:`~scalegpt.planner.plan.make_plan`.
    """
    found: list[tuple[Plan, tuple[str, ...]]] = []
    for each, notes in _ways(question):
        found.append((make_plan(each.run, each.machine, batch, each.calibration), notes))
        if found[-1][0].fits is not False:
            break
    plan, notes = found[-1]
    roomed = _without_copy(Roomed(Found(plan), notes))
    return roomed.found.best or plan, roomed.notes


def _ways(question: Question) -> Iterator[tuple[Question, tuple[str, ...]]]:
    """The question, and on a processor the same with more and more given up."""
    yield question, ()
    if question.machine.is_gpu:
        return
    notes: tuple[str, ...] = ()
    if question.machine.ranks == 1:  # with collectives it was not measured to save anything
        question, notes = replace(question, machine=replace(question.machine, keeps_freed_memory=False)), (GIVES_BACK,)
        yield question, notes
    if question.run.train.async_checkpoint:
        yield _waiting(question), (*notes, WAITS)


def _waiting(question: Question) -> Question:
    run = question.run
    return replace(question, run=replace(run, train=run.train.changed(async_checkpoint=False)))


def _without_copy(roomed: Roomed) -> Roomed:
    """The same without the copy for a checkpoint, where the host of a GPU has no room for it.

    Where the host's memory is an assumption, that is only said: the trainer decides by the true one.
    """
    best = roomed.found.best
    if best is None or best.copy_fits or not best.checkpoint_copy_bytes:
        return roomed
    if best.machine.host_source == ASSUMED:
        return Roomed(roomed.found, (*roomed.notes, WAITS))
    run = replace(best.run, train=best.run.train.changed(async_checkpoint=False))
    return Roomed(Found(replace(best, run=run)), (*roomed.notes, WAITS))
