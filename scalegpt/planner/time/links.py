"""How fast ranks exchange tensors: over the links inside a machine, and over the network between machines.

NCCL exchanges tensors in rings. A ring visits all ranks of a machine before it leaves the machine, so it crosses the network
once for each machine, and with several ports there are several rings that share the tensor. A rank therefore sends as fast
as the slower of two: its link inside the machine, and its machine's whole network. If several groups of ranks exchange at
the same time, as the replicas of each shard do, they share their machines' network.

Each collective also takes a time that does not depend on its size: it grows with the steps of the ring, hence with the number
of ranks. For an all-reduce over machines NCCL takes either a ring or a tree, whichever is faster. A tree has few steps, but
does not reach the whole bandwidth. The latencies are those of NCCL's own model (:data:`NCCL`): of its protocol LL128 where
NCCL uses it (NVLink, and a network with RDMA), of the protocol Simple elsewhere.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from scalegpt.hardware.networks import EFA, ETHERNET, INFINIBAND, ROCE
from scalegpt.planner.memory.overheads import Figure

NCCL = "NCCL 2.19, src/graph/tuning.cc"
"""The source of the latencies; its function ``ncclTopoTuneModel`` has the formulas of :meth:`Links.ways`."""

RING, ALL_REDUCE, EXCHANGE = "ring", "all-reduce", "exchange"
"""The kinds of :class:`Way`: a ring (all-gather, reduce-scatter), an all-reduce, an all-to-all."""

NETWORK_SHARE = {
    None: Figure(0.8, "~a network of which only the bandwidth is known"),
    INFINIBAND: Figure(0.96, "github.com/NVIDIA/nccl-tests/issues/119: 24 of the 25 GB/s of a port"),
    ROCE: Figure(0.75, "github.com/NVIDIA/nccl/issues/495: 600 of 800 Gbit/s over two machines"),
    EFA: Figure(0.6, "github.com/NVIDIA/nccl/issues/527: 30 of 50 GB/s over four p4d machines"),
    ETHERNET: Figure(0.6, "github.com/NVIDIA/nccl/issues/209: 60% of 32 Gbit/s with TCP"),
}
"""The kind of a network → the share of its bandwidth that a ring over machines reaches."""

TREE_SHARE = Figure(0.92, NCCL)
"""The share of a ring's bandwidth that a tree over machines reaches."""

ON_CPU, ON_CPU_BETWEEN = (
    Figure(15e-6, "~seconds of a collective between a machine's processes, however small"),
    Figure(40e-6, "~seconds of a collective between processes of several machines, however small"),
)


class Latency(NamedTuple):
    """The latency of a collective's steps, in seconds; each is a pair: of a ring, and of a tree.

    Attributes:
        start: what a collective takes before its steps.
        inside: a step between cards of a machine.
        between: a step between machines.
    """

    start: tuple[float, float]
    inside: tuple[float, float]
    between: tuple[float, float]


LL128 = Latency((14.0e-6, 14.0e-6), (1.9e-6, 1.25e-6), (4.0e-6, 8.5e-6))
SIMPLE = {
    "nvlink": Latency((8.4e-6, 0.0), (3.4e-6, 28e-6), (14e-6, 28e-6)),
    "pcie": Latency((8.4e-6, 0.0), (5.7e-6, 28e-6), (14e-6, 28e-6)),
}
"""The latencies of the protocol Simple, by the link between a machine's cards."""

TCP_STEP = Figure(30e-6, "~seconds of a step between machines over TCP or EFA, which NCCL's model does not tell apart")

_FAST = ("nvlink", "xgmi")
_RDMA = (None, INFINIBAND, ROCE)


def latency(link: str, network: str | None, *, on_gpu: bool = True) -> Latency:
    """The latencies between ranks.

    Args:
        link: the kind of link between a machine's cards.
        network: the kind of network between machines; None: not known, and taken as one with RDMA.
        on_gpu: false for ranks on processors, which do not use NCCL.
    """
    if not on_gpu:
        return Latency((ON_CPU.value, ON_CPU.value), (0.0, 0.0), (ON_CPU_BETWEEN.value, ON_CPU_BETWEEN.value))
    if link in _FAST and network in _RDMA:
        return LL128
    found = SIMPLE["nvlink" if link in _FAST else "pcie"]
    if network in _RDMA:
        return found
    ring, tree = (max(step, TCP_STEP.value) for step in found.between)
    return found._replace(between=(ring, tree))


class Way(NamedTuple):
    """How tensors are exchanged, and among which ranks: ``ranks`` of them, each ``stride`` ranks after the one before."""

    kind: str
    ranks: int
    stride: int = 1


class Route(NamedTuple):
    """The speed of a way: bytes/s that each rank sends, and the seconds that each collective takes besides."""

    link: float
    message: float


@dataclass(frozen=True)
class Links:
    """The links between ``nodes`` machines with ``gpus`` ranks each.

    Attributes:
        gpus: ranks of each machine; ranks of a machine have successive numbers.
        nodes: machines.
        inside: bytes/s that a rank sends to others of its machine.
        network: bytes/s that a machine sends to others.
        latency: the latency of the steps.
    """

    gpus: int
    nodes: int
    inside: float
    network: float
    latency: Latency
    _routes: dict[Way, tuple[Route, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def seconds(self, way: Way, sent: float, messages: float) -> float:
        """Seconds in which each rank sends ``sent`` bytes in a number of collectives."""
        routes = self._routes.get(way)
        if routes is None:
            routes = self._routes[way] = self.routes(way)
        if len(routes) == 1:
            return sent / routes[0].link + messages * routes[0].message
        return min(sent / link + messages * message for link, message in routes)

    def routes(self, way: Way) -> tuple[Route, ...]:
        """The algorithms between which NCCL chooses for a way."""
        inside, machines, sharing = self._placed(way)
        apart = machines > 1
        link = min(self.inside if inside > 1 else math.inf, self.network / sharing if apart else math.inf)
        start, step, far = (pair[0] for pair in self.latency)
        once = (way.ranks - machines) * step + (machines - 1) * far
        if way.kind == EXCHANGE and apart:
            # Each rank sends to every other directly, and all ranks of a machine at once.
            leaves = (way.ranks - inside) / (way.ranks - 1)
            link = min(self.inside / (1 - leaves) if leaves < 1 else math.inf, self.network / self.gpus / leaves)
        if way.kind != ALL_REDUCE:
            return (Route(link, start + once),)
        ring = Route(link, start + 2 * once)
        if not apart:
            return (ring,)
        start, step, far = (pair[1] for pair in self.latency)
        tree = start + 2 * ((inside - 1) * step + math.log2(machines) * far)
        return ring, Route(link * TREE_SHARE.value, tree)

    def _placed(self, way: Way) -> tuple[int, int, int]:
        """Where a way's ranks are: ranks in each machine, machines, and groups that share a machine's network at once."""
        if self.nodes == 1:
            return way.ranks, 1, 1
        if way.stride > 1:
            inside = min(way.ranks, max(1, self.gpus // way.stride))
            return inside, -(-way.ranks // inside), min(way.stride, self.gpus)
        if self.gpus % way.ranks == 0:
            return way.ranks, 1, 1
        if way.ranks % self.gpus == 0:
            return self.gpus, way.ranks // self.gpus, 1
        # A group that begins within a machine: two groups cross the same machine's network.
        return min(self.gpus, way.ranks), -(-(way.ranks - 1) // self.gpus) + 1, 2
