"""Handles an out-of-memory error: recognises it, suggests settings that fit, and leaves a note for the next start.

The run cannot continue: after a failed allocation in a sharded forward or backward pass, the ranks no longer agree on
which parameters are gathered. All ranks therefore end. With ``--on_oom shrink`` they leave a note in the run's
directory. The next start, by the launcher or the user, then takes at most half the micro batch, and more gradient
accumulation.
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
"""Name of the note in the run's directory. It holds the micro batch to use, the one that was too large, ranks and device."""

_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "cublas_status_alloc_failed")
"""Texts in out-of-memory errors that have no class of their own: from the CPU's allocator, cuBLAS and CUDA."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that GPU or host memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


def smaller_micro_batch(plan: Plan) -> int | None:
    """The largest micro batch that divides a rank's sequences per step and is at most half the plan's.

    None if the plan's is 1.
    """
    half = plan.batch.micro_batch // 2
    fitting = [size for size in divisors(plan.batch.micro_batch * plan.batch.grad_accum) if size <= half]
    return max(fitting) if fitting else None


def advice(plan: Plan) -> str:
    """A sentence on the settings to change after a run ran out of memory, with the predicted peak of each option."""
    found = lighter(plan, calibration.load())
    if not found:
        return "no smaller layout is left on this machine: use more GPUs, --offload, or a smaller model"
    options = [f"{differences(plan, other)} ({gib(other.peak_bytes)})" for other in found]
    return f"predicted peak {gib(plan.peak_bytes)}; use {', or '.join(options)}"


def remember(directory: RunDirectory, plan: Plan, device: str) -> str:
    """Write the note (:data:`RECORD`) that makes the run's next start take a smaller micro batch.

    Returns:
        The line to report.

    Raises:
        RunError: the note cannot be written.
    """
    smaller = smaller_micro_batch(plan)
    if smaller is None:
        return "on_oom shrink cannot reduce the memory further, since the micro batch is already one sequence"
    note = {"micro_batch": smaller, "too_large": plan.batch.micro_batch, "ranks": plan.batch.ranks, "device": device}
    with writing(directory.path / RECORD):
        write_whole(directory.path / RECORD, json.dumps(note, indent=1))
    return f"on_oom shrink: the next start takes micro batch {smaller}, and the same tokens per step"


def shrunk(run: RunConfig, directory: RunDirectory, *, ranks: int, device: str) -> tuple[RunConfig, str] | None:
    """Return the run with the micro batch that :func:`remember` noted, and a line that explains it; None: no note applies.

    The note applies to the same number of ranks of the same device, and only to a run with a larger micro batch.
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
