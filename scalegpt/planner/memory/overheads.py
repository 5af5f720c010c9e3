"""What a GPU holds beyond the step's own tensors: workspaces, fragmentation, the CUDA context, NCCL.

Three sums of a run are told apart, each larger than the one before:

- the *peak* of the step's tensors, which :mod:`scalegpt.planner.memory.predict` knows exactly;
- what the caching allocator has *reserved*: the peak, cuBLAS's workspaces, and what fragmentation keeps it from using;
- the *total* that the driver counts for the process: what is reserved, the CUDA context with its kernels, NCCL's buffers.

None of the figures here has been measured on our own trainer yet. Those that a source gives are as good as the source; the
rest are estimates, marked so, and meant to err on the safe side. Measurements of real runs take their
place (:mod:`scalegpt.planner.time.calibration`).
"""

from dataclasses import dataclass, replace

from scalegpt.config import RunConfig
from scalegpt.hardware.gpus import Card

KIB, MIB = 2**10, 2**20


@dataclass(frozen=True)
class Figure:
    """A number with where it comes from; a source that begins with ~ makes it an estimate."""

    value: float
    source: str


_POOL = "pytorch, aten/src/ATen/cuda/CublasHandlePool.cpp: parseChosenWorkspaceSize"

CUBLAS_WORKSPACE = {
    "nvidia": Figure((2 * 4096 + 8 * 16) * KIB, _POOL),
    "hopper and later": Figure(32 * MIB, _POOL),
    "amd": Figure(32 * MIB, _POOL),
    "gfx942": Figure(128 * MIB, _POOL),
}
"""Bytes of one cuBLAS workspace. It lives in the caching allocator, so that ``memory_allocated`` counts it; the trace and the
planner's peak do not. cuBLASLt shares it in the releases of torch that we run on (``unified_cublas_and_lt_workspaces``
there); before, it had 1 MiB, 4 or 32 of its own, depending on the card."""

WORKSPACES = Figure(2, "the same file: one a handle and stream, and autograd's backward thread has its own handle")

HIPBLASLT_WORKSPACE = Figure(76 * MIB, "the same file, parseCUDABlasLtWorkspaceSize under ROCm")

CONTEXT = {
    "7": Figure(400 * MIB, "~300 to 400 MB with lazy loading, by torch's maintainers (pytorch issues 107667, 109888)"),
    "8": Figure(500 * MIB, "~426 MiB bare on an RTX 6000 Ada, torch 2.10 (unsloth-zoo pull 1053); kernels come on top"),
    "9": Figure(620 * MIB, "~the upper end of 0.3 to 0.65 GB"),
    "gfx": Figure(620 * MIB, "~as the largest of NVIDIA's"),
}
"""Bytes of the context and of the kernels that a run loads into it, by the first digit of the compute capability."""

NCCL = {
    1: Figure(100 * MIB, "~a communicator of one rank exchanges nothing, but its kernels are loaded"),
    2: Figure(544 * MIB, "2 of 4 A100 with NVLink, torch (NVIDIA/nccl issue 964)"),
    4: Figure(688 * MIB, "3 and 4 A100 with NVLink, torch (NVIDIA/nccl issue 964)"),
    8: Figure(1060 * MIB, "8 H100, before any all-to-all (NVIDIA/nccl issue 1685)"),
}
"""Bytes of one communicator, by the largest number of ranks that it holds for. Cards without NVLink use fewer channels and
so less, but no figure for them is known."""

NCCL_OF_MORE = Figure(1600 * 10**6, "one communicator, number of ranks not told (NVIDIA/nccl issue 864)")

FRAGMENTATION = Figure(0.04, "~share of the peak; steps that are all alike fragment little")

SEGMENT = Figure(
    20 * MIB, "c10/cuda/CUDACachingAllocator.h: kLargeBuffer, the segment that tensors of 1 to 10 MiB are packed in"
)
"""Bytes that the allocator may hold in a segment that is not full, whatever the peak."""


@dataclass(frozen=True, kw_only=True)
class Overheads:
    """The parts outside the step's tensors, in bytes; ``fragmentation_share`` is one of what is allocated.

    Attributes:
        measured: on how many runs like this one the parts rest; 0: on the tables above alone.
    """

    workspaces: int = 0
    fragmentation_share: float = 0.0
    segment: int = 0
    context: int = 0
    nccl: int = 0
    measured: int = 0

    @classmethod
    def of(cls, run: RunConfig, card: Card | None, ranks: int) -> "Overheads":
        """What the tables say; an unknown card counts as the most demanding of NVIDIA's."""
        capability = card.capability if card else "9.0"
        return cls(
            workspaces=_workspaces(capability),
            fragmentation_share=FRAGMENTATION.value,
            segment=int(SEGMENT.value),
            context=int(_context(capability).value),
            nccl=int(_nccl(ranks).value) if not run.parallel.spec.one_process else 0,
        )

    def fragmentation(self, peak: int) -> int:
        """Bytes that the allocator has reserved and cannot use at the peak."""
        return int((peak + self.workspaces) * self.fragmentation_share) + self.segment

    def reserved_bytes(self, peak: int) -> int:
        """What ``torch.cuda.max_memory_reserved`` will say for this peak."""
        return peak + self.workspaces + self.fragmentation(peak)

    def total_bytes(self, peak: int, host: int = 0) -> int:  # noqa: ARG002 - a processor's ranks count it
        """What the driver will say: it must stay under the card's memory. ``host`` bytes, offloaded, do not count here."""
        return self.reserved_bytes(peak) + self.context + self.nccl

    def parts(self, peak: int) -> dict[str, int]:
        """The parts by name; with the peak they add up to the total."""
        return {
            "cuBLAS workspaces": self.workspaces,
            "fragmentation": self.fragmentation(peak),
            "CUDA context": self.context,
            "NCCL": self.nccl,
        }

    @property
    def reserved_parts(self) -> tuple[str, ...]:
        """The parts that :meth:`reserved_bytes` counts beside the peak."""
        return "cuBLAS workspaces", "fragmentation"

    def corrected(self, *, fragmentation_share: float, outside: int, measured: int) -> "Overheads":
        """The same with what runs have shown: the allocator's waste, and the bytes beyond what it reserved."""
        nccl = min(self.nccl, outside)
        return replace(
            self,
            fragmentation_share=fragmentation_share,
            context=outside - nccl,
            nccl=nccl,
            measured=measured,
        )


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


def _nccl(ranks: int) -> Figure:
    return next((figure for most, figure in NCCL.items() if ranks <= most), NCCL_OF_MORE)
