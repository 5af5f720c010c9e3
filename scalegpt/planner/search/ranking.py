"""Ranks plans by time, multiplied by a factor for each kind of extra machinery (see ``choose``), then by simplicity."""

import math
from functools import lru_cache
from typing import NamedTuple

from scalegpt.config import RunConfig
from scalegpt.config.backends import BACKENDS, DEEPSPEED, OFFLOADS
from scalegpt.config.train import RECOMPUTE
from scalegpt.planner.plan import Plan
from scalegpt.planner.search.question import Scheme

TIE = 0.02
"""Relative width of a time class; times in one class count as equal."""

ERROR = 0.068
"""Error of the ratio of two plans' times: √2 times the mean absolute error of predicted tokens/s in cross-validation.

There the trainer's own efficiency is known; here it cancels in the ratio (docs/PLANNER.md).
"""

Simplicity = tuple[int, int, bool, int, int, bool, int, bool]
Key = tuple[int, Simplicity, float]
"""The sort key of a plan: time class, simplicity, seconds. Class and seconds include the factor :func:`handicap`."""


def time_class(seconds: float) -> int:
    """The number of the time class of ``seconds``, a step's time multiplied by its plan's :func:`handicap`.

    Times in one class count as equal. The classes are fixed, so that choices stay consistent when a machine improves.
    More memory, more cards or a faster card never raise the least multiplied time of all plans that fit. The chosen
    plan is in the class of this least time, so its class never rises. Its real time may rise if a simpler plan now
    fits, but by less than :data:`TIE` plus the handicap of the machinery that is no longer needed. Such rises do not
    add up over several improvements. Without them, the search would choose a more complex plan for almost no gain.
    """
    return math.floor(math.log(seconds) / math.log1p(TIE))


@lru_cache(maxsize=4096)
def machinery(scheme: Scheme, own: Scheme, ranks: int) -> int:
    """The number of kinds of extra machinery in a scheme: offload, sharding, a shard size, DeepSpeed, recompute, new loss.

    Args:
        scheme: the scheme.
        own: the scheme of the run as the user asked for it; its layout and its loss do not count as machinery.
        ranks: data-parallel ranks; over one rank the ZeRO stage shards nothing.
    """
    layout = scheme.layout
    named = (layout.backend, layout.stage) == (own.layout.backend, own.layout.stage)
    if named or layout.spec.one_process:
        sharding = 0
    elif layout.offload != "none" and ranks == 1:
        sharding = 0  # over one rank, sharding is used only because offload needs its backend
    else:
        sharding = (layout.stage > 0 or layout.spec is DEEPSPEED) + (layout.stage == 3 and ranks > 1)
    sharding += layout.shard_size not in (None, own.layout.shard_size)
    return sharding + (layout.offload != "none") + RECOMPUTE.index(scheme.recompute) + (scheme.loss != own.loss)


@lru_cache(maxsize=4096)
def simplicity(scheme: Scheme, own: Scheme) -> Simplicity:
    """A sort key that puts simpler schemes first; the layout and the loss of ``own`` (the run as asked) are the simplest."""
    layout = scheme.layout
    return (
        OFFLOADS.index(layout.offload),
        RECOMPUTE.index(scheme.recompute),
        (layout.backend, layout.stage) != (own.layout.backend, own.layout.stage),
        tuple(BACKENDS).index(layout.backend),
        layout.stage,
        layout.shard_size != own.layout.shard_size,
        layout.shard_size or 0,
        scheme.loss != own.loss,
    )


class Standing(NamedTuple):
    """The figures that rank a scheme besides its time: its :func:`machinery` and its :func:`simplicity`."""

    machinery: int
    simplicity: Simplicity

    @classmethod
    def of(cls, scheme: Scheme, own: Scheme, ranks: int) -> "Standing":
        """The standing of a scheme; arguments as for :func:`machinery`."""
        return cls(machinery(scheme, own, ranks), simplicity(scheme, own))

    @property
    def handicap(self) -> float:
        """The factor that multiplies the scheme's time before times are compared: (1 + :data:`ERROR`) to the power of n.

        n is the number of kinds of machinery, for example sharding or offload, that the run's own scheme does not have.
        """
        return float((1 + ERROR) ** self.machinery)

    def key(self, seconds: float) -> Key:
        """The sort key of the scheme with steps of ``seconds``."""
        seconds *= self.handicap
        return time_class(seconds), self.simplicity, seconds


def handicap(scheme: Scheme, own: Scheme, ranks: int) -> float:
    """The :attr:`~Standing.handicap` of a scheme; arguments as for :func:`machinery`."""
    return Standing.of(scheme, own, ranks).handicap


def plan_key(plan: Plan, run: RunConfig) -> Key:
    """The sort key of a plan; ``run`` is the run as the user asked for it."""
    return Standing.of(Scheme.of(plan.run), Scheme.of(run), plan.machine.ranks).key(plan.seconds)
