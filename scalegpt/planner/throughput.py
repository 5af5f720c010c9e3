"""How long one optimizer step takes, part by part.

A pass takes as long as its work at the card's rates, or as long as Python needs to start its kernels, whichever is more.
Collectives hide behind it as far as it lasts; a part of their time is felt all the same. Every term falls, or stays, as a
card gets faster, so that no faster card is ever planned slower. docs/PLANNER.md has the errors against published runs.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from scalegpt.config import RunConfig
from scalegpt.planner.communication import BACKWARD, EVERY, EXPOSED, FORWARD, Collective, collectives
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


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a rank sends: ``bytes`` in so many ``messages``."""

    bytes: float = 0.0
    messages: float = 0.0


@dataclass(frozen=True, slots=True)
class Sends:
    """What a rank sends in a step, by what hides it.

    Attributes:
        forward: behind each forward pass, and behind one of them alone.
        backward: behind each backward pass, and behind one of them alone.
        exposed: behind nothing, in the whole step.
    """

    forward: tuple[Traffic, Traffic]
    backward: tuple[Traffic, Traffic]
    exposed: Traffic

    @classmethod
    def of(cls, each: Iterable[Collective], ranks: int, grad_accum: int) -> "Sends":
        """Add up collectives; arguments as for :func:`step_time`."""
        sums: dict[tuple[str, bool], list[float]] = defaultdict(lambda: [0.0, 0])
        for send in each:
            again = send.when == EVERY
            times = grad_accum if again and send.behind == EXPOSED else 1
            added = sums[send.behind, again and send.behind != EXPOSED]
            added[0] += times * send.sent(ranks)
            added[1] += times * send.messages
        forward, backward = (
            (Traffic(*sums[behind, True]), Traffic(*sums[behind, False])) for behind in (FORWARD, BACKWARD)
        )
        return cls(forward, backward, Traffic(*sums[EXPOSED, False]))


@dataclass(frozen=True, slots=True)
class Counted:
    """All that a step has to do, whatever card does it."""

    work: Work
    sends: Sends
    host: HostTraffic
    grad_accum: int
    compiled: bool

    @classmethod
    def of(cls, run: RunConfig, *, ranks: int, grad_accum: int, kernel: str, compiled: bool) -> "Counted":
        """Count a step; arguments as for :func:`step_time`."""
        shards = ranks if run.parallel.stage > 0 else 1
        return cls(
            count_work(run, shards=shards, kernel=kernel, compiled=compiled),
            Sends.of(collectives(run, ranks), ranks, grad_accum),
            host_traffic(run, ranks, grad_accum),
            grad_accum,
            compiled,
        )

    def merged(self) -> "Counted":
        """The same with the parts of each pass in one: as long, and sooner told."""
        work = self.work
        forward, backward, update = ({"all": _sum(loads)} for loads in (work.forward, work.backward, work.update))
        return replace(self, work=Work(forward, backward, update))

    def time(self, rates: Rates) -> StepTime:
        """The time that it takes at these rates."""
        clock = _Clock(rates, (DISPATCH_COMPILED if self.compiled else DISPATCH).value)
        clock.play(self.work, self.sends, self.grad_accum)
        clock.add(HOST, self.host.copied / rates.host_link + self.host.updated / rates.host_update)
        return StepTime(sum(clock.parts.values()), clock.parts)


def _sum(loads: Mapping[str, Load]) -> Load:
    each = loads.values()
    return Load(
        sum(load.flops for load in each),
        sum(load.attention for load in each),
        sum(load.bytes for load in each),
        sum(load.kernels for load in each),
    )


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
    return Counted.of(run, ranks=ranks, grad_accum=grad_accum, kernel=kernel, compiled=compiled).time(rates)


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
    return Counted(work, Sends.of(sends, ranks, grad_accum), host, grad_accum, compiled).time(rates)


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

    def play(self, work: Work, sends: Sends, grad_accum: int) -> None:
        """All micro steps and the update, with what is sent meanwhile."""
        for loads, (each, alone) in ((work.forward, sends.forward), (work.backward, sends.backward)):
            cover = self._compute(loads, grad_accum)
            every = self._send(each)
            felt = (grad_accum - 1) * self._felt(every, cover) + self._felt(every + self._send(alone), cover)
            self.add(COMMUNICATION, felt)
        self._compute(work.update, 1)
        self.add(COMMUNICATION, self._send(sends.exposed))

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

    def _send(self, sent: Traffic) -> float:
        return sent.bytes / self.rates.link + sent.messages * self.rates.message if sent.messages else 0.0

    def _felt(self, sending: float, cover: float) -> float:
        """Seconds by which collectives prolong a pass of ``cover`` seconds that they hide behind."""
        hidden = min(sending, cover * self.rates.overlap)
        return sending - hidden + self.rates.interference * hidden

    def add(self, part: str, seconds: float) -> None:
        """Add seconds to a part."""
        if seconds:
            self.parts[part] = self.parts.get(part, 0.0) + seconds
