"""The GPUs found on this machine, in one form for those that NVML and AMD's kernel driver report."""

from collections.abc import Sequence
from dataclasses import dataclass

from scalegpt.hardware.gpus import Card, Link, catalogue, known_card, namesakes

TAKEN_FROM = 64 * 2**20
"""Memory in use on a card counts as other processes' from this many bytes on. Less is the driver's own."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """One card, or MIG device, that a process on this machine can use.

    Attributes:
        label: its number in the driver's tools: ``0``, or ``0:1`` for the second MIG device of card 0.
        name: the driver's name for it, for example ``NVIDIA A100-SXM4-40GB``.
        usable_bytes: the memory that torch will report; None: the driver does not report it.
        taken_bytes: the part of ``usable_bytes`` that other processes hold.
        processes: the number of other processes that the driver lists. In a container it may list none although it
            counts their memory.
        capability: compute capability, or AMD's architecture; None: not known.
        card: its entry in the catalogue; None for an unknown card, and for a MIG device.
        host_gbps: bandwidth of its PCIe link, in GB/s (10⁹ bytes), sum of both directions; None: not known.
    """

    label: str
    name: str
    usable_bytes: int | None
    taken_bytes: int = 0
    processes: int = 0
    capability: str | None = None
    card: Card | None = None
    host_gbps: float | None = None

    @property
    def is_taken(self) -> bool:
        """Whether other processes hold some of the card's memory."""
        return self.taken_bytes >= TAKEN_FROM

    @property
    def free_bytes(self) -> int | None:
        """Bytes of memory that a run may fill; None where the driver does not report the memory."""
        if self.usable_bytes is None or not self.is_taken:
            return self.usable_bytes
        return max(0, self.usable_bytes - self.taken_bytes)


@dataclass(frozen=True, kw_only=True)
class FoundGpus:
    """The cards that a process on this machine can use.

    Attributes:
        devices: the cards, in CUDA's or HIP's order, as far as that is known.
        link: the link between the cards; None: a single card, or not known.
        driver: the driver's version.
        notes: remarks for the user, a line each.
    """

    devices: tuple[Device, ...] = ()
    link: Link | None = None
    driver: str | None = None
    notes: tuple[str, ...] = ()


def whole_card(name: str, capability: str | None, usable_bytes: int | None) -> Card | None:
    """The catalogue's entry for a card of this machine; None if no entry is certain.

    The driver's name finds the entry. If the name fits cards that differ in memory size, the nearest size is taken.
    AMD's driver does not always give a name. Without a name, the entry with the same architecture and nearly the same
    memory (within 3%) is taken, if there is exactly one.

    Args:
        name: the driver's name.
        capability: AMD's architecture, for example ``gfx942``; None for NVIDIA's cards.
        usable_bytes: the memory that torch will report; None: not known.
    """
    card = known_card(name)
    if card is not None and usable_bytes is not None:
        return min(namesakes(name, card), key=lambda other: abs(other.usable_bytes - usable_bytes))
    if card is not None or capability is None or not capability.startswith("gfx") or usable_bytes is None:
        return card
    alike = [
        card
        for card in catalogue()
        if card.capability == capability and abs(usable_bytes / card.usable_bytes - 1) < 0.03
    ]
    return alike[0] if len(alike) == 1 and name.startswith("AMD GPU") else None


def visible(text: str | None, names: Sequence[Sequence[str]]) -> list[int]:
    """The indices of the devices that ``CUDA_VISIBLE_DEVICES`` or a similar variable selects, in the variable's order.

    Args:
        text: the variable's value: indices or beginnings of names, separated by commas; None: not set, selects all.
        names: for each device, the names that select it, for example its UUID.

    Returns:
        The indices. An invalid entry ends the list, as in CUDA: ``0,-1,1`` selects only device 0.
    """
    if text is None:
        return list(range(len(names)))
    chosen: list[int] = []
    for word in map(str.strip, text.split(",")):
        if word.isdecimal():
            fitting = [int(word)] if int(word) < len(names) else []
        else:
            fitting = [place for place, own in enumerate(names) if word and any(name.startswith(word) for name in own)]
        if len(fitting) != 1 or fitting[0] in chosen:
            break
        chosen += fitting
    return chosen
