"""How fast a card computes, moves and sends: the figures of the catalogue times the share of them that training reaches.

The shares of Ampere and Hopper, and those of memory and overlap, are fitted to published runs of GPT-shaped models under
FSDP: ``python benchmarks/fit_throughput.py FILE`` fits and cross-validates them (docs/PLANNER.md has its errors). All
others are estimates, marked with ~. None has been measured with our own trainer on a GPU yet.
"""

from dataclasses import dataclass

from scalegpt.hardware.gpus import Card
from scalegpt.hardware.machine import Machine
from scalegpt.planner.memory.overheads import Figure

FITTED = "python benchmarks/fit_throughput.py published_runs.csv"


_MEMORY = Figure(0.398, FITTED)
_LINK = Figure(0.8, "~ring bus bandwidth that NCCL reports, over the link's own")
_OVERLAP = Figure(0.9, "~the first gathering and the last reduction stand alone")
_INTERFERENCE = Figure(0.098, FITTED)


@dataclass(frozen=True)
class Shares:
    """The parts of a card's figures that a training step reaches.

    Attributes:
        matmul: of the dense peak, in large matmuls.
        attention: of the dense peak, in attention kernels that skip what is masked.
        memory: of the memory's bandwidth, in kernels that only move data. It covers passes over memory that
            :mod:`scalegpt.planner.time.work` does not see, too.
        link: of a link's bandwidth in one direction, in collectives.
        overlap: of the computation of a pass, the part that collectives can hide behind.
        interference: of the hidden collectives' time, the part that is felt all the same.
    """

    matmul: Figure
    attention: Figure
    memory: Figure = _MEMORY
    link: Figure = _LINK
    overlap: Figure = _OVERLAP
    interference: Figure = _INTERFERENCE


SHARES = {
    "7.0": Shares(Figure(0.70, "~"), Figure(0.20, "~mem_efficient kernel")),
    "7.5": Shares(Figure(0.70, "~"), Figure(0.20, "~mem_efficient kernel")),
    "8.0": Shares(Figure(0.782, FITTED), Figure(0.317, FITTED)),
    "8.6": Shares(Figure(0.782, "~as 8.0"), Figure(0.317, "~as 8.0")),
    "8.9": Shares(Figure(0.782, "~as 8.0"), Figure(0.317, "~as 8.0")),
    "9.0": Shares(Figure(0.664, FITTED), Figure(0.183, FITTED)),
    "10.0": Shares(Figure(0.60, "~"), Figure(0.15, "~")),
    "10.3": Shares(Figure(0.60, "~as 10.0"), Figure(0.15, "~as 10.0")),
    "12.0": Shares(Figure(0.75, "~"), Figure(0.30, "~")),
    "gfx90a": Shares(Figure(0.50, "~"), Figure(0.15, "~")),
    "gfx942": Shares(Figure(0.45, "~"), Figure(0.12, "~")),
    "gfx950": Shares(Figure(0.45, "~as gfx942"), Figure(0.12, "~as gfx942")),
    "cpu": Shares(Figure(0.60, "~"), Figure(0.20, "~"), memory=Figure(0.6, "~")),
}
"""By compute capability, or AMD's architecture."""

FITTED_ON = {"8.0": ("A100 40GB", "A100 80GB"), "9.0": ("H100 SXM",)}
"""Capability → the cards whose published runs the shares are fitted to."""

FP32_SHARE = {"7": 1 / 8, "8.0": 1 / 16, "8": 1 / 4, "9": 1 / 15, "1": 1 / 30, "gfx": 1 / 8, "cpu": 1.0}
"""fp32's peak as a share of the half-precision one, by the beginning of the capability (vendors' data sheets; of families
with several ratios the lowest)."""

HOST_COPY = Figure(0.5, "~share of the host link that pinned copies reach beside the step's own traffic")
HOST_UPDATE = Figure(
    10e9, "~half of what torch's fused AdamW moved in a second on two cores of a server, over 5e7 fp32 parameters"
)
THROUGH_HOST = Figure(0.4, "~share of its link that a card reaches which can only reach others through host memory")

KERNEL = Figure(4e-6, "~seconds of a kernel before it works and after: the GPU's share of starting it")
DISPATCH = Figure(8e-6, "~seconds in which Python and autograd start one eager kernel")
DISPATCH_COMPILED = Figure(4e-6, "~seconds in which compiled code starts one kernel")
MESSAGE = Figure(15e-6, "~seconds of a collective between cards of one machine, however small")
MESSAGE_BETWEEN = Figure(40e-6, "~seconds of a collective between machines, however small")

NETWORK = {"nvlink": Figure(200, "~Gbit/s for each card: 1600 for eight A100 in the published runs"),
           "xgmi": Figure(200, "~as NVLink's"),
           "pcie": Figure(10, "~Gbit/s for each card"), "host": Figure(10, "~Gbit/s for each rank")}  # fmt: skip
"""A machine's network where nobody says what it is, by what links its cards."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What one card does in a second.

    Attributes:
        matmul: operations a second in large matmuls.
        attention: the same in attention kernels.
        memory: bytes a second in kernels that move data.
        kernel: seconds that the card spends on starting each kernel.
        link: bytes a second that a rank sends in a collective over all ranks; 0 where there is one card.
        message: seconds of each collective, however small.
        overlap: see :class:`Shares`.
        interference: see :class:`Shares`.
        host_link: bytes a second between card and host.
        host_update: bytes a second that the update moves in host memory.
        peak: the card's dense peak in the compute dtype, which MFU is a share of.
    """

    matmul: float
    attention: float
    memory: float
    kernel: float
    link: float
    message: float
    overlap: float
    interference: float
    host_link: float
    host_update: float
    peak: float

    @classmethod
    def of(cls, card: Card, machine: Machine, precision: str, shares: Shares | None = None) -> "Rates":
        """The rates of a card in a machine.

        Args:
            card: the card; with ``machine.card`` unknown, the one whose rates stand in.
            machine: how many there are and what links them.
            precision: the compute dtype.
            shares: what to reckon with instead of the card's own entry.
        """
        shares = shares or SHARES.get(card.capability, SHARES["8.0"])
        peak = card.tflops * 1e12 * (_by_capability(FP32_SHARE, card.capability) if precision == "fp32" else 1.0)
        on_gpu = machine.is_gpu
        return cls(
            matmul=peak * shares.matmul.value,
            attention=peak * shares.attention.value,
            memory=card.gbps * 1e9 * shares.memory.value,
            kernel=KERNEL.value if on_gpu else DISPATCH.value,
            link=_link(card, machine, shares.link.value),
            message=MESSAGE.value if machine.nodes == 1 else MESSAGE_BETWEEN.value,
            overlap=shares.overlap.value if on_gpu else 0.0,
            interference=shares.interference.value,
            host_link=(machine.host_gbps or card.host_gbps) * 1e9 / 2 * HOST_COPY.value,
            host_update=HOST_UPDATE.value if on_gpu else card.gbps * 1e9 * shares.memory.value,
            peak=peak,
        )


def basis(card: Card) -> str:
    """What the times of a card rest on, in a sentence: runs that were published, of it or of its like, or estimates."""
    fitted = FITTED_ON.get(card.capability)
    if card.is_cpu:
        return "times on a processor are estimates from its number of cores, which may be wrong by a factor of two"
    if fitted is None:
        said = f"times on {card.name} are estimates: no published run on a card of its architecture was fitted"
    elif card.name in fitted:
        said = f"times on {card.name} rest on rates fitted to published runs of other trainers on it"
    else:
        said = (
            f"times on {card.name} are estimates: its data sheet, and the share of it that published runs of other "
            f"trainers reach on {' and '.join(fitted)}"
        )
    guessed = [name for key, name in (("tflops", "peak"), ("gbps", "memory bandwidth")) if key in card.estimated]
    if guessed:
        said += f"; the catalogue's {' and '.join(guessed)} {'is an estimate' if len(guessed) == 1 else 'are estimates'} too"
    return f"{said}; see docs/PLANNER.md"


def basis_of_all() -> str:
    """The same of a table over all cards."""
    names = ", ".join(name for names in FITTED_ON.values() for name in names)
    return (
        f"times on {names} rest on rates fitted to published runs of other trainers, those on all other cards are estimates; "
        "see docs/PLANNER.md"
    )


def _link(card: Card, machine: Machine, share: float) -> float:
    """Bytes a second of a rank in a ring over all ranks: the narrower of the link inside and its part of the network.

    A ring that passes through machines enters and leaves each of them once, so that the whole network of a machine
    carries what one rank sends.
    """
    if machine.ranks == 1:
        return 0.0
    inside = float("inf")
    if machine.gpus > 1:
        link = machine.link or card.link_of(machine.gpus)
        inside = link.gbps * 1e9 / 2 * (share if link.peer else THROUGH_HOST.value)
    if machine.nodes == 1:
        return inside
    return min(inside, network_gbit(card, machine) * 1e9 / 8 * share)


def network_gbit(card: Card, machine: Machine) -> float:
    """The network of each machine in Gbit/s, as given, or as is common where cards are linked so."""
    if machine.network_gbps is not None:
        return machine.network_gbps
    return NETWORK[card.link_of(machine.gpus).kind].value * machine.gpus


def _by_capability(table: dict[str, float], capability: str) -> float:
    """The entry whose key the capability begins with, the longest first."""
    fitting = [key for key in table if capability.startswith(key)]
    return table[max(fitting, key=len)] if fitting else table["8"]
