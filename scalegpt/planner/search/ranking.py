"""Which of two plans is better: the faster one, where it is faster by more than its machinery costs and than a tie."""

import math

from scalegpt.config import RunConfig
from scalegpt.config.backends import BACKENDS, DEEPSPEED, OFFLOADS
from scalegpt.config.run import ParallelConfig
from scalegpt.config.train import RECOMPUTE
from scalegpt.planner.plan import Plan

TIE = 0.02
"""Relative width of a class of times that count as equal."""

ERROR = 0.082
"""The time model's mean absolute error where our trainer stands in for the published runs (docs/PLANNER.md, generated)."""

Simplicity = tuple[int, int, bool, int, int, bool]
Key = tuple[int, Simplicity, float]
"""What plans are sorted by: class of time, simplicity, seconds; times with the margins of their machinery."""


def time_class(seconds: float) -> int:
    """The class of times that count as equal.

    More memory, more cards or a faster card never raise the least time, margins included, of all plans that fit. The chosen
    plan is in the class of that least time, so that its class never rises either. Its time without the margins may, by less
    than a tie and the margins of the machinery that it no longer needs, where something simpler has come to fit. That does
    not add up, through however many improvements. Only to take the fastest always, by however little, would rule it out.
    """
    return math.floor(math.log(seconds) / math.log1p(TIE))


def machinery(layout: ParallelConfig, recompute: str, loss: str, run: RunConfig, ranks: int) -> int:
    """How many kinds of machinery a setting has that must pay for themselves.

    Args:
        layout: who holds what.
        recompute: its kind.
        loss: its kind.
        run: the run; the layout and the loss that it names are no machinery.
        ranks: data-parallel ranks; over one, the ZeRO stage divides nothing.
    """
    own = run.parallel
    named = (layout.backend, layout.stage) == (own.backend, own.stage)
    if named or layout.spec.one_process:
        sharding = 0
    elif layout.offload != "none" and ranks == 1:
        sharding = 0  # it is what offload takes there
    else:
        sharding = (layout.stage > 0 or layout.spec is DEEPSPEED) + (layout.stage == 3 and ranks > 1)
    return sharding + (layout.offload != "none") + RECOMPUTE.index(recompute) + (loss != run.train.loss)


def handicap(layout: ParallelConfig, recompute: str, loss: str, run: RunConfig, ranks: int) -> float:
    """What a setting's time is multiplied by before it is compared: a margin of :data:`ERROR` for each kind of machinery."""
    return (1 + ERROR) ** machinery(layout, recompute, loss, run, ranks)


def simplicity(layout: ParallelConfig, recompute: str, loss: str, run: RunConfig) -> Simplicity:
    """A key that sorts simpler settings first; ``run`` names the layout and the loss that count as simplest."""
    own = run.parallel
    return (
        OFFLOADS.index(layout.offload),
        RECOMPUTE.index(recompute),
        (layout.backend, layout.stage) != (own.backend, own.stage),
        tuple(BACKENDS).index(layout.backend),
        layout.stage,
        loss != run.train.loss,
    )


def plan_key(plan: Plan, run: RunConfig) -> Key:
    """What a plan is sorted by, among plans for the same run."""
    train, layout = plan.run.train, plan.run.parallel
    seconds = plan.seconds * handicap(layout, train.recompute, train.loss, run, plan.machine.ranks)
    return time_class(seconds), simplicity(layout, train.recompute, train.loss, run), seconds
