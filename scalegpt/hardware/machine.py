"""The hardware for which a run is planned: one or several machines, their cards, and the links between the cards.

:meth:`Machine.of` makes it from settings and the catalogue, :mod:`scalegpt.hardware.detect` from the real hardware.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

from scalegpt.config.machine import CPU, MachineConfig
from scalegpt.errors import InputError
from scalegpt.hardware.gpu_words import named_gpus
from scalegpt.hardware.gpus import GB, Card, Link, find_card_and_note, is_known
from scalegpt.hardware.networks import Network
from scalegpt.hardware.processor import Measured

HOST_PER_CARD, HOST_LEAST, HOST_MOST = 2, 64 * GB, 2048 * GB
"""The host memory that is assumed if none is given: HOST_PER_CARD times the memory of a machine's cards, but at least
HOST_LEAST bytes and at most HOST_MOST bytes.

Published machine types have about this much: GCP a2-highgpu-8g (8 × A100 40GB) 680 GB, a2-ultragpu-1g and -8g (A100
80GB) 170 and 1,360 GB, a3-highgpu-8g (8 × H100) 1,872 GB, g2-standard-96 (8 × L4) 384 GB; AWS p4d and p4de (8 × A100)
1,152 GiB, p5 and p5en (8 × H100, H200) 2,048 GiB; Azure ND MI300X v5 1,850 GiB. The least is the memory of a
well-equipped desktop machine."""

GIVEN, FOUND, ASSUMED = "given", "found", "assumed"
"""The origin of a host memory size: a setting, a measurement of this machine, or the rule of HOST_PER_CARD."""


def assumed_host_bytes(card_bytes: int, gpus: int) -> int:
    """The bytes of host memory assumed for a machine with ``gpus`` cards of ``card_bytes`` each."""
    return min(HOST_MOST, max(HOST_LEAST, HOST_PER_CARD * card_bytes * gpus))


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The hardware for which a run is planned: ``nodes`` machines with ``gpus`` cards each.

    Attributes:
        name: the card's name; None if no card is named.
        usable_bytes: bytes of one card's memory that a run may fill; None: not known.
        card: the card's entry in the catalogue; None if it has none.
        capability: NVIDIA's compute capability, AMD's architecture, or ``cpu``; None: not known.
        gpus: number of cards in each machine; on a CPU, number of ranks in each machine.
        nodes: number of machines.
        is_gpu: whether ranks use GPUs; false for a run on a CPU.
        torch: version of torch that will run, if known.
        driver: version of the driver, if known.
        link: the link between the cards of one machine; None: not known.
        host_gbps: bandwidth between a card and host memory, in GB/s (10⁹ bytes), sum of both directions; None: not known.
        host_bytes: bytes of one machine's host memory that all ranks on it together may use; None: not known.
        host_source: the origin of ``host_bytes``: :data:`GIVEN`, :data:`FOUND` or :data:`ASSUMED`; None: not known.
        keeps_freed_memory: whether a process on a CPU keeps freed memory for reuse, which is faster but takes more memory.
        cores: CPU cores of one machine that a run may use; None: not known.
        network_gbps: network bandwidth of one machine, Gbit/s in each direction; None: not known.
        network_kind: the kind of that network, see :mod:`scalegpt.hardware.networks`; None: not known.
        price_per_gpu_hour: price of one card for one hour that the settings give; None: not given.
        measured: the measured rates of the processor, for a run on a CPU; None: not measured.
        notes: remarks for the user, a line each, for example on memory that other processes hold, or on mixed cards.
    """

    name: str | None = None
    usable_bytes: int | None = None
    card: Card | None = None
    capability: str | None = None
    gpus: int = 1
    nodes: int = 1
    is_gpu: bool = True
    torch: str | None = None
    driver: str | None = None
    link: Link | None = None
    host_gbps: float | None = None
    host_bytes: int | None = None
    host_source: str | None = None
    keeps_freed_memory: bool = True
    cores: int | None = None
    network_gbps: float | None = None
    network_kind: str | None = None
    price_per_gpu_hour: float | None = None
    measured: Measured | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, settings: MachineConfig, *, torch: str | None = None) -> "Machine":
        """The machine that the settings describe, with the catalogue's figures. This machine is not examined.

        Raises:
            InputError: the card or the network is not known, or the card has less memory than ``memory_gb``.
        """
        card, remark = (None, None) if settings.gpu is None else find_card_and_note(settings.gpu)
        usable = None if card is None else card.usable_bytes
        name = None if card is None else card.name
        if settings.memory_gb is not None:
            given = int(settings.memory_gb * GB)
            if usable is not None and card is not None and given > usable:
                raise InputError(
                    f"memory_gb {settings.memory_gb:g}: {card.name} has {usable / GB:.2f} GB; give less, or omit it"
                )
            usable, name = given, name or f"{settings.memory_gb:g} GB card"
        gpus, network = settings.gpus or 1, Network.of(settings)
        host, source = None, None
        if settings.host_memory_gb is not None:
            host, source = int(settings.host_memory_gb * GB), GIVEN
        elif usable is not None:
            host, source = assumed_host_bytes(usable if card is None else card.gb * GB, gpus), ASSUMED
        return cls(
            name=name,
            usable_bytes=usable,
            card=card,
            capability=None if card is None else card.capability,
            gpus=gpus,
            nodes=settings.nodes,
            torch=torch,
            link=None if card is None else card.link_of(gpus),
            host_gbps=None if card is None else card.host_gbps,
            host_bytes=host,
            host_source=source,
            network_gbps=network.gbps,
            network_kind=network.kind,
            price_per_gpu_hour=settings.price_per_gpu_hour,
            notes=(remark,) if remark else (),
        )

    @classmethod
    def with_card(cls, card: Card, *, gpus: int = 1, nodes: int = 1) -> "Machine":
        """``nodes`` machines, each with ``gpus`` cards of this kind, their usual link, and an assumed size of host memory."""
        return cls(
            name=card.name,
            usable_bytes=card.usable_bytes,
            card=card,
            gpus=gpus,
            nodes=nodes,
            link=card.link_of(gpus),
            host_bytes=assumed_host_bytes(card.gb * GB, gpus),
            host_source=ASSUMED,
        )

    def with_cards(self, *, gpus: int, nodes: int) -> "Machine":
        """The same hardware with other numbers of cards and machines.

        The usual link and the assumed host memory become those of the new number of cards, but assumed host memory does
        not shrink.
        """
        link, host = self.link, self.host_bytes
        if self.card is not None and link == self.card.link_of(self.gpus):
            link = self.card.link_of(gpus)
        if self.host_source == ASSUMED and host is not None and gpus > self.gpus:
            size = self.usable_bytes or 0 if self.card is None else self.card.gb * GB
            host = max(host, assumed_host_bytes(size, gpus))
        return replace(self, gpus=gpus, nodes=nodes, link=link, host_bytes=host)

    def with_other_card(self, card: Card) -> "Machine":
        """The same hardware with cards of another kind. Numbers, network, torch and a given host memory are kept.

        A given price is kept only if no card was named, since it is the price of that card.
        """
        built = Machine.with_card(card, gpus=self.gpus, nodes=self.nodes)
        if self.host_source == GIVEN:
            built = replace(built, host_bytes=self.host_bytes, host_source=GIVEN)
        price = self.price_per_gpu_hour if self.card is None else None
        return replace(
            built,
            network_gbps=self.network_gbps,
            network_kind=self.network_kind,
            price_per_gpu_hour=price,
            torch=self.torch,
        )

    @property
    def ranks(self) -> int:
        """Number of data-parallel ranks W over all machines: one for each card."""
        return self.gpus * self.nodes

    @property
    def gpu_price(self) -> float | None:
        """Price of one card for one hour: as given, else that of the user's own catalogue; None: not known."""
        if self.price_per_gpu_hour is not None or self.card is None:
            return self.price_per_gpu_hour
        return self.card.price_per_gpu_hour


def read_counts(settings: MachineConfig, given: Collection[str]) -> tuple[MachineConfig, tuple[str, ...]]:
    """Move the numbers in the setting ``gpu`` (the 2 of ``2x 3090``) to the settings ``gpus`` and ``nodes``.

    Args:
        settings: the settings; ``gpu`` may contain the numbers of cards and machines.
        given: names of the settings that the user gave; all other settings have their defaults.

    Returns:
        The changed settings, and a note on how ``gpu`` was read; no note if it contains no number.

    Raises:
        InputError: the text can be read in several ways, or contradicts ``gpus`` or ``nodes``.
    """
    if settings.gpu is None:
        return settings, ()
    read = named_gpus(settings.gpu, lambda name: is_known(name) or name.strip().lower() == CPU)
    name = CPU if read.name.strip().lower() == CPU else read.name
    numbers = {key: number for key, number in (("gpus", read.gpus), ("nodes", read.nodes)) if number is not None}
    for key, number in numbers.items():
        other = getattr(settings, key) if key in given else None
        if other is not None and other != number:
            raise InputError(f"gpu {settings.gpu!r} says {number} {key}, but --{key} says {other}; give one of them")
    if not numbers:
        return settings.changed(gpu=name), ()
    said = " ".join(f"--{key} {number}" for key, number in numbers.items())
    return settings.changed(gpu=name, **numbers), (f"gpu {settings.gpu!r} was read as --gpu '{name}' {said}",)
