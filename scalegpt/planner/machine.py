"""What a run is planned for: cards, how they are joined, and the host around them.

:meth:`Machine.of` takes a card from the catalogue. :mod:`scalegpt.planner.detect` looks at the machine at hand.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

from scalegpt.config.machine import CPU, MachineConfig
from scalegpt.errors import InputError
from scalegpt.planner.gpu_words import counted
from scalegpt.planner.gpus import GB, Card, Link, is_known, meant_card


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a run is planned for.

    Attributes:
        name: what to call the card; None where none is named.
        usable_bytes: memory of one card that a run may fill; None: not known.
        card: its entry in the catalogue, if it has one.
        capability: NVIDIA's compute capability, AMD's architecture, or ``cpu``; None: not known.
        gpus: cards in each machine.
        nodes: machines.
        is_gpu: false for a run on the CPU, which has no overheads of a card.
        torch: version of torch that will run, if known.
        driver: version of the driver, if known.
        link: how the cards of one machine are joined; None: not known.
        host_gbps: between a card and the host's memory, GB/s of 10⁹, both directions together; None: not known.
        host_bytes: host memory of one machine that a run may use; None: not known.
        cores: processor cores of one machine that a run may use; None: not known.
        network_gbps: network of one machine, Gbit/s in each direction; None: not known.
        notes: what to say about the machine, a line each: memory that others hold, mixed cards.
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
    cores: int | None = None
    network_gbps: float | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, settings: MachineConfig, *, torch: str | None = None) -> "Machine":
        """The machine that the settings describe, with the catalogue's figures; nothing here is looked at.

        Raises:
            InputError: the card is not known, or has less memory than is to be used.
        """
        card, remark = (None, None) if settings.gpu is None else meant_card(settings.gpu)
        usable = None if card is None else card.usable_bytes
        name = None if card is None else card.name
        if settings.memory_gb is not None:
            given = int(settings.memory_gb * GB)
            if usable is not None and card is not None and given > usable:
                raise InputError(
                    f"memory_gb {settings.memory_gb:g}: {card.name} has {usable / GB:.2f} GB; give less, or leave it out"
                )
            usable, name = given, name or f"{settings.memory_gb:g} GB card"
        gpus = settings.gpus or 1
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
            network_gbps=settings.network_gbps,
            notes=(remark,) if remark else (),
        )

    @classmethod
    def with_card(cls, card: Card, *, gpus: int = 1, nodes: int = 1) -> "Machine":
        """Machines of a card of the catalogue, built as such are."""
        return cls(
            name=card.name, usable_bytes=card.usable_bytes, card=card, gpus=gpus, nodes=nodes, link=card.link_of(gpus)
        )

    def with_cards(self, *, gpus: int, nodes: int) -> "Machine":
        """The same with another number of cards, joined as such a number is."""
        link = self.link
        if self.card is not None and link == self.card.link_of(self.gpus):
            link = self.card.link_of(gpus)
        return replace(self, gpus=gpus, nodes=nodes, link=link)

    @property
    def ranks(self) -> int:
        """Data-parallel ranks W: one for each card."""
        return self.gpus * self.nodes


def read_counts(settings: MachineConfig, given: Collection[str]) -> tuple[MachineConfig, tuple[str, ...]]:
    """The settings with the numbers that ``gpu`` names, as in ``2x 3090``, and a remark that says how it was read.

    Args:
        settings: what was asked for.
        given: the settings that were given; the others have their defaults.

    Raises:
        InputError: the numbers can be read in several ways, or contradict ``gpus`` or ``nodes``.
    """
    if settings.gpu is None:
        return settings, ()
    read = counted(settings.gpu, lambda name: is_known(name) or name.strip().lower() == CPU)
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
