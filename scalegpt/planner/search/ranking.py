"""Which of two plans is better: the faster one, where it is faster by more than its machinery costs and than a tie."""

import math
from functools import lru_cache

from scalegpt.config import RunConfig
from scalegpt.config.backends import BACKENDS, DEEPSPEED, OFFLOADS
from scalegpt.config.train import RECOMPUTE
from scalegpt.planner.plan import Plan
from scalegpt.planner.search.question import Scheme

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
    plan is in the class of that least time, so that its class never rises either. Its time without the margins may rise, by
    less than a tie and the margins of the machinery that it no longer needs, where something simpler has come to fit. That
    does not add up, through however many improvements. Only always taking the fastest, by however little, would rule it out.
    """
    return math.floor(math.log(seconds) / math.log1p(TIE))


@lru_cache(maxsize=4096)
def machinery(scheme: Scheme, own: Scheme, ranks: int) -> int:
    """How many kinds of machinery a scheme has that must pay for themselves.

    Args:
        scheme: the scheme.
        own: the run's; the layout and the loss that it names are no machinery.
        ranks: data-parallel ranks; over one, the ZeRO stage divides nothing.
    """
    layout = scheme.layout
    named = (layout.backend, layout.stage) == (own.layout.backend, own.layout.stage)
    if named or layout.spec.one_process:
        sharding = 0
    elif layout.offload != "none" and ranks == 1:
        sharding = 0  # offload needs it there
    else:
        sharding = (layout.stage > 0 or layout.spec is DEEPSPEED) + (layout.stage == 3 and ranks > 1)
    return sharding + (layout.offload != "none") + RECOMPUTE.index(scheme.recompute) + (scheme.loss != own.loss)


def handicap(scheme: Scheme, own: Scheme, ranks: int) -> float:
    """What a scheme's time is multiplied by before it is compared: a margin of :data:`ERROR` for each kind of machinery."""
    return float((1 + ERROR) ** machinery(scheme, own, ranks))


@lru_cache(maxsize=4096)
def simplicity(scheme: Scheme, own: Scheme) -> Simplicity:
    """A key that sorts simpler schemes first; ``own`` has the layout and the loss that count as simplest."""
    layout = scheme.layout
    return (
        OFFLOADS.index(layout.offload),
        RECOMPUTE.index(scheme.recompute),
        (layout.backend, layout.stage) != (own.layout.backend, own.layout.stage),
        tuple(BACKENDS).index(layout.backend),
        layout.stage,
        scheme.loss != own.loss,
    )


def key_of(seconds: float, scheme: Scheme, own: Scheme, ranks: int) -> Key:
    """What a scheme that takes ``seconds`` is sorted by, among schemes for the same run."""
    seconds *= handicap(scheme, own, ranks)
    return time_class(seconds), simplicity(scheme, own), seconds


def plan_key(plan: Plan, run: RunConfig) -> Key:
    """What a plan is sorted by, among plans for the same run."""
    return key_of(plan.seconds, Scheme.of(plan.run), Scheme.of(run), plan.machine.ranks)
