"""Out of memory on a rank: known as such, told with what would hold, and remembered by the run's next start.

The process cannot go on: after a failed allocation in the middle of a sharded forward or backward pass the ranks no longer
agree on what is gathered. So all end together, and ``--on_oom shrink`` leaves a note in the run's directory by which the next
start, be it the launcher's or the user's, takes half the micro batch and twice the accumulation.
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
"""In the run's directory: which micro batch was too much, on how many ranks of which device, and which one to use."""

_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "cublas_status_alloc_failed")
"""What the errors say that have no class of their own: the CPU's allocator, cuBLAS, the CUDA runtime."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory, of a GPU or of the host, is what lacked."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


def smaller_micro_batch(plan: Plan) -> int | None:
    """At most half the micro batch, dividing the step; None where it is one sequence already."""
    half = plan.batch.micro_batch // 2
    fitting = [size for size in divisors(plan.batch.micro_batch * plan.batch.grad_accum) if size <= half]
    return max(fitting) if fitting else None


def advice(plan: Plan) -> str:
    """What to change after a plan ran out of memory, with what the planner predicts for it."""
    found = lighter(plan, calibration.load())
    if not found:
        return "nothing smaller is left on this machine: use more GPUs, --offload, or a smaller model"
    options = [f"{differences(plan, other)} ({gib(other.peak_bytes)})" for other in found]
    return f"predicted peak {gib(plan.peak_bytes)}; use {', or '.join(options)}"


def remember(directory: RunDirectory, plan: Plan, device: str) -> str:
    """Leave the note for the next start; what to tell the user.

    Raises:
        RunError: it cannot be written.
    """
    smaller = smaller_micro_batch(plan)
    if smaller is None:
        return "on_oom shrink can do no more: the micro batch is one sequence"
    note = {"micro_batch": smaller, "too_large": plan.batch.micro_batch, "ranks": plan.batch.ranks, "device": device}
    with writing(directory.path / RECORD):
        write_whole(directory.path / RECORD, json.dumps(note, indent=1))
    return f"on_oom shrink: the next start goes on with micro batch {smaller}, and the same tokens per step"


def shrunk(run: RunConfig, directory: RunDirectory, *, ranks: int, device: str) -> tuple[RunConfig, str] | None:
    """The run as an earlier lack of memory on as many ranks of the same device demands it, and why.

    Returns:
        None where there was none, or the micro batch is small enough already.
    """
    note = _read(directory)
    if (note.get("ranks"), note.get("device")) != (ranks, device):
        return None
    limit = note.get("micro_batch")
    if type(limit) is not int or limit < 1 or run.train.micro_batch <= limit:
        return None
    micro = max(size for size in divisors(sequences_per_rank(run, ranks)) if size <= limit)
    said = (
        f"micro batch {micro}: the run was out of memory with {shown(note.get('too_large'))}; "
        f"delete {directory.path / RECORD} to try that again"
    )
    return replace(run, train=run.train.changed(micro_batch=micro)), said


def _read(directory: RunDirectory) -> dict[str, Any]:
    try:
        return read_object(directory.path / RECORD)
    except (OSError, InputError):
        return {}
