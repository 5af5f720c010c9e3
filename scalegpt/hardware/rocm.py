"""Finds AMD's cards through the files of their kernel driver, without torch or a ROCm library.

The driver ``amdgpu`` lists each card twice. The files of its display side (``/sys/class/drm``) give the memory. The files of
its compute side (``/sys/class/kfd``) give the architecture, the order in which HIP numbers the cards, the links between
cards, and the memory that each process holds.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from scalegpt.hardware.devices import Device, FoundGpus, visible, whole_card
from scalegpt.hardware.gpus import Link
from scalegpt.system.cores import kernel_number, kernel_text

AMD_VENDOR = "0x1002"

XGMI_LINK = 11
"""The type number of an XGMI link: ``CRAT_IOLINK_TYPE_XGMI`` in the kernel's ``kfd_crat.h``."""


@dataclass(frozen=True)
class _Node:
    """A GPU on the compute side of the driver: a node of the topology (``/sys/class/kfd/kfd/topology``).

    Attributes:
        number: the number of the node.
        gpu_id: the id of the GPU in other files of the compute side.
        properties: name → value, from the node's file ``properties``.
        display: the GPU's folder on the display side of the driver.
    """

    number: int
    gpu_id: str
    properties: Mapping[str, int]
    display: Path


def find(root: Path = Path("/"), most: int | None = None) -> FoundGpus | None:
    """AMD's cards that a process on this machine can use; None if there are none.

    ``ROCR_VISIBLE_DEVICES`` selects first, by index or UUID. ``HIP_VISIBLE_DEVICES``, or if it is not set
    ``CUDA_VISIBLE_DEVICES``, then selects among the remaining cards.

    Args:
        root: the folder that contains ``sys``.
        most: how many cards, from the first, to examine for their common link; None: all.
    """
    nodes = list(_nodes(root))
    if not nodes:
        return None
    uuids = [[f"GPU-{node.properties.get('unique_id', 0):016x}"] for node in nodes]
    nodes = [nodes[place] for place in visible(os.environ.get("ROCR_VISIBLE_DEVICES"), uuids)]
    later = os.environ.get("HIP_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES"))
    nodes = [nodes[place] for place in visible(later, [[] for _ in nodes])]
    devices = tuple(_device(root, str(place), node) for place, node in enumerate(nodes))
    return FoundGpus(
        devices=devices,
        link=_link(root, nodes[:most], devices[0]) if len(nodes[:most]) > 1 else None,
        driver=kernel_text(root / "sys/module/amdgpu/version") or None,
    )


def _nodes(root: Path) -> Iterator[_Node]:
    """The GPUs in the order of their node numbers, which is also the order in which HIP numbers them."""
    displays: dict[str, Path] = {}
    for display in (root / "sys/class/drm").glob("card*/device"):
        if kernel_text(display / "vendor") == AMD_VENDOR and kernel_number(display / "mem_info_vram_total"):
            displays.update({render.name: display for render in (display / "drm").glob("renderD*")})
    folders = (root / "sys/class/kfd/kfd/topology/nodes").glob("[0-9]*")
    for folder in sorted(folders, key=lambda folder: int(folder.name)):
        properties = _properties(folder / "properties")
        own = displays.get(f"renderD{properties.get('drm_render_minor', -1)}")
        if properties.get("gfx_target_version") and own is not None:
            yield _Node(int(folder.name), kernel_text(folder / "gpu_id"), properties, own)


def architecture(version: int) -> str:
    """The architecture's name for a ``gfx_target_version``, a number whose decimal digits are major, minor and stepping.

    Minor and stepping have two digits each, which become one hexadecimal digit each.

    >>> architecture(90010), architecture(90402), architecture(110000)
    ('gfx90a', 'gfx942', 'gfx1100')
    """
    return f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"


def _device(root: Path, label: str, node: _Node) -> Device:
    capability = architecture(node.properties["gfx_target_version"])
    name = kernel_text(node.display / "product_name") or f"AMD GPU {capability}"
    usable = kernel_number(node.display / "mem_info_vram_total")
    files = (root / "sys/class/kfd/kfd/proc").glob(f"[0-9]*/vram_{node.gpu_id}")
    held = [kernel_number(file) or 0 for file in files if file.parent.name != str(os.getpid())]
    # For example, ``16.0 GT/s PCIe`` with 16 lanes is 64 GB/s, both directions together, as vendors print it.
    speed = kernel_text(node.display / "max_link_speed").split(" ")[0]
    width = kernel_number(node.display / "max_link_width")
    return Device(
        label=label,
        name=name,
        usable_bytes=usable,
        taken_bytes=sum(held),
        processes=sum(size > 0 for size in held),
        capability=capability,
        card=whole_card(name, capability, usable),
        host_gbps=float(speed) * width / 4 if speed.replace(".", "", 1).isdecimal() and width else None,
    )


def _link(root: Path, nodes: list[_Node], first: Device) -> Link | None:
    """The link between the cards: XGMI if it connects all, directly or not, else PCIe; None if its speed is not known."""
    reached, joined = {nodes[0].number}, _linked(root, nodes, "io_links", XGMI_LINK)
    while new := {end for pair in joined if pair & reached for end in pair} - reached:
        reached |= new
    if len(reached) == len(nodes) and first.card is not None and first.card.link == "xgmi":
        return Link(kind="xgmi", gbps=first.card.link_gbps, peer=True)
    if first.host_gbps is None:
        return None
    direct = _linked(root, nodes, "p2p_links") | _linked(root, nodes, "io_links")
    pairs = {frozenset((one.number, other.number)) for one, other in combinations(nodes, 2)}
    return Link(kind="pcie", gbps=first.host_gbps, peer=pairs <= direct)


def _linked(root: Path, nodes: list[_Node], kind: str, of_type: int | None = None) -> set[frozenset[int]]:
    """Pairs of node numbers, one for each link in the nodes' folders ``kind``; only links of type ``of_type``, if given."""
    found = set()
    for node in nodes:
        for file in (root / f"sys/class/kfd/kfd/topology/nodes/{node.number}/{kind}").glob("[0-9]*/properties"):
            link = _properties(file)
            if of_type in {None, link.get("type")}:
                found.add(frozenset((node.number, link.get("node_to", -1))))
    return found


def _properties(path: Path) -> dict[str, int]:
    pairs = (line.split() for line in kernel_text(path).splitlines())
    return {words[0]: int(words[1]) for words in pairs if len(words) == 2 and words[1].isdecimal()}
