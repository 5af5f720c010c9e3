"""The rates of a card in training (FLOP/s, bytes/s): the catalogue's peaks times the shares that training reaches.

The shares ``matmul`` and ``attention`` of the A100 and the H100, and ``memory``, ``interference`` and ``straggling`` of all
GPUs, are fitted to published runs of other trainers; so are :data:`FILL` and :data:`DISPATCH`. ``python
benchmarks/fit_throughput.py`` fits them, and tests the fit by predicting each trainer from the runs of the others
(docs/PLANNER.md has the errors). All other shares are estimates, marked with ~. No share has been measured with our own
trainer on a GPU yet.
"""

import math
from dataclasses import dataclass, replace

from scalegpt.hardware.gpus import Card
from scalegpt.hardware.machine import Machine
from scalegpt.hardware.processor import ProcessorRates
from scalegpt.planner.memory.overheads import Figure
from scalegpt.planner.time.links import NETWORK_SHARE, Links, latency

FITTED = "python benchmarks/fit_throughput.py published_runs.csv published_runs_other_trainers.csv"


_MEMORY = Figure(0.602, FITTED)
_LINK = Figure(0.8, "github.com/NVIDIA/nccl-tests/pull/189: 240 of 300 GB/s over the NVLink of an A100")
_INTERFERENCE = Figure(0.131, FITTED)
_STRAGGLING = Figure(0.018, FITTED)


@dataclass(frozen=True)
class Shares:
    """The shares of a card's peak figures that a training step reaches.

    Attributes:
        matmul: share of the dense peak FLOP/s that deep matmuls reach; shallow ones reach less, see :data:`FILL`.
        attention: share of the dense peak FLOP/s that attention kernels reach; FLOPs of masked positions do not count.
        memory: share of the memory bandwidth that is reached by kernels that only move data. It is low, because it also
            covers memory traffic that :mod:`scalegpt.planner.time.work` does not count.
        link: share of the bandwidth in one direction that collectives reach on the links inside a machine.
        interference: share of the time of hidden collectives that still prolongs the pass.
        straggling: share of a step by which waiting for the slowest machine prolongs it, for each factor e in the number
            of machines.
    """

    matmul: Figure
    attention: Figure
    memory: Figure = _MEMORY
    link: Figure = _LINK
    interference: Figure = _INTERFERENCE
    straggling: Figure = _STRAGGLING


SHARES = {
    "7.0": Shares(Figure(0.70, "~"), Figure(0.20, "~mem_efficient kernel")),
    "7.5": Shares(Figure(0.70, "~"), Figure(0.20, "~mem_efficient kernel")),
    "8.0": Shares(Figure(0.948, FITTED), Figure(0.354, FITTED)),
    "8.6": Shares(Figure(0.948, "~as 8.0"), Figure(0.354, "~as 8.0")),
    "8.9": Shares(Figure(0.948, "~as 8.0"), Figure(0.354, "~as 8.0")),
    "9.0": Shares(Figure(0.786, FITTED), Figure(0.203, FITTED)),
    "10.0": Shares(Figure(0.70, "~"), Figure(0.15, "~")),
    "10.3": Shares(Figure(0.70, "~as 10.0"), Figure(0.15, "~as 10.0")),
    "12.0": Shares(Figure(0.90, "~"), Figure(0.30, "~")),
    "gfx90a": Shares(Figure(0.60, "~"), Figure(0.15, "~")),
    "gfx942": Shares(Figure(0.53, "~"), Figure(0.12, "~")),
    "gfx950": Shares(Figure(0.53, "~as gfx942"), Figure(0.12, "~as gfx942")),
    "cpu": Shares(Figure(0.60, "~"), Figure(0.20, "~"), memory=Figure(0.6, "~")),
}
"""Compute capability, or AMD's architecture → shares."""

FITTED_ON = {"8.0": ("A100 40GB", "A100 80GB"), "9.0": ("H100 SXM", "H200")}
"""Compute capability → the cards whose published runs its shares are fitted to."""

FP32_SHARE = {"7": 1 / 8, "8.0": 1 / 16, "8": 1 / 4, "9": 1 / 15, "1": 1 / 30, "gfx": 1 / 8, "cpu": 1.0}
"""The beginning of a capability → the fp32 peak as a share of the half-precision peak, by vendors' data sheets. If the cards
of a capability differ, it is their lowest share."""

HOST_COPY = Figure(0.5, "~share of the host link that pinned copies reach beside the step's own traffic")
HOST_UPDATE = Figure(
    10e9, "~half of what torch's fused AdamW moved in a second on two cores of a server, over 5e7 fp32 parameters"
)
THROUGH_HOST = Figure(0.4, "~share of its link that a card uses if it reaches other cards only through host memory")

FILL = Figure(755.0, FITTED)
"""Elements of the inner dimension.

A matmul of [m, k] and [k, n] takes the time of 2·m·n·(k + FILL) FLOPs, because each tile of the result also loads its
first operands and writes its sums, which takes as long as FILL further steps.
"""

KERNEL = Figure(4e-6, "~seconds that the GPU spends before and after the work of a kernel")
DISPATCH = Figure(53.4e-6, FITTED)
"""Seconds that Python, the dispatcher, autograd and the driver need to start one of the kernels that ``work`` counts,
eager or compiled. A compiled block has fewer kernels, but starts none of them faster (``python
benchmarks/host_time.py``).
"""
KERNEL_ON_CPU = Figure(30e-6, "python benchmarks/host_time.py, on one core of a server")

SLOWEST, FASTEST = Figure(0.75, FITTED), Figure(1.40, FITTED)
"""The range, relative to the prediction, that contains the tokens per second of a new trainer with 90% confidence;
rounded.
"""
RANGE_ELSEWHERE = Figure(
    1.4, "~wider, by as much as five runs on V100, whose shares are estimates, were slower than that range"
)
RANGE_ON_CPU = Figure(2.0, "~where the processor's rates are not measured")
RANGE_MEASURED = Figure(
    1.4, "~where they are measured: about the largest error of benchmarks/cpu_speed.py on a busy machine"
)

NETWORK = {"nvlink": Figure(200, "~Gbit/s for each card: 1600 for eight A100 in the published runs"),
           "xgmi": Figure(200, "~as NVLink's"),
           "pcie": Figure(10, "~Gbit/s for each card"), "host": Figure(10, "~Gbit/s for each rank")}  # fmt: skip
"""The kind of link between a machine's cards → the network that is assumed for each card, Gbit/s, if none is given."""


@dataclass(frozen=True, slots=True)
class Rates:
    """The rates of one card in its machine, in one compute dtype.

    Attributes:
        matmul: FLOP/s in deep matmuls.
        fill: the depth that is added to every matmul; see :data:`FILL`.
        attention: FLOP/s in attention kernels.
        memory: bytes/s in kernels that only move data.
        loss: bytes/s in the loss between its matmuls; differs from ``memory`` only on a measured processor.
        update: bytes/s in the optimizer update; differs from ``memory`` only on a measured processor.
        kernel: seconds that the card spends on starting each kernel; on a processor, seconds that Python and autograd
            spend.
        dispatch: seconds that the host spends on starting each kernel, beside the card; 0 on a processor.
        links: the links between the machine's ranks, and between machines.
        overlap: share of a pass's time during which collectives run beside the computation: 1 on a GPU, 0 on a processor.
        interference: see :class:`Shares`.
        straggling: share of a step by which waiting for the slowest machine prolongs it; 0 with one machine.
        host_link: bytes/s between card and host, in one direction.
        host_update: bytes/s that the optimizer update moves in host memory.
        peak: the card's dense peak in the compute dtype, in FLOP/s; MFU is relative to it.
    """

    matmul: float
    fill: float
    attention: float
    memory: float
    loss: float
    update: float
    kernel: float
    dispatch: float
    links: Links
    overlap: float
    interference: float
    straggling: float
    host_link: float
    host_update: float
    peak: float

    @classmethod
    def of(cls, card: Card, machine: Machine, precision: str, shares: Shares | None = None) -> "Rates":
        """The rates of a card in a machine.

        Args:
            card: the card, or if ``machine.card`` is None the card whose rates are used instead.
            machine: the machine; its number of cards and its links decide how fast ranks communicate.
            precision: the compute dtype.
            shares: the shares to use; None: those of the card's capability in :data:`SHARES`.
        """
        shares = shares or SHARES.get(card.capability, SHARES["8.0"])
        memory = card.gbps * 1e9 * shares.memory.value
        peak = card.tflops * 1e12 * (_by_capability(FP32_SHARE, card.capability) if precision == "fp32" else 1.0)
        on_gpu = machine.is_gpu
        rates = cls(
            matmul=peak * shares.matmul.value,
            fill=FILL.value if on_gpu else 0.0,
            attention=peak * shares.attention.value,
            memory=memory,
            loss=memory,
            update=memory,
            kernel=KERNEL.value if on_gpu else KERNEL_ON_CPU.value,
            dispatch=DISPATCH.value if on_gpu else 0.0,
            links=_links(card, machine, shares.link.value),
            overlap=1.0 if on_gpu else 0.0,
            interference=shares.interference.value,
            straggling=shares.straggling.value * math.log(machine.nodes),
            host_link=(machine.host_gbps or card.host_gbps) * 1e9 / 2 * HOST_COPY.value,
            host_update=HOST_UPDATE.value if on_gpu else memory,
            peak=peak,
        )
        measured = None if on_gpu or machine.measured is None else machine.measured.rates(precision)
        return rates if measured is None else rates._measured(measured, machine.gpus)

    def _measured(self, measured: ProcessorRates, ranks: int) -> "Rates":
        """Replace rates by those that were measured on the processor, whose cores are shared by ``ranks`` ranks."""
        return replace(
            self,
            matmul=measured.matmul / ranks,
            fill=measured.fill,
            attention=measured.attention / ranks,
            memory=measured.memory / ranks,
            loss=measured.loss / ranks,
            update=measured.update / ranks,
            kernel=measured.kernel,
            host_update=measured.update / ranks,
        )


def speed_range(card: Card, *, measured: bool = False) -> tuple[float, float]:
    """The factors by which tokens per second may be lower and higher than predicted on a card.

    ``measured`` says whether the rates of a processor are measured.

    For fitted shares, the range follows from the errors for trainers that were not part of the fit. It contains a new
    trainer with 90% confidence. On all other cards it is an estimate.
    """
    if card.is_cpu:
        most = (RANGE_MEASURED if measured else RANGE_ON_CPU).value
        return 1 / most, most
    further = 1.0 if card.capability in FITTED_ON else RANGE_ELSEWHERE.value
    return SLOWEST.value / further, FASTEST.value * further


def basis(card: Card, *, measured: bool = False) -> str:
    """A sentence for the user that says what a card's predicted times are based on: published runs, or estimates.

    ``measured`` says whether the rates of a processor are measured.
    """
    fitted = FITTED_ON.get(card.capability)
    if card.is_cpu and measured:
        return "times rest on rates that were measured on this processor"
    if card.is_cpu:
        return (
            "times on a processor are estimates from its number of cores, which may be wrong by a factor of two; "
            "`scalegpt doctor`, or the first run here, measures its rates"
        )
    if fitted is None:
        said = f"times on {card.name} are estimates: no published run on a card of its architecture was fitted"
    elif card.name in fitted:
        said = f"times on {card.name} rest on rates fitted to published runs of other trainers on it"
    else:
        known = " and ".join(fitted)
        said = (
            f"times on {card.name} are estimates: its data sheet, times the share of the peak that published runs of "
            f"other trainers reach on {known}"
        )
    guessed = [name for key, name in (("tflops", "peak"), ("gbps", "memory bandwidth")) if key in card.estimated]
    if guessed:
        said += f"; the catalogue's {' and '.join(guessed)} {'is an estimate' if len(guessed) == 1 else 'are estimates'} too"
    return f"{said}; see docs/PLANNER.md"


def basis_of_all() -> str:
    """A sentence for the user that says what the predicted times in a table over all cards are based on."""
    names = ", ".join(name for names in FITTED_ON.values() for name in names)
    return (
        f"times on {names} rest on rates fitted to published runs of other trainers, those on all other cards are estimates; "
        "see docs/PLANNER.md"
    )


def _links(card: Card, machine: Machine, share: float) -> Links:
    """The links between the ranks of a machine, of whose bandwidth a ring reaches ``share``, and between machines."""
    link = machine.link or card.link_of(machine.gpus)
    return Links(
        gpus=machine.gpus,
        nodes=machine.nodes,
        inside=link.gbps * 1e9 / 2 * (share if link.peer else THROUGH_HOST.value),
        network=network_gbit(card, machine) * 1e9 / 8 * NETWORK_SHARE[machine.network_kind].value,
        latency=latency(link.kind, machine.network_kind, on_gpu=machine.is_gpu),
    )


def network_gbit(card: Card, machine: Machine) -> float:
    """The network bandwidth of each machine in Gbit/s: the given value, else the assumption in :data:`NETWORK`."""
    if machine.network_gbps is not None:
        return machine.network_gbps
    return NETWORK[card.link_of(machine.gpus).kind].value * machine.gpus


def _by_capability(table: dict[str, float], capability: str) -> float:
    """The value of the longest key with which ``capability`` begins; if there is no such key, the value of the key ``8``."""
    fitting = [key for key in table if capability.startswith(key)]
    return table[max(fitting, key=len)] if fitting else table["8"]
