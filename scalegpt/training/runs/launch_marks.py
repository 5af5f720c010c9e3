"""Marks that identify the launcher that began a run. With them, a restart of a ``--fresh`` command resumes that run.

torchrun restarts all ranks after a failure, with the same command. Slurm may requeue a job. With ``--fresh``, each
restart would begin another new run. To prevent this, each run's folder holds marks of the launcher that began the run,
and the launcher's restarts find the folder by these marks.
"""

import json
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path

from scalegpt.errors import InputError
from scalegpt.structured import read_object
from scalegpt.system.launchers import starter
from scalegpt.system.processes import birth_of
from scalegpt.training.runs.directory import STARTED_BY
from scalegpt.training.runs.files import write_whole

WENT_BACK = ".went_back"
"""Name of the file about a start with ``--resume_step``: it holds the step, and the marks of the launcher."""

NAMELESS = {"", "none"}
"""The job ids that torchrun uses without ``--rdzv-id``. They do not identify a job."""


def launch_marks(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the marks that identify the launcher of this process; empty without a launcher.

    Args:
        environment: environment variables; None: those of this process.

    Returns:
        ``agent``: torchrun's process on this machine, which outlives the ranks that it restarts. ``torchrun``: the id of
        torchrun's job. ``slurm``: the id of the Slurm job. Only those that apply are there.
    """
    known = os.environ if environment is None else environment
    marks = {}
    if "TORCHELASTIC_RUN_ID" in known:
        marks["agent"] = _process(starter().pid)
        if known["TORCHELASTIC_RUN_ID"] not in NAMELESS:
            marks["torchrun"] = known["TORCHELASTIC_RUN_ID"]
    if "SLURM_JOB_ID" in known:
        marks["slurm"] = known["SLURM_JOB_ID"]
    return {name: mark for name, mark in marks.items() if mark}


def begun_before(root: Path, name: str, environment: Mapping[str, str] | None = None) -> str | None:
    """Return the folder name of the run that an earlier start by this launcher began; None where there is none.

    A torchrun process runs only one job, so a run with the mark ``agent`` belongs to this job. Another job may reuse a job's
    id, so the marks ``torchrun`` and ``slurm`` count only where the launcher reports that this start is a restart.

    Args:
        root: the folder of all runs.
        name: the run's name in the command; ``--fresh`` may have turned it into ``NAME-2``, ``NAME-3`` …
        environment: environment variables; None: those of this process.
    """
    marks = _earlier_marks(environment)
    for folder in reversed(runs_named(root, name)):
        recorded = _read(folder / STARTED_BY)
        if any(recorded.get(kind) == mark for kind, mark in marks.items()):
            return folder.name
    return None


def went_back_before(folder: Path, step: int, environment: Mapping[str, str] | None = None) -> bool:
    """Whether an earlier start by this launcher went back to this step.

    A restart then resumes from the newest checkpoint.
    """
    recorded, marks = _read(folder / WENT_BACK), _earlier_marks(environment)
    return recorded.get("step") == str(step) and any(recorded.get(kind) == mark for kind, mark in marks.items())


def note_going_back(folder: Path, step: int) -> None:
    """Record that this launcher's start has gone back to a step, so that its restarts do not go back again.

    Raises:
        OSError: the folder cannot be written.
    """
    write_whole(folder / WENT_BACK, json.dumps({**launch_marks(), "step": str(step)}))


def _earlier_marks(environment: Mapping[str, str] | None) -> dict[str, str]:
    """The launch marks (see :func:`launch_marks`) that an earlier start of the run by the same launcher has left.

    A job's id is one of them only if its launcher says that this start is a restart.
    """
    known = os.environ if environment is None else environment
    marks = launch_marks(known)
    if known.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        marks.pop("torchrun", None)
    if known.get("SLURM_RESTART_COUNT", "0") == "0":
        marks.pop("slurm", None)
    return marks


def runs_named(root: Path, name: str) -> list[Path]:
    """List the run folders NAME, NAME-2, NAME-3 … that exist, in the order of their numbers."""
    pattern = re.compile(re.escape(name) + r"(?:-([0-9]{1,15}))?")
    found = [(int(match[1] or 1), path) for path in root.glob(f"{name}*") if (match := pattern.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _process(pid: int) -> str:
    """Identify a process by machine, number and start time, a triple that is never reused; empty where it has ended."""
    birth = birth_of(pid)
    return "" if birth is None else f"{socket.gethostname()} {pid} {birth}"


def _read(path: Path) -> dict[str, str]:
    try:
        return read_object(path)
    except (OSError, InputError):
        return {}
