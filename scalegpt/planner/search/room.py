"""Ways to save memory that cost speed, tried before a plan is refused; planner and trainer use the same rules.

On a CPU a run normally keeps freed memory for reuse, and copies its state so that a checkpoint is written while training
continues. If memory is short, the run first returns freed memory to the system, which makes steps slower. If that is not
enough, the run also omits the copy, and training waits for its checkpoints. On a GPU the copy is in host memory, beside
offloaded tensors. If host memory is too small for both, training waits for its checkpoints too.
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
WAITS = "training waits while checkpoints are written, since memory has no room for the copy from which they would be written"


@dataclass(frozen=True)
class Roomed:
    """The result of a search, and a one-line remark on each saving that it needs (see the module)."""

    found: Found
    notes: tuple[str, ...] = ()


def choose_in_room(question: Question) -> Roomed:
    """Search with more and more memory savings, and return the plan with the least recompute, then the fewest savings.

    Less recompute comes first, since recompute costs more time than any of these savings. If no plan fits, the result is
    that of the search with all savings.

    Raises:
        InputError: as for :func:`~scalegpt.planner.search.choose.choose`.
    """
    lightest = 0 if "recompute" in question.open else RECOMPUTE.index(question.run.train.recompute)
    ways: list[Roomed] = []
    fitting: dict[int, Roomed] = {}  # index in RECOMPUTE → the first result with it, which has the fewest savings
    for each, notes in _ways(question):
        ways.append(Roomed(choose(each), notes))
        best = ways[-1].found.best
        if best is not None:
            fitting.setdefault(RECOMPUTE.index(best.run.train.recompute), ways[-1])
        if lightest in fitting:
            break
    return _without_copy(fitting[min(fitting)]) if fitting else ways[-1]


def fixed_in_room(question: Question, batch: BatchPlan) -> tuple[Plan, tuple[str, ...]]:
    """For a run without open settings, the plan with the fewest savings that make it fit, and remarks on these savings.

    If no plan fits, it is the plan with all savings.

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
    """Yield the question as asked, and on a CPU also with more and more memory savings, and remarks on them."""
    yield question, ()
    if question.machine.is_gpu:
        return
    notes: tuple[str, ...] = ()
    if question.machine.ranks == 1:  # measurements over several ranks showed no saving
        question, notes = replace(question, machine=replace(question.machine, keeps_freed_memory=False)), (GIVES_BACK,)
        yield question, notes
    if question.run.train.async_checkpoint:
        yield _waiting(question), (*notes, WAITS)


def _waiting(question: Question) -> Question:
    run = question.run
    return replace(question, run=replace(run, train=run.train.changed(async_checkpoint=False)))


def _without_copy(roomed: Roomed) -> Roomed:
    """The result with the checkpoint copy omitted if the copy does not fit host memory beside a GPU; else unchanged.

    If the size of host memory is only assumed, the copy stays and a remark is added, since the trainer decides by the
    real size.
    """
    best = roomed.found.best
    if best is None or best.copy_fits or not best.checkpoint_copy_bytes:
        return roomed
    if best.machine.host_source == ASSUMED:
        return Roomed(roomed.found, (*roomed.notes, WAITS))
    run = replace(best.run, train=best.run.train.changed(async_checkpoint=False))
    return Roomed(Found(replace(best, run=run)), (*roomed.notes, WAITS))
