"""What a process that trains on a processor holds beyond the step's own tensors.

There the memory is the host's, and lack of it takes the machine down. So all that a process holds counts: the ledger's peak,
the freed memory that it keeps (:mod:`scalegpt.backends.host_memory`), the libraries, and the copy that a checkpoint is
written from. Measured by ``python benchmarks/cpu_memory.py`` as the kernel's ``VmHWM``; docs/MEMORY.md has the comparison.
"""

from dataclasses import dataclass

from scalegpt.architecture.counting import count_parameters
from scalegpt.config import RunConfig
from scalegpt.config.backends import DEEPSPEED, FSDP, PLAIN
from scalegpt.planner.attention import attention_kernel
from scalegpt.planner.length import total_steps
from scalegpt.planner.memory.overheads import MIB, Figure, Overheads
from scalegpt.planner.memory.programs import kept_by_blocks
from scalegpt.planner.memory.states import training_bytes
from scalegpt.units import BYTES

_MEASURED = "python benchmarks/cpu_memory.py, torch 2.13 on Linux with glibc"

LIBRARIES = {
    PLAIN.name: Figure(360 * MIB, _MEASURED),
    FSDP.name: Figure(360 * MIB, _MEASURED),
    DEEPSPEED.name: Figure(430 * MIB, _MEASURED),
}
"""Bytes of a process that trains next to nothing: Python, torch and the backend's libraries."""

BUFFERS = {
    PLAIN.name: {0: Figure(0.0, "there are no collectives")},
    FSDP.name: {0: Figure(1.9, _MEASURED), 2: Figure(2.2, _MEASURED), 3: Figure(5.3, _MEASURED)},
    DEEPSPEED.name: {
        0: Figure(1.2, _MEASURED), 1: Figure(1.6, _MEASURED), 2: Figure(0.8, _MEASURED), 3: Figure(5.0, _MEASURED)
    },
}  # fmt: skip
"""What collectives over several ranks hold by backend and stage, in times of the whole model in the compute dtype: gathered
weights and gradients on their way, which a CPU frees later than the ledger's GPU does, and gloo's copies of them."""

KEPT = Figure(0.25, _MEASURED)
"""Share of the peak that a process holds on top where it keeps freed memory: free blocks that no later tensor fits."""

KEPT_OF_LOGITS = {"fp32": Figure(0.6, _MEASURED), "bf16": Figure(0.35, _MEASURED)}
"""The same on top of :data:`KEPT`, by dtype, of a peak that consists of the full loss's logits: few large blocks."""

GIVEN_BACK = Figure(0.06, _MEASURED)
"""Share of the peak where the process gives large blocks back as soon as they are free."""


@dataclass(frozen=True, kw_only=True)
class ProcessOverheads(Overheads):
    """The parts of a process on a CPU, in bytes; ``fragmentation_share`` is what freed memory adds to the peak.

    Attributes:
        libraries: what is loaded before anything is trained.
        copy: the copy that a checkpoint is written from.
        buffers: what collectives hold.
    """

    libraries: int = 0
    copy: int = 0
    buffers: int = 0

    @classmethod
    def of_process(cls, run: RunConfig, ranks: int, *, keeps_freed_memory: bool) -> "ProcessOverheads":
        """What was measured for runs like this one.

        Args:
            run: the run, its precision known.
            ranks: data-parallel ranks W.
            keeps_freed_memory: whether the process keeps what it frees.
        """
        backend, stage = run.parallel.backend, run.parallel.stage
        whole = BYTES[run.train.precision] * count_parameters(run.model).total
        return cls(
            fragmentation_share=_kept_share(run) if keeps_freed_memory else GIVEN_BACK.value,
            libraries=int(LIBRARIES[backend].value),
            copy=checkpoint_copy_bytes(run, ranks),
            buffers=int(BUFFERS[backend][stage].value * whole) if ranks > 1 else 0,
        )

    def total_bytes(self, peak: int, host: int = 0) -> int:
        """What the kernel will count for the process at its fullest; what is offloaded lies in the same memory."""
        return self.reserved_bytes(peak) + self.libraries + self.copy + self.buffers + host

    @property
    def reserved_parts(self) -> tuple[str, ...]:
        """See :attr:`Overheads.reserved_parts`."""
        return ("freed memory",)

    def parts(self, peak: int) -> dict[str, int]:
        """The parts by name; with the peak, and with what is offloaded, they add up to the total."""
        return {
            "freed memory": self.fragmentation(peak),
            "copy for a checkpoint": self.copy,
            "buffers of collectives": self.buffers,
            "libraries": self.libraries,
        }


def checkpoint_copy_bytes(run: RunConfig, ranks: int) -> int:
    """Host memory of each rank for the copy from which a checkpoint is written while training continues; 0 without one.

    Masters and moments, each rank its part. The last checkpoint needs no copy: nothing is trained meanwhile.
    """
    train = run.train
    tokens = train.tokens_per_step or train.micro_batch * ranks * run.model.block_size
    is_due = train.checkpoint_minutes is not None or 0 < train.checkpoint_every < total_steps(train, tokens)
    if not train.async_checkpoint or not is_due:
        return 0
    states = training_bytes(run.model, train)
    return -(-(sum(states.values()) - states["gradients"]) // ranks)


def _kept_share(run: RunConfig) -> float:
    """The share of the peak that kept memory adds; larger, the more of the peak are logits."""
    model, train = run.model, run.train
    if train.loss != "full":
        return KEPT.value
    logits = 16 * train.micro_batch * model.block_size * model.vocab_size
    share = logits / (logits + kept_by_blocks(run, attention_kernel(run)))
    return KEPT.value + share * KEPT_OF_LOGITS["fp32" if train.precision == "fp32" else "bf16"].value
