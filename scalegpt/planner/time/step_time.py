"""How long one optimizer step takes, part by part.

A pass takes as long as its work at the card's rates, or as long as Python needs to start its kernels, whichever is more.
Collectives hide behind it as far as it lasts; a part of their time is felt all the same. Every term falls, or stays, as a
card gets faster, so that no faster card is ever planned slower. docs/PLANNER.md has the errors against published runs.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from scalegpt.architecture.operations import ATTENTION, ELEMENTWISE, MATMULS
from scalegpt.config import RunConfig
from scalegpt.planner.time.communication import BACKWARD, EVERY, EXPOSED, FORWARD, Collective, collectives
from scalegpt.planner.time.rates import DISPATCH, DISPATCH_COMPILED, Rates
from scalegpt.planner.time.work import LOSS, HostTraffic, Load, Work, count_work, host_traffic

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
    def of(cls, each: Iterable[Collective], grad_accum: int) -> "Sends":
        """Add up collectives; arguments as for :func:`step_time`."""
        sums: dict[tuple[str, bool], list[float]] = defaultdict(lambda: [0.0, 0])
        for send in each:
            again = send.when == EVERY
            times = grad_accum if again and send.behind == EXPOSED else 1
            added = sums[send.behind, again and send.behind != EXPOSED]
            added[0] += times * send.sent
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
        mesh = run.parallel.mesh(ranks)
        return cls(
            count_work(run, mesh, kernel=kernel, compiled=compiled),
            Sends.of(collectives(run, mesh), grad_accum),
            host_traffic(run, mesh, grad_accum),
            grad_accum,
            compiled,
        )

    def whole(self) -> "Whole":
        """The same with the parts of each pass in one."""
        forward, backward, update = map(_sum, (self.work.forward, self.work.backward, self.work.update))
        return Whole(forward, backward, update, self.sends, self.host, self.grad_accum, self.dispatch)

    @property
    def dispatch(self) -> float:
        """Seconds in which Python starts one kernel."""
        return (DISPATCH_COMPILED if self.compiled else DISPATCH).value

    def time(self, rates: Rates) -> StepTime:
        """The time that it takes at these rates."""
        clock = _Clock(rates, self.dispatch)
        clock.play(self.work, self.sends, self.grad_accum)
        clock.add(HOST, _on_host(self.host, rates))
        return StepTime(sum(clock.parts.values()), clock.parts)


@dataclass(frozen=True, slots=True)
class Whole:
    """All that a step has to do, pass by pass: :meth:`Counted.time` without its parts, for a search that asks often."""

    forward: Load
    backward: Load
    update: Load
    sends: Sends
    host: HostTraffic
    grad_accum: int
    dispatch: float

    def seconds(self, rates: Rates) -> float:
        """The seconds that it takes at these rates."""
        sends, dispatch = self.sends, self.dispatch
        passes = _pass(self.forward, sends.forward, self.grad_accum, rates, dispatch) + _pass(
            self.backward, sends.backward, self.grad_accum, rates, dispatch
        )
        update = max(_busy(self.update, rates), self.update.kernels * dispatch)
        return passes + update + _sending(sends.exposed, rates) + _on_host(self.host, rates)


def _pass(load: Load, sends: tuple[Traffic, Traffic], times: int, rates: Rates, dispatch: float) -> float:
    """Seconds of a pass in all micro steps, with what is sent meanwhile."""
    cover = max(_busy(load, rates), load.kernels * dispatch)
    return times * cover + _felt_in_all(sends, times, cover, rates)


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
    grad_accum: int,
    compiled: bool,
) -> StepTime:
    """The time of work that is counted already; arguments as for :func:`step_time`."""
    return Counted(work, Sends.of(sends, grad_accum), host, grad_accum, compiled).time(rates)


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
        for loads, sent in ((work.forward, sends.forward), (work.backward, sends.backward)):
            cover = self._compute(loads, grad_accum)
            self.add(COMMUNICATION, _felt_in_all(sent, grad_accum, cover, self.rates))
        self._compute(work.update, 1)
        self.add(COMMUNICATION, _sending(sends.exposed, self.rates))

    def _compute(self, loads: dict[str, Load], times: int) -> float:
        """Add a pass, and return the seconds of one."""
        busy = kernels = 0.0
        for name, load in loads.items():
            seconds = _busy(load, self.rates)
            busy += seconds
            kernels += load.kernels
            self.add(name, times * seconds)
        idle = max(0.0, kernels * self.dispatch - busy)
        self.add(LAUNCHES, times * idle)
        return busy + idle

    def add(self, part: str, seconds: float) -> None:
        """Add seconds to a part."""
        if seconds:
            self.parts[part] = self.parts.get(part, 0.0) + seconds


# --- the terms -------------------------------------------------------------------------------------------------------


def _busy(load: Load, rates: Rates) -> float:
    """Seconds that the card works on a load."""
    return (
        load.flops / rates.matmul
        + load.attention / rates.attention
        + load.bytes / rates.memory
        + load.kernels * rates.kernel
    )


def _sending(sent: Traffic, rates: Rates) -> float:
    return sent.bytes / rates.link + sent.messages * rates.message if sent.messages else 0.0


def _felt_in_all(sends: tuple[Traffic, Traffic], times: int, cover: float, rates: Rates) -> float:
    """Seconds by which collectives prolong so many passes of ``cover`` seconds each: of every pass, and of one alone."""
    each, alone = _sending(sends[0], rates), _sending(sends[1], rates)
    return (times - 1) * _felt(each, cover, rates) + _felt(each + alone, cover, rates)


def _felt(sending: float, cover: float, rates: Rates) -> float:
    """Seconds by which collectives prolong a pass of ``cover`` seconds that they hide behind."""
    hidden = min(sending, cover * rates.overlap)
    return sending - hidden + rates.interference * hidden


def _on_host(host: HostTraffic, rates: Rates) -> float:
    return host.copied / rates.host_link + host.updated / rates.host_update
