"""The host memory of a process that trains on a CPU, beyond the step's own tensors.

A process that runs out of host memory takes the machine down, so everything that it holds counts: the predicted peak,
freed memory that it keeps (:mod:`scalegpt.backends.host_memory`), the libraries, the buffers of collectives, and the
copy from which a checkpoint is written. The figures are fitted to ``VmHWM``, the largest resident memory that the Linux
kernel reports, in the runs of ``python benchmarks/cpu_memory.py``. docs/MEMORY.md compares prediction and measurement.
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
"""Backend → bytes of a process that trains a tiny model: Python, torch and the backend's libraries."""

BUFFERS = {
    PLAIN.name: {0: Figure(0.0, "there are no collectives")},
    FSDP.name: {0: Figure(1.9, _MEASURED), 2: Figure(2.2, _MEASURED), 3: Figure(5.3, _MEASURED)},
    DEEPSPEED.name: {
        0: Figure(1.2, _MEASURED), 1: Figure(1.6, _MEASURED), 2: Figure(0.8, _MEASURED), 3: Figure(5.0, _MEASURED)
    },
}  # fmt: skip
"""Backend → stage → memory of collectives over several ranks, as a multiple of the model's bytes in the compute dtype.

It is the memory of gathered weights, of gradients on their way, and of gloo's copies of both. A CPU frees them later
than a GPU does."""

KEPT = Figure(0.25, _MEASURED)
"""Bytes beyond the peak in a process that keeps freed memory, as a share of the peak: free blocks that fit no later
tensor.
"""

KEPT_OF_LOGITS = {"fp32": Figure(0.6, _MEASURED), "bf16": Figure(0.35, _MEASURED)}
"""Dtype → the share to add to :data:`KEPT` for a peak that consists of the full loss's logits alone, which are few
large blocks.
"""

GIVEN_BACK = Figure(0.06, _MEASURED)
"""Bytes beyond the peak in a process that returns large free blocks to the system, as a share of the peak."""


@dataclass(frozen=True, kw_only=True)
class ProcessOverheads(Overheads):
    """The memory of a process on a CPU beyond the peak of the step's tensors, in bytes.

    ``fragmentation_share`` is the freed memory that the process keeps, as a share of this peak.

    Attributes:
        libraries: Python, torch and the backend's libraries.
        copy: the copy of fp32 weights and moments from which a checkpoint is written.
        buffers: the buffers of collectives.
    """

    libraries: int = 0
    copy: int = 0
    buffers: int = 0

    @classmethod
    def of_process(cls, run: RunConfig, ranks: int, *, keeps_freed_memory: bool) -> "ProcessOverheads":
        """The overheads of one rank of a run, from the measurements in this module.

        Args:
            run: a run whose precision is known.
            ranks: data-parallel ranks W.
            keeps_freed_memory: whether the process keeps freed memory instead of returning it to the system.
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
        """The largest resident memory of the process in bytes, including ``host``, the bytes of offloaded states."""
        return self.reserved_bytes(peak) + self.libraries + self.copy + self.buffers + host

    @property
    def reserved_parts(self) -> tuple[str, ...]:
        """The names of the parts that :meth:`reserved_bytes` counts besides the peak."""
        return ("freed memory",)

    def parts(self, peak: int) -> dict[str, int]:
        """The bytes of each part of host memory.

        Together with the step's peak and the offloaded states they give the total.
        """
        return {
            "freed memory": self.fragmentation(peak),
            "copy for a checkpoint": self.copy,
            "buffers of collectives": self.buffers,
            "libraries": self.libraries,
        }


def checkpoint_copy_bytes(run: RunConfig, ranks: int) -> int:
    """Bytes of each rank's copy from which a checkpoint is written while training continues; 0 if no copy is made.

    The copy holds the rank's part of fp32 weights and moments. The last checkpoint needs no copy, since training is over.
    """
    train = run.train
    tokens = train.tokens_per_step or train.micro_batch * ranks * run.model.block_size
    is_due = train.checkpoint_minutes is not None or 0 < train.checkpoint_every < total_steps(train, tokens)
    if not train.async_checkpoint or not is_due:
        return 0
    states = training_bytes(run.model, train)
    return -(-(sum(states.values()) - states["gradients"]) // ranks)


def _kept_share(run: RunConfig) -> float:
    """Freed memory that the process keeps, as a share of the peak. It grows with the share of logits in the peak."""
    model, train = run.model, run.train
    if train.loss != "full":
        return KEPT.value
    logits = 16 * train.micro_batch * model.block_size * model.vocab_size
    share = logits / (logits + kept_by_blocks(run, attention_kernel(run)))
    return KEPT.value + share * KEPT_OF_LOGITS["fp32" if train.precision == "fp32" else "bf16"].value
