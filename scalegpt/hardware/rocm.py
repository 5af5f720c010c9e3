"""AMD's cards by the files of their kernel driver, without torch or a library of ROCm's.

The display side of ``amdgpu`` (``/sys/class/drm``) tells the memory, the compute side (``/sys/class/kfd``) the architecture,
the order in which HIP numbers the cards, their links, and what each process holds.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from scalegpt.hardware.devices import Device, Found, visible, whole_card
from scalegpt.hardware.gpus import Link

AMD_VENDOR = "0x1002"

XGMI_LINK = 11
"""``CRAT_IOLINK_TYPE_XGMI`` of the kernel's ``kfd_crat.h``."""


@dataclass(frozen=True)
class _Node:
    """A GPU of the compute side.

    Attributes:
        number: its node.
        gpu_id: how the driver's other files call it.
        properties: its figures by name.
        display: its folder on the display side.
    """

    number: int
    gpu_id: str
    properties: Mapping[str, int]
    display: Path

    @property
    def names(self) -> list[str]:
        """What ``ROCR_VISIBLE_DEVICES`` may call it."""
        return [f"GPU-{self.properties.get('unique_id', 0):016x}"]


def find(root: Path = Path("/"), most: int | None = None) -> Found | None:
    """The cards of AMD's that a process here can use.

    ``ROCR_VISIBLE_DEVICES`` chooses first, and then ``HIP_VISIBLE_DEVICES``, else ``CUDA_VISIBLE_DEVICES``, among those left.

    Args:
        root: where ``sys`` is looked for.
        most: how many of them are wanted: the link is that of the first so many; None: of all.

    Returns:
        The cards; None where there are none.
    """
    nodes = list(_nodes(root))
    if not nodes:
        return None
    nodes = [nodes[place] for place in visible(os.environ.get("ROCR_VISIBLE_DEVICES"), [node.names for node in nodes])]
    later = os.environ.get("HIP_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES"))
    nodes = [nodes[place] for place in visible(later, [[] for _ in nodes])]
    devices = tuple(_device(root, str(place), node) for place, node in enumerate(nodes))
    return Found(
        devices=devices,
        link=_link(root, nodes[:most], devices[0]) if len(nodes[:most]) > 1 else None,
        driver=_read(root / "sys/module/amdgpu/version") or None,
    )


def _nodes(root: Path) -> Iterator[_Node]:
    """The GPUs in the order of their nodes, which is HIP's."""
    displays: dict[str, Path] = {}
    for display in (root / "sys/class/drm").glob("card*/device"):
        if _read(display / "vendor") == AMD_VENDOR and _number(display / "mem_info_vram_total"):
            displays.update({render.name: display for render in (display / "drm").glob("renderD*")})
    folders = (root / "sys/class/kfd/kfd/topology/nodes").glob("[0-9]*")
    for folder in sorted(folders, key=lambda folder: int(folder.name)):
        properties = _properties(folder / "properties")
        own = displays.get(f"renderD{properties.get('drm_render_minor', -1)}")
        if properties.get("gfx_target_version") and own is not None:
            yield _Node(int(folder.name), _read(folder / "gpu_id"), properties, own)


def architecture(version: int) -> str:
    """A ``gfx_target_version`` as a name: two digits each for minor and stepping, which the name has in hexadecimal.

    >>> architecture(90010), architecture(90402), architecture(110000)
    ('gfx90a', 'gfx942', 'gfx1100')
    """
    return f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"


def _device(root: Path, label: str, node: _Node) -> Device:
    capability = architecture(node.properties["gfx_target_version"])
    name = _read(node.display / "product_name") or f"AMD GPU {capability}"
    usable = _number(node.display / "mem_info_vram_total")
    held = dict(_held(root, node))
    return Device(
        label=label,
        name=name,
        usable_bytes=usable,
        taken_bytes=sum(held.values()),
        processes=len(held),
        capability=capability,
        card=whole_card(name, capability, usable),
        host_gbps=_pcie_gbps(node),
    )


def _held(root: Path, node: _Node) -> Iterator[tuple[str, int]]:
    """Process → bytes, of other processes that hold some of a card."""
    for file in (root / "sys/class/kfd/kfd/proc").glob(f"[0-9]*/vram_{node.gpu_id}"):
        size = _number(file)
        if size and file.parent.name != str(os.getpid()):
            yield file.parent.name, size


def _pcie_gbps(node: _Node) -> float | None:
    """Both directions together, as vendors print it: 64 for 16 lanes of ``16.0 GT/s PCIe``."""
    speed = _read(node.display / "max_link_speed").split(" ")[0]
    width = _number(node.display / "max_link_width")
    return float(speed) * width / 4 if speed.replace(".", "", 1).isdecimal() and width else None


def _link(root: Path, nodes: list[_Node], first: Device) -> Link | None:
    """XGMI where its links join all the cards, if only by way of each other, else PCIe."""
    joined = _linked(root, nodes, "io_links", XGMI_LINK)
    reached, waiting = {nodes[0].number}, [nodes[0].number]
    while waiting:
        here = waiting.pop()
        new = {end for pair in joined if here in pair for end in pair} - reached
        reached |= new
        waiting += new
    if len(reached) == len(nodes) and first.card is not None and first.card.link == "xgmi":
        return Link(kind="xgmi", gbps=first.card.link_gbps, peer=True)
    if first.host_gbps is None:
        return None
    direct = _linked(root, nodes, "p2p_links") | _linked(root, nodes, "io_links")
    pairs = {frozenset((one.number, other.number)) for one, other in combinations(nodes, 2)}
    return Link(kind="pcie", gbps=first.host_gbps, peer=pairs <= direct)


def _linked(root: Path, nodes: list[_Node], kind: str, of_type: int | None = None) -> set[frozenset[int]]:
    """The pairs of nodes that links of a kind join."""
    found = set()
    for node in nodes:
        for file in (root / f"sys/class/kfd/kfd/topology/nodes/{node.number}/{kind}").glob("[0-9]*/properties"):
            link = _properties(file)
            if of_type in {None, link.get("type")}:
                found.add(frozenset((node.number, link.get("node_to", -1))))
    return found


def _read(path: Path) -> str:
    """The file's text; empty where it is not there, or not ours to read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _read(path)
    return int(text) if text.isdecimal() else None


def _properties(path: Path) -> dict[str, int]:
    pairs = (line.split() for line in _read(path).splitlines())
    return {words[0]: int(words[1]) for words in pairs if len(words) == 2 and words[1].isdecimal()}
