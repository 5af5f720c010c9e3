"""How long one optimizer step takes, part by part.

A pass takes as long as its work at the card's rates, or as long as Python needs to start its kernels, whichever is more.
Collectives hide behind it as far as it lasts; a part of their time is felt all the same. Every term falls, or stays, as a
card gets faster, so that no faster card is ever planned slower. docs/PLANNER.md has the errors against published runs.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from scalegpt.config import RunConfig
from scalegpt.planner.communication import BACKWARD, EVERY, EXPOSED, FIRST, FORWARD, LAST, Collective, collectives
from scalegpt.planner.rates import DISPATCH, DISPATCH_COMPILED, Rates
from scalegpt.planner.work import (
    ATTENTION,
    ELEMENTWISE,
    LOSS,
    MATMULS,
    HostTraffic,
    Load,
    Work,
    count_work,
    host_traffic,
)

LAUNCHES, COMMUNICATION, HOST = "waiting for Python", "communication", "host memory"


@dataclass(frozen=True, slots=True)
class StepTime:
    """The time of one optimizer step.

    Attributes:
        seconds: of the whole step.
        parts: part → seconds; they add up to ``seconds``.
    """

    seconds: float
    parts: Mapping[str, float]


def step_time(
    run: RunConfig, rates: Rates, *, ranks: int, grad_accum: int, kernel: str = "flash", compiled: bool = True
) -> StepTime:
    """Predict the time of a step.

    Args:
        run: a run whose precision is resolved and whose micro batch is fixed.
        rates: of the card, in its machine.
        ranks: data-parallel ranks W.
        grad_accum: micro batches per optimizer step.
        kernel: the attention kernel.
        compiled: whether the blocks are compiled.
    """
    shards = ranks if run.parallel.stage > 0 else 1
    work = count_work(run, shards=shards, kernel=kernel, compiled=compiled)
    return time_of(
        work, collectives(run, ranks), host_traffic(run, ranks, grad_accum), rates,
        ranks=ranks, grad_accum=grad_accum, compiled=compiled,
    )  # fmt: skip


def time_of(
    work: Work,
    sends: Iterable[Collective],
    host: HostTraffic,
    rates: Rates,
    *,
    ranks: int,
    grad_accum: int,
    compiled: bool,
) -> StepTime:
    """The time of work that is counted already; arguments as for :func:`step_time`."""
    clock = _Clock(rates, (DISPATCH_COMPILED if compiled else DISPATCH).value)
    clock.play(work, tuple(sends), ranks, grad_accum)
    clock.add(HOST, host.copied / rates.host_link + host.updated / rates.host_update)
    return StepTime(sum(clock.parts.values()), clock.parts)


def least_seconds(work: Work, rates: Rates) -> float:
    """What a micro step's tokens take at least, however large the micro batch and whoever holds the weights.

    That is what grows with the tokens alone: operations, and the traffic of elementwise kernels and attention.
    """
    seconds = work.forward[LOSS].flops / rates.matmul
    for loads in (work.forward, work.backward):
        for part in (MATMULS, ATTENTION, ELEMENTWISE):
            load = loads[part]
            seconds += load.flops / rates.matmul + load.attention / rates.attention + load.bytes / rates.memory
    return seconds


class _Clock:
    """Adds up the seconds of a step by part."""

    def __init__(self, rates: Rates, dispatch: float) -> None:
        self.rates, self.dispatch = rates, dispatch
        self.parts: dict[str, float] = {}

    def play(self, work: Work, sends: tuple[Collective, ...], ranks: int, grad_accum: int) -> None:
        """All micro steps and the update, with what is sent meanwhile."""
        for name, loads in ((FORWARD, work.forward), (BACKWARD, work.backward)):
            cover = self._compute(loads, grad_accum)
            every = sum(self._send(each, ranks) for each in sends if each.behind == name and each.when == EVERY)
            once = sum(self._send(each, ranks) for each in sends if each.behind == name and each.when in {FIRST, LAST})
            self.add(COMMUNICATION, (grad_accum - 1) * self._felt(every, cover) + self._felt(every + once, cover))
        self._compute(work.update, 1)
        for each in sends:
            if each.behind == EXPOSED:
                self.add(COMMUNICATION, self._send(each, ranks) * (grad_accum if each.when == EVERY else 1))

    def _compute(self, loads: dict[str, Load], times: int) -> float:
        """Add a pass, and return the seconds of one."""
        busy = kernels = 0.0
        for name, load in loads.items():
            seconds = self._seconds(load)
            busy += seconds
            kernels += load.kernels
            self.add(name, times * seconds)
        idle = max(0.0, kernels * self.dispatch - busy)
        self.add(LAUNCHES, times * idle)
        return busy + idle

    def _seconds(self, load: Load) -> float:
        rates = self.rates
        return (
            load.flops / rates.matmul
            + load.attention / rates.attention
            + load.bytes / rates.memory
            + load.kernels * rates.kernel
        )

    def _send(self, each: Collective, ranks: int) -> float:
        return each.sent(ranks) / self.rates.link + each.messages * self.rates.message

    def _felt(self, sending: float, cover: float) -> float:
        """Seconds by which collectives prolong a pass of ``cover`` seconds that they hide behind."""
        hidden = min(sending, cover * self.rates.overlap)
        return sending - hidden + self.rates.interference * hidden

    def add(self, part: str, seconds: float) -> None:
        """Add seconds to a part."""
        if seconds:
            self.parts[part] = self.parts.get(part, 0.0) + seconds
