"""The networks between machines: their names, and the bandwidth of one port.

A network is a name (``infiniband-400g``), several ports of it in each machine (``8xinfiniband-400g``), or a figure with its
unit (``50GB/s``, ``400Gb/s``). What of it training reaches is in :mod:`scalegpt.planner.time`.
"""

import re
from typing import NamedTuple

from scalegpt.config.machine import MOST_GBPS, MachineConfig
from scalegpt.errors import InputError, nearest
from scalegpt.text import shown

INFINIBAND, ROCE, EFA, ETHERNET = "infiniband", "roce", "efa", "ethernet"
"""The kinds of network. RoCE is RDMA over Ethernet, EFA is Amazon's adapter; the kind ethernet is TCP."""

_RATES = {
    INFINIBAND: {
        100: "EDR: InfiniBand Trade Association, roadmap",
        200: "HDR: InfiniBand Trade Association, roadmap",
        400: "NDR: InfiniBand Trade Association, roadmap",
        800: "XDR: InfiniBand Trade Association, roadmap",
    },
    ROCE: {
        25: "IEEE 802.3by",
        50: "IEEE 802.3cd",
        100: "IEEE 802.3bj",
        200: "IEEE 802.3bs",
        400: "IEEE 802.3bs",
    },
    EFA: {
        100: "Amazon EC2: p4d and p4de have 4 in a machine, p5 has 32",
        200: "Amazon EC2: p5en has 16 in a machine",
    },
    ETHERNET: {
        1: "IEEE 802.3ab",
        10: "IEEE 802.3ae",
        25: "IEEE 802.3by",
        40: "IEEE 802.3ba",
        50: "IEEE 802.3cd",
        100: "IEEE 802.3bj",
        200: "IEEE 802.3bs",
    },
}
NETWORKS = {f"{kind}-{gbps}g": (kind, gbps, source) for kind, rates in _RATES.items() for gbps, source in rates.items()}
"""Name → kind, Gbit/s of one port in each direction, and the source of that figure."""

FORMS = "NAME, such as infiniband-400g, N×NAME, such as 8xinfiniband-400g, or a figure with its unit, 50GB/s or 400Gb/s"

_PORTS = re.compile(r"(?:([0-9]{1,4})\s*[x×*]\s*)?(.+)", re.IGNORECASE | re.DOTALL)
_FIGURE = re.compile(r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*(.*)", re.DOTALL)
_UNIT = re.compile(r"([MGTmgt])(?:(b|B)(?:/s|ps)|bit(?:/s|ps)?)")
_GIGA = {"m": 1e-3, "g": 1.0, "t": 1e3}


class Network(NamedTuple):
    """The network of each machine.

    Attributes:
        gbps: Gbit/s of all its ports together, in each direction.
        kind: a kind of network, for example :data:`ROCE`; None: only the bandwidth is known.
    """

    gbps: float | None = None
    kind: str | None = None

    @classmethod
    def of(cls, settings: MachineConfig) -> "Network":
        """The network that ``--network`` or ``--network_gbps`` gives; without either, its figure is None.

        Raises:
            InputError: both are given, or the text is not a network.
        """
        if settings.network is None:
            return cls(settings.network_gbps)
        if settings.network_gbps is not None:
            raise InputError("network and network_gbps both describe the network of each machine; give one of them")
        return read_network(settings.network)


def read_network(text: str) -> Network:
    """The network that a text describes; :data:`FORMS` has its forms.

    Raises:
        InputError: the name is unknown, a figure has no unit, or the network has no bandwidth or too much.
    """
    found = _PORTS.fullmatch(text.strip())
    ports, said = (found[1], found[2].strip()) if found else (None, text)
    name = re.sub(r"[\s_]+", "-", said.lower())
    if name in NETWORKS:
        kind, gbps, _ = NETWORKS[name]
        return Network(_checked(text, float(gbps) * int(ports or 1)), kind)
    figure = _FIGURE.fullmatch(said)
    if figure is None:
        raise InputError(f"network {shown(text)} is not known: give {FORMS}{nearest(name, NETWORKS)}")
    unit = _UNIT.fullmatch(figure[2])
    if unit is None:
        raise InputError(
            f"network {shown(text)} {'has no unit' if not figure[2] else 'has a unit that is not known'}; write "
            f"{figure[1]}Gb/s for gigabits or {figure[1]}GB/s for gigabytes a second"
        )
    bits = 8 if unit[2] == "B" else 1
    return Network(_checked(text, float(figure[1]) * _GIGA[unit[1].lower()] * bits * int(ports or 1)))


def _checked(text: str, gbps: float) -> float:
    if not 0 < gbps <= MOST_GBPS:
        raise InputError(f"network {shown(text)} must be more than 0 and at most {MOST_GBPS:,} Gbit/s of each machine")
    return gbps
