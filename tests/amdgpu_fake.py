"""The files of AMD's kernel driver, as Linux lays them out."""

from collections.abc import Collection
from itertools import permutations
from pathlib import Path

GIB = 2**30


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def lay_out(
    root: Path,
    count: int = 1,
    *,
    gfx: int = 90402,
    memory: int = 192 * GIB,
    product: str | None = "AMD Instinct MI300X OAM",
    xgmi: Collection[tuple[int, int]] | None = None,
    direct: bool = False,
    pcie: tuple[str, int] | None = ("32.0 GT/s PCIe", 16),
) -> Path:
    """A machine with a processor at node 0, a display card that is not AMD's, and ``count`` cards at nodes 1 and on.

    Args:
        root: where it goes.
        count: cards.
        gfx: their architecture.
        memory: of each, bytes.
        product: what the driver calls them; None: it does not.
        xgmi: pairs of cards that XGMI joins; None: all.
        direct: whether cards copy directly over PCIe.
        pcie: speed and width.
    """
    nodes = root / "sys/class/kfd/kfd/topology/nodes"
    write(nodes / "0/properties", "cpu_cores_count 64\nsimd_count 0\ngfx_target_version 0")
    write(root / "sys/class/drm/card0/device/vendor", "0x1a03")
    write(root / "sys/module/amdgpu/version", "6.10.5")
    pairs = set(permutations(range(count), 2)) if xgmi is None else {*xgmi, *((b, a) for a, b in xgmi)}
    for number in range(count):
        device, node = root / f"sys/class/drm/card{number + 1}/device", nodes / str(number + 1)
        write(device / "vendor", "0x1002")
        write(device / "mem_info_vram_total", memory)
        write(device / "mem_info_vram_used", 300 * 2**20)
        write(device / f"drm/renderD{128 + number}/dev", "226:128")
        if product:
            write(device / "product_name", product)
        if pcie:
            write(device / "max_link_speed", pcie[0])
            write(device / "max_link_width", pcie[1])
        write(node / "gpu_id", 5000 + number)
        write(node / "properties", f"simd_count 1216\ngfx_target_version {gfx}\ndrm_render_minor {128 + number}\n"
                                   f"unique_id {0xA0 + number}\nname")  # fmt: skip
        write(node / "io_links/0/properties", "type 2\nnode_to 0")
        for place, (_, other) in enumerate(sorted(pair for pair in pairs if pair[0] == number), start=1):
            write(node / f"io_links/{place}/properties", f"type 11\nnode_from {number + 1}\nnode_to {other + 1}")
        if direct:
            for other in range(count):
                write(node / f"p2p_links/{other}/properties", f"type 2\nnode_to {other + 1}")
    return root
