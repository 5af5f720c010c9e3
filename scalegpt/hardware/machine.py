"""The hardware that a run is planned for: cards, the links between them, and their host.

:meth:`Machine.of` describes a card of the catalogue, :mod:`scalegpt.hardware.detect` the machine at hand.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

from scalegpt.config.machine import CPU, MachineConfig
from scalegpt.errors import InputError
from scalegpt.hardware.gpu_words import named_gpus
from scalegpt.hardware.gpus import GB, Card, Link, find_card_and_note, is_known

HOST_PER_CARD, HOST_LEAST, HOST_MOST = 2, 64 * GB, 2048 * GB
"""The host memory that is assumed where none is given: this many times the memory of a machine's cards, within bounds.

Published machine types have about that: GCP a2-highgpu-8g (8 × A100 40GB) 680 GB, a2-ultragpu-1g and -8g (A100 80GB) 170
and 1,360 GB, a3-highgpu-8g (8 × H100) 1,872 GB, g2-standard-96 (8 × L4) 384 GB; AWS p4d and p4de (8 × A100) 1,152 GiB, p5 and
p5en (8 × H100, H200) 2,048 GiB; Azure ND MI300X v5 1,850 GiB. The lower bound is that of a well-equipped desktop machine."""

GIVEN, FOUND, ASSUMED = "given", "found", "assumed"
"""Where a machine's host memory comes from: a setting, the machine at hand, or the rule above."""


def assumed_host_bytes(card_bytes: int, gpus: int) -> int:
    """The host memory assumed for a machine of ``gpus`` cards with ``card_bytes`` each."""
    return min(HOST_MOST, max(HOST_LEAST, HOST_PER_CARD * card_bytes * gpus))


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The hardware that a run is planned for.

    Attributes:
        name: of the card; None where none is named.
        usable_bytes: memory of one card that a run may fill; None: not known.
        card: its entry in the catalogue, if it has one.
        capability: NVIDIA's compute capability, AMD's architecture, or ``cpu``; None: not known.
        gpus: cards in each machine.
        nodes: machines.
        is_gpu: false for a run on the CPU, which has none of a card's overheads.
        torch: version of torch that will run, if known.
        driver: version of the driver, if known.
        link: how the cards of one machine are joined; None: not known.
        host_gbps: between a card and the host's memory, GB/s of 10⁹, both directions together; None: not known.
        host_bytes: host memory of one machine that a run may use, all its ranks together; None: not known.
        host_source: :data:`GIVEN`, :data:`FOUND` or :data:`ASSUMED`; None where it is not known.
        keeps_freed_memory: whether a process on the CPU keeps the memory that it frees, which is faster and needs more.
        cores: processor cores of one machine that a run may use; None: not known.
        network_gbps: network of one machine, Gbit/s in each direction; None: not known.
        notes: remarks for the user, a line each: memory that others hold, mixed cards.
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
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, settings: MachineConfig, *, torch: str | None = None) -> "Machine":
        """The machine that the settings describe, with the catalogue's figures; the machine at hand is not looked at.

        Raises:
            InputError: the card is not known, or has less memory than is to be used.
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
        gpus = settings.gpus or 1
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
            network_gbps=settings.network_gbps,
            notes=(remark,) if remark else (),
        )

    @classmethod
    def with_card(cls, card: Card, *, gpus: int = 1, nodes: int = 1) -> "Machine":
        """Machines with a card of the catalogue, and the usual link and host memory."""
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
        """The same with another number of cards, and the usual link for it; with fewer cards the host memory is unchanged."""
        link, host = self.link, self.host_bytes
        if self.card is not None and link == self.card.link_of(self.gpus):
            link = self.card.link_of(gpus)
        if self.host_source == ASSUMED and host is not None and gpus > self.gpus:
            size = self.usable_bytes or 0 if self.card is None else self.card.gb * GB
            host = max(host, assumed_host_bytes(size, gpus))
        return replace(self, gpus=gpus, nodes=nodes, link=link, host_bytes=host)

    def with_other_card(self, card: Card) -> "Machine":
        """The same numbers of another card; network, torch and a given host memory are kept."""
        built = Machine.with_card(card, gpus=self.gpus, nodes=self.nodes)
        if self.host_source == GIVEN:
            built = replace(built, host_bytes=self.host_bytes, host_source=GIVEN)
        return replace(built, network_gbps=self.network_gbps, torch=self.torch)

    @property
    def ranks(self) -> int:
        """Data-parallel ranks W: one for each card."""
        return self.gpus * self.nodes


def read_counts(settings: MachineConfig, given: Collection[str]) -> tuple[MachineConfig, tuple[str, ...]]:
    """The settings with the numbers that ``gpu`` names, as in ``2x 3090``, and a note that says how it was read.

    ``given`` are the names of the settings that the user gave; the others have their defaults.

    Raises:
        InputError: the numbers can be read in several ways, or contradict ``gpus`` or ``nodes``.
    """
    if settings.gpu is None:
        return settings, ()
    read = named_gpus(settings.gpu, lambda name: is_known(name) or name.strip().lower() == CPU)
    name = CPU if read.name.strip().lower() == CPU else read.name
    numbers = {key: number for key, number in (("gpus", read.gpus), ("nodes", read.nodes)) if number is not None}
    for key, number in numbers.items():
        other = getattr(settings, key) if key in given else None
        if other is not None and other != number:
            raise InputError(f"gpu {settings.gpu!r} says {number} {key}, --{key} says {other}; give one of them")
    if not numbers:
        return settings.changed(gpu=name), ()
    said = " ".join(f"--{key} {number}" for key, number in numbers.items())
    return settings.changed(gpu=name, **numbers), (f"gpu {settings.gpu!r} was read as --gpu '{name}' {said}",)
