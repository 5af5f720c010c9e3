"""The memory of a GPU beyond the step's own tensors: workspaces, fragmentation, the CUDA context, NCCL.

The memory of a run is counted at three levels, each of which includes the one before:

- the *peak* of the step's tensors, which :mod:`scalegpt.planner.memory.predict` computes exactly;
- the *reserved* memory of the caching allocator: the peak, cuBLAS's workspaces, and fragmentation;
- the *total* that the driver counts for the process: reserved memory, the CUDA context with its kernels, NCCL's buffers.

No figure here has been measured with our own trainer yet. Each has a source, or is a cautious estimate marked with
``~``. Measurements of real runs replace them (:mod:`scalegpt.planner.time.calibration`).
"""

from dataclasses import dataclass, replace

from scalegpt.config import RunConfig
from scalegpt.hardware.gpus import Card

KIB, MIB = 2**10, 2**20


@dataclass(frozen=True)
class Figure:
    """A number and its source; a source that begins with ``~`` marks an estimate."""

    value: float
    source: str


_POOL = "pytorch, aten/src/ATen/cuda/CublasHandlePool.cpp: parseChosenWorkspaceSize"

CUBLAS_WORKSPACE = {
    "nvidia": Figure((2 * 4096 + 8 * 16) * KIB, _POOL),
    "hopper and later": Figure(32 * MIB, _POOL),
    "amd": Figure(32 * MIB, _POOL),
    "gfx942": Figure(128 * MIB, _POOL),
}
"""Kind of card → bytes of one cuBLAS workspace. The caching allocator holds it, so ``memory_allocated`` counts it; the trace
and the planner's peak do not. cuBLASLt shares it (``unified_cublas_and_lt_workspaces`` in torch)."""

WORKSPACES = Figure(2, "the same file: one for each handle and stream; autograd's backward thread has its own handle")

HIPBLASLT_WORKSPACE = Figure(76 * MIB, "the same file, parseCUDABlasLtWorkspaceSize under ROCm")

CONTEXT = {
    "7": Figure(400 * MIB, "~300 to 400 MB with lazy loading, by torch's maintainers (pytorch issues 107667, 109888)"),
    "8": Figure(500 * MIB, "~426 MiB bare on an RTX 6000 Ada, torch 2.10 (unsloth-zoo pull 1053); kernels come on top"),
    "9": Figure(620 * MIB, "~the upper end of 0.3 to 0.65 GB"),
    "gfx": Figure(620 * MIB, "~as the largest of NVIDIA's"),
}
"""First digit of the compute capability, or ``gfx`` for AMD → bytes of the context and of the kernels that a run loads."""

NCCL = {
    1: Figure(100 * MIB, "~a communicator of one rank exchanges nothing, but its kernels are loaded"),
    2: Figure(544 * MIB, "2 of 4 A100 with NVLink, torch (NVIDIA/nccl issue 964)"),
    4: Figure(688 * MIB, "3 and 4 A100 with NVLink, torch (NVIDIA/nccl issue 964)"),
    8: Figure(1060 * MIB, "8 H100, before any all-to-all (NVIDIA/nccl issue 1685)"),
}
"""Number of ranks → bytes of one communicator of up to that many ranks.

Cards without NVLink use fewer channels and therefore less memory, but no figure for them is known.
"""

NCCL_OF_MORE = Figure(1600 * 10**6, "one communicator, number of ranks not reported (NVIDIA/nccl issue 864)")

FRAGMENTATION = Figure(0.04, "~share of the peak; steps that are all alike fragment little")

SEGMENT = Figure(
    20 * MIB, "c10/cuda/CUDACachingAllocator.h: kLargeBuffer, the segment into which tensors of 1 to 10 MiB are packed"
)
"""Unused bytes that the allocator may hold in a segment that is not full. They do not depend on the peak."""


@dataclass(frozen=True, kw_only=True)
class Overheads:
    """The memory outside the step's tensors, in bytes; ``fragmentation_share`` is a share of the peak and the workspaces.

    Attributes:
        measured: the number of similar runs whose measurements gave the figures; 0: the figures are from this module's
            tables.
    """

    workspaces: int = 0
    fragmentation_share: float = 0.0
    segment: int = 0
    context: int = 0
    nccl: int = 0
    measured: int = 0

    @classmethod
    def of(cls, run: RunConfig, card: Card | None, ranks: int) -> "Overheads":
        """The overheads of a run, from this module's tables.

        For an unknown card, the largest figures of any NVIDIA card are used.
        """
        capability = card.capability if card else "9.0"
        return cls(
            workspaces=_workspaces(capability),
            fragmentation_share=FRAGMENTATION.value,
            segment=int(SEGMENT.value),
            context=int(_context(capability).value),
            nccl=sum(int(_nccl(size).value) for size in _groups(run, ranks)),
        )

    def fragmentation(self, peak: int) -> int:
        """Bytes that the allocator has reserved and cannot use at the peak."""
        return int((peak + self.workspaces) * self.fragmentation_share) + self.segment

    def reserved_bytes(self, peak: int) -> int:
        """Bytes that ``torch.cuda.max_memory_reserved`` gives at this peak."""
        return peak + self.workspaces + self.fragmentation(peak)

    def total_bytes(self, peak: int, host: int = 0) -> int:  # noqa: ARG002 - ProcessOverheads counts it
        """Bytes that the driver counts for the process, and that must fit the card.

        ``host`` (offloaded bytes) is ignored.
        """
        return self.reserved_bytes(peak) + self.context + self.nccl

    def parts(self, peak: int) -> dict[str, int]:
        """The bytes of each part of the memory outside the step's tensors. These parts and the peak add up to the total."""
        return {
            "cuBLAS workspaces": self.workspaces,
            "fragmentation": self.fragmentation(peak),
            "CUDA context": self.context,
            "NCCL": self.nccl,
        }

    @property
    def reserved_parts(self) -> tuple[str, ...]:
        """The names of the parts that :meth:`reserved_bytes` counts besides the peak."""
        return "cuBLAS workspaces", "fragmentation"

    def corrected(self, *, fragmentation_share: float, outside: int, measured: int) -> "Overheads":
        """A copy with measured figures: the fragmentation share, and ``outside``, the bytes beyond the reserved memory."""
        nccl = min(self.nccl, outside)
        share, context = fragmentation_share, outside - nccl
        return replace(self, fragmentation_share=share, context=context, nccl=nccl, measured=measured)


def _workspaces(capability: str) -> int:
    if capability.startswith("gfx"):
        one = CUBLAS_WORKSPACE.get(capability, CUBLAS_WORKSPACE["amd"])
        return int(WORKSPACES.value * one.value + HIPBLASLT_WORKSPACE.value)
    kind = "hopper and later" if float(capability) >= 9 else "nvidia"
    return int(WORKSPACES.value * CUBLAS_WORKSPACE[kind].value)


def _context(capability: str) -> Figure:
    if capability.startswith("gfx"):
        return CONTEXT["gfx"]
    return CONTEXT[str(min(9, int(float(capability))))]


def _groups(run: RunConfig, ranks: int) -> list[int]:
    """The numbers of ranks of the communicators that a rank has: all ranks; its replica's, its shard's, its second copy's."""
    if run.parallel.spec.one_process:
        return []
    mesh = run.parallel.mesh(ranks)
    inner = [mesh.shards, mesh.replicas] if min(mesh.shards, mesh.replicas) > 1 else []
    return [ranks, *inner, *([mesh.copy_over] if mesh.copy_over else [])]


def _nccl(ranks: int) -> Figure:
    return next((figure for most, figure in NCCL.items() if ranks <= most), NCCL_OF_MORE)
