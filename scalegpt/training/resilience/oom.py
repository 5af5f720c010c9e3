"""Out of memory on a rank: recognised, reported with settings that would fit, and kept for the run's next start.

The process cannot continue: after a failed allocation in the middle of a sharded forward or backward pass the ranks
disagree on what is gathered. So all ranks end, and ``--on_oom shrink`` leaves a note in the run's directory. The next
start, by the launcher or the user, then takes half the micro batch and twice the gradient accumulation.
"""

import json
from dataclasses import replace
from typing import Any

import torch

from scalegpt.config import RunConfig
from scalegpt.errors import InputError
from scalegpt.planner.batches import divisors, sequences_per_rank
from scalegpt.planner.plan import Plan
from scalegpt.planner.search.advice import differences, lighter
from scalegpt.planner.time import calibration
from scalegpt.structured import read_object
from scalegpt.text import shown
from scalegpt.training.runs.directory import RunDirectory
from scalegpt.training.runs.files import write_whole, writing
from scalegpt.units import gib

RECORD = "out_of_memory.json"
"""In the run's directory: the micro batch that was too large, on how many ranks of which device, and the one to use."""

_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "cublas_status_alloc_failed")
"""Texts of errors without a class: the CPU's allocator, cuBLAS, the CUDA runtime."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is a lack of GPU or host memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


def smaller_micro_batch(plan: Plan) -> int | None:
    """A micro batch of at most half the size that divides the step; None where it is one sequence."""
    half = plan.batch.micro_batch // 2
    fitting = [size for size in divisors(plan.batch.micro_batch * plan.batch.grad_accum) if size <= half]
    return max(fitting) if fitting else None


def advice(plan: Plan) -> str:
    """What to change after a plan ran out of memory, each with its predicted peak."""
    found = lighter(plan, calibration.load())
    if not found:
        return "no smaller layout is left on this machine: use more GPUs, --offload, or a smaller model"
    options = [f"{differences(plan, other)} ({gib(other.peak_bytes)})" for other in found]
    return f"predicted peak {gib(plan.peak_bytes)}; use {', or '.join(options)}"


def remember(directory: RunDirectory, plan: Plan, device: str) -> str:
    """Write the note for the next start; the line to report.

    Raises:
        RunError: it cannot be written.
    """
    smaller = smaller_micro_batch(plan)
    if smaller is None:
        return "on_oom shrink cannot reduce memory further: the micro batch is already one sequence"
    note = {"micro_batch": smaller, "too_large": plan.batch.micro_batch, "ranks": plan.batch.ranks, "device": device}
    with writing(directory.path / RECORD):
        write_whole(directory.path / RECORD, json.dumps(note, indent=1))
    return f"on_oom shrink: the next start takes micro batch {smaller}, and the same tokens per step"


def shrunk(run: RunConfig, directory: RunDirectory, *, ranks: int, device: str) -> tuple[RunConfig, str] | None:
    """The run with the micro batch of the note, and why; None where the note is missing or does not apply.

    It applies to the same number of ranks of the same device, and to larger micro batches.
    """
    note = _read(directory)
    if (note.get("ranks"), note.get("device")) != (ranks, device):
        return None
    limit = note.get("micro_batch")
    if type(limit) is not int or limit < 1 or run.train.micro_batch <= limit:
        return None
    micro = max(size for size in divisors(sequences_per_rank(run, ranks)) if size <= limit)
    line = (
        f"micro batch {micro}: the run was out of memory with {shown(note.get('too_large'))}; "
        f"delete {directory.path / RECORD} to try that again"
    )
    return replace(run, train=run.train.changed(micro_batch=micro)), line


def _read(directory: RunDirectory) -> dict[str, Any]:
    try:
        return read_object(directory.path / RECORD)
    except (OSError, InputError):
        return {}
