"""One kind of GPU and the link between several of them: the hardware figures that plans use."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from scalegpt.units import GIB

_FIRST_WITH_BF16 = 8.0
"""The first compute capability with bf16 matmuls and with a flash kernel in torch's attention (``sdp_utils.cpp``). Volta and
Turing have neither."""

CPU_CAPABILITY = "cpu"


@dataclass(frozen=True, kw_only=True)
class Link:
    """The link between the cards of one machine.

    Attributes:
        kind: ``nvlink``, ``xgmi``, ``pcie``, or ``host`` for ranks on a CPU.
        gbps: bandwidth from each card to all others, in GB/s (10⁹ bytes), sum of both directions, as vendors print it.
        peer: whether the cards copy directly to each other; if false, they copy through the host's memory.
    """

    kind: str
    gbps: float
    peer: bool


@dataclass(frozen=True, kw_only=True)
class Card:
    """One card of the catalogue; ``gpus.yaml`` explains its figures.

    Attributes:
        name: the card's name in the catalogue.
        match: words. A driver's name stands for this card only if it contains all of them.
        aliases: other names of the card, for users.
        gb: the memory size in the card's name, GB.
        gib: the memory that torch reports, GiB.
        capability: NVIDIA's compute capability, AMD's architecture, or ``cpu``.
        tflops: dense half-precision peak with fp32 accumulation, TFLOP/s; for a CPU, its fp32 peak.
        gbps: bandwidth of the card's memory, in GB/s (10⁹ bytes).
        host_gbps: bandwidth between the card and the host's memory, in GB/s, sum of both directions.
        link: the kind of link to other cards: ``nvlink``, ``xgmi``, ``pcie``, or ``host``.
        link_gbps: bandwidth of all such links of a card, in GB/s, sum of both directions.
        link_cards: the largest number of cards that the link joins, for example 2 for a bridge; more cards use PCIe.
            None: the link joins all cards of a machine.
        peer: whether cards of this kind copy directly to each other over PCIe, not through host memory.
        price_per_gpu_hour: price of one card for one hour, in any currency, from the user's own catalogue; None: not known.
        sources: name of a figure, for example ``tflops`` → its source; a source that begins with ~ marks an estimate.
    """

    name: str
    match: tuple[str, ...]
    gb: int
    gib: float
    capability: str
    tflops: float
    gbps: float
    host_gbps: float
    link: str
    link_gbps: float
    peer: bool
    link_cards: int | None = None
    aliases: tuple[str, ...] = ()
    price_per_gpu_hour: float | None = None
    sources: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def usable_bytes(self) -> int:
        """The memory that torch reports, in bytes."""
        return int(self.gib * GIB)

    @property
    def estimated(self) -> tuple[str, ...]:
        """The names of the card's figures that are estimates, for example ``tflops``."""
        return tuple(figure for figure, source in self.sources.items() if source.startswith("~"))

    @property
    def is_estimated(self) -> bool:
        """Whether the card's memory is an estimate."""
        return "gib" in self.estimated

    @property
    def has_bf16(self) -> bool:
        """Whether the card has bf16 matmuls."""
        return has_bf16(self.capability)

    @property
    def has_flash(self) -> bool:
        """Whether torch has a flash attention kernel for the card."""
        return has_bf16(self.capability)

    @property
    def is_amd(self) -> bool:
        """Whether it is an AMD card, which torch uses through ROCm."""
        return self.capability.startswith("gfx")

    @property
    def is_cpu(self) -> bool:
        """Whether this entry describes a CPU."""
        return self.capability == CPU_CAPABILITY

    def link_of(self, gpus: int) -> Link:
        """The link that ``gpus`` cards of this kind in one machine usually have."""
        if self.link == "pcie":
            return Link(kind="pcie", gbps=self.link_gbps, peer=self.peer)
        if self.link_cards is not None and gpus > self.link_cards:
            return Link(kind="pcie", gbps=self.host_gbps, peer=self.peer)
        return Link(kind=self.link, gbps=self.link_gbps, peer=True)


def has_bf16(capability: str) -> bool:
    """Whether cards of a compute capability, or AMD architecture, have bf16 matmuls."""
    return not capability[:1].isdecimal() or float(capability) >= _FIRST_WITH_BF16
