"""Predicts the time of one optimizer step, part by part.

A forward or backward pass takes as long as its work at the card's rates, or as long as Python needs to launch its
kernels, whichever is longer. Collectives run beside a pass and are hidden by it, as far as the pass is long enough; a
share of the hidden time still prolongs the pass. Every step ends with its slowest machine: if the times of machines
scatter with an exponential tail, the expected time of the slowest of N grows with ln N. No term grows when a rate grows,
so the prediction for a faster card is never slower. docs/PLANNER.md has the errors of predicted times against published
runs.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from scalegpt.architecture.operations import ATTENTION, ELEMENTWISE, MATMULS
from scalegpt.config import RunConfig
from scalegpt.config.backends import Mesh
from scalegpt.planner.time.communication import BACKWARD, EVERY, EXPOSED, FORWARD, LATER, Collective, collectives
from scalegpt.planner.time.links import Way
from scalegpt.planner.time.rates import Rates
from scalegpt.planner.time.work import LOSS, HostTraffic, Load, Work, count_work, host_traffic

LAUNCHES, COMMUNICATION, HOST = "waiting for Python", "communication", "host memory"
STRAGGLERS = "waiting for the slowest machine"


class StepTime(NamedTuple):
    """The time of one optimizer step.

    Attributes:
        seconds: seconds of the whole step.
        parts: part of the step, for example ``communication`` → its seconds; their sum is ``seconds``.
    """

    seconds: float
    parts: Mapping[str, float]


class Traffic(NamedTuple):
    """What one rank sends in one way: the bytes, and the number of messages (collectives) in which it sends them."""

    way: Way
    bytes: float
    messages: float


Traffics = tuple[Traffic, ...]
"""The traffic of a pass: one for each :class:`~scalegpt.planner.time.links.Way` in which the rank sends, or none."""


class Sends(NamedTuple):
    """The traffic that one rank sends in a step, by the pass that hides it.

    Attributes:
        forward: (traffic in every forward pass but one, traffic in the forward pass with the most traffic).
        backward: the same for the backward passes.
        exposed: the traffic of the whole step that no pass hides.
    """

    forward: tuple[Traffics, Traffics]
    backward: tuple[Traffics, Traffics]
    exposed: Traffics

    @classmethod
    def of(cls, each: Iterable[Collective], grad_accum: int, mesh: Mesh) -> "Sends":
        """Add up the traffic of collectives over a mesh; ``grad_accum`` is the number of micro batches per optimizer step."""
        repeated, most = ({behind: _Sums(mesh) for behind in (FORWARD, BACKWARD)} for _ in range(2))
        exposed = _Sums(mesh)
        for send in each:
            if send.behind == EXPOSED:
                exposed.add(send, send.times(grad_accum))
                continue
            if send.when in (EVERY, LATER):
                repeated[send.behind].add(send)
            if send.when != LATER:
                most[send.behind].add(send)
        forward, backward = ((repeated[each].traffics(), most[each].traffics()) for each in (FORWARD, BACKWARD))
        return cls(forward, backward, exposed.traffics())


NOTHING = Sends(((), ()), ((), ()), ())
"""No traffic."""


class _Sums:
    """Adds up bytes and messages of collectives by the way in which they are exchanged."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._sums: dict[Way, list[float]] = {}

    def add(self, send: Collective, times: int = 1) -> None:
        sums = self._sums.setdefault(send.way(self._mesh), [0.0, 0.0])
        sums[0] += times * send.sent
        sums[1] += times * send.messages

    def traffics(self) -> Traffics:
        return tuple(Traffic(way, *sums) for way, sums in self._sums.items() if sums[1])


class StepWork(NamedTuple):
    """All work of a step on one rank: FLOPs, bytes and kernels, not seconds.

    Attributes:
        work: work on the card, by pass and part.
        sends: the traffic that the rank sends to other ranks.
        host: the traffic of offload: bytes moved in host memory, and between card and host.
        grad_accum: micro batches per optimizer step.
    """

    work: Work
    sends: Sends
    host: HostTraffic
    grad_accum: int

    @classmethod
    def of(cls, run: RunConfig, *, ranks: int, grad_accum: int, kernel: str, compiled: bool) -> "StepWork":
        """Count the work of a step; arguments as for :func:`step_time`."""
        mesh = run.parallel.mesh(ranks)
        return cls(
            count_work(run, mesh, kernel=kernel, compiled=compiled),
            Sends.of(collectives(run, mesh), grad_accum, mesh),
            host_traffic(run, mesh, grad_accum),
            grad_accum,
        )

    def totals(self) -> "StepTotals":
        """The same work, with the parts of each pass added up."""
        forward, backward, update = (Load(*map(sum, zip(*loads.values(), strict=True))) for loads in self.work)
        return StepTotals(forward, backward, update, self.sends, self.host, self.grad_accum)

    def time(self, rates: Rates) -> StepTime:
        """The time of the step on a card with these rates, with the seconds of each part."""
        parts: dict[str, float] = defaultdict(float)
        sends: tuple[tuple[Traffics, Traffics] | None, ...] = (self.sends.forward, self.sends.backward, None)
        for loads, sent in zip(self.work, sends, strict=True):
            times = self.grad_accum if sent else 1
            busy = kernels = 0.0
            for name, load in loads.items():
                seconds = _busy(load, rates, rates.memory if sent else rates.update)
                busy += seconds
                kernels += load.kernels
                parts[name] += times * seconds
            idle = max(0.0, kernels * rates.dispatch - busy)
            parts[LAUNCHES] += times * idle
            if sent:
                parts[COMMUNICATION] += _felt_in_all(sent, times, busy + idle, rates)
        parts[COMMUNICATION] += _sending(self.sends.exposed, rates)
        parts[HOST] += _on_host(self.host, rates)
        parts[STRAGGLERS] += rates.straggling * sum(parts.values())
        taken = {name: seconds for name, seconds in parts.items() if seconds}
        return StepTime(sum(taken.values()), taken)


class StepTotals(NamedTuple):
    """The work of a step, added up for each pass. The search uses it, since it needs no time of single parts."""

    forward: Load
    backward: Load
    update: Load
    sends: Sends
    host: HostTraffic
    grad_accum: int

    @classmethod
    def least(cls, works: Iterable["StepTotals"]) -> "StepTotals":
        """The least value of each load, and of ``grad_accum``, among ``works``, without communication and offload.

        Its time is a lower bound on the time of each of ``works``.
        """
        forwards, backwards, updates, _, _, grad_accums = zip(*works, strict=True)
        forward, backward, update = (
            Load(*map(min, zip(*loads, strict=True))) for loads in (forwards, backwards, updates)
        )
        return cls(forward, backward, update, NOTHING, HostTraffic(), min(grad_accums))

    def seconds(self, rates: Rates) -> float:
        """Seconds of the step on a card with these rates."""
        times, seconds = self.grad_accum, 0.0
        for load, sent in ((self.forward, self.sends.forward), (self.backward, self.sends.backward)):
            cover = max(_busy(load, rates, rates.memory), load.kernels * rates.dispatch)
            seconds += times * cover + _felt_in_all(sent, times, cover, rates)
        update = max(_busy(self.update, rates, rates.update), self.update.kernels * rates.dispatch)
        step = seconds + update + _sending(self.sends.exposed, rates) + _on_host(self.host, rates)
        return step * (1 + rates.straggling)


def step_time(
    run: RunConfig, rates: Rates, *, ranks: int, grad_accum: int, kernel: str = "flash", compiled: bool = True
) -> StepTime:
    """Predict the time of a step.

    Args:
        run: a run whose precision is resolved and whose micro batch is fixed.
        rates: the rates of the card in its machine.
        ranks: data-parallel ranks W.
        grad_accum: micro batches per optimizer step.
        kernel: the attention kernel.
        compiled: whether the blocks are compiled.
    """
    return StepWork.of(run, ranks=ranks, grad_accum=grad_accum, kernel=kernel, compiled=compiled).time(rates)


def least_seconds(work: Work, rates: Rates) -> float:
    """A lower bound on the seconds that one card needs for the tokens of ``work``, in any micro batches and any sharding.

    Only work that grows with the number of tokens counts: that of the blocks without starting kernels, and the loss's FLOPs.
    """
    parts = [loads[part] for loads in (work.forward, work.backward) for part in (MATMULS, ATTENTION, ELEMENTWISE)]
    blocks = sum(_busy(part._replace(kernels=0.0), rates, rates.memory) for part in parts)
    return work.forward[LOSS].flops / rates.matmul + blocks


def micro_step_seconds(work: Work, rates: Rates) -> float:
    """Seconds of the forward and backward pass of one micro batch on one card, without communication."""
    loads = (*work.forward.values(), *work.backward.values())
    return sum(_busy(load, rates, rates.memory) for load in loads)


# --- the terms -------------------------------------------------------------------------------------------------------


def _busy(load: Load, rates: Rates, memory: float) -> float:
    """Seconds that a card with these rates needs for a load (FLOPs, bytes, kernels), moving ``memory`` bytes/s."""
    flops, attention, moved, kernels, outputs, of_loss = load
    multiplying = (flops + 2 * rates.fill * outputs) / rates.matmul
    moving = moved / memory + of_loss / rates.loss
    return multiplying + attention / rates.attention + moving + kernels * rates.kernel


def _sending(sends: Traffics, rates: Rates) -> float:
    """Seconds of the traffic if nothing hides it. Ways do not overlap: an upper bound where they use different links."""
    return sum(rates.links.seconds(*sent) for sent in sends)


def _felt_in_all(sends: tuple[Traffics, Traffics], times: int, cover: float, rates: Rates) -> float:
    """Seconds in total by which collectives prolong ``times`` passes, each of which computes for ``cover`` seconds.

    ``sends`` is (traffic in every pass, traffic in the pass with the most traffic).
    """
    each, most = sends
    if not most:
        return 0.0
    if times == 1:
        return _felt(most, cover, rates)
    return (times - 1) * _felt(each, cover, rates) + _felt(most, cover, rates)


def _felt(sends: Traffics, cover: float, rates: Rates) -> float:
    """Seconds by which collectives prolong a pass that computes for ``cover`` seconds beside them.

    The pass cannot begin before its first weights are gathered, and its last gradients are sent only at its end, so one
    message of each way is not hidden. A short pass over few blocks therefore hides less.
    """
    sending = hideable = 0.0
    for way, sent, messages in sends:
        seconds = rates.links.seconds(way, sent, messages)
        sending += seconds
        hideable += seconds * (1 - 1 / messages)
    hidden = min(hideable, cover * rates.overlap)
    return sending - hidden + rates.interference * hidden


def _on_host(host: HostTraffic, rates: Rates) -> float:
    return host.copied / rates.host_link + host.updated / rates.host_update
