"""Which launcher began a run: its restart resumes the run that ``--fresh`` began, and begins no new one.

torchrun restarts all ranks after a failure, with the same command; Slurm may requeue a job. With ``--fresh`` each restart
would begin a new run. So a run's folder names the launcher that began it, and the launcher's later starts find it.
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
"""A file in a run's folder that names the launcher whose start went back with ``--resume_step``, and the step."""

NAMELESS = {"", "none"}
"""torchrun's ids of jobs without ``--rdzv-id``: they do not identify a job."""


def launch_marks(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """What identifies this start's launcher; empty without one.

    Returns:
        ``agent``: torchrun's process on this machine, which outlives the ranks that it restarts; ``torchrun``: the id of its
        job; ``slurm``: the id of the Slurm job.
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
    """The run that an earlier start of this launcher began, by its folder's name; None where there is none.

    torchrun's process runs one job, so what it began is this job's. The id of a job may be used for another one, so it counts
    only where the launcher reports that this start is a restart.

    Args:
        root: the folder of all runs.
        name: the run's; ``--fresh`` may have made ``NAME-2``, ``NAME-3`` … of it.
        environment: variables; None: those of this process.
    """
    marks = _earlier_marks(environment)
    for folder in reversed(runs_named(root, name)):
        recorded = _read(folder / STARTED_BY)
        if any(recorded.get(kind) == mark for kind, mark in marks.items()):
            return folder.name
    return None


def went_back_before(folder: Path, step: int, environment: Mapping[str, str] | None = None) -> bool:
    """Whether an earlier start of this launcher went back to that step: its restart resumes from the newest checkpoint."""
    recorded, marks = _read(folder / WENT_BACK), _earlier_marks(environment)
    return recorded.get("step") == str(step) and any(recorded.get(kind) == mark for kind, mark in marks.items())


def note_going_back(folder: Path, step: int) -> None:
    """Record for the restarts of this launcher that its first start went back to a step.

    Raises:
        OSError: the folder cannot be written.
    """
    write_whole(folder / WENT_BACK, json.dumps({**launch_marks(), "step": str(step)}))


def _earlier_marks(environment: Mapping[str, str] | None) -> dict[str, str]:
    """The marks that an earlier start of this launcher would have."""
    known = os.environ if environment is None else environment
    marks = launch_marks(known)
    if known.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        marks.pop("torchrun", None)
    if known.get("SLURM_RESTART_COUNT", "0") == "0":
        marks.pop("slurm", None)
    return marks


def runs_named(root: Path, name: str) -> list[Path]:
    """The folder of a name, and those that ``--fresh`` put beside it, in the order of their numbers."""
    pattern = re.compile(re.escape(name) + r"(?:-([0-9]{1,15}))?")
    found = [(int(match[1] or 1), path) for path in root.glob(f"{name}*") if (match := pattern.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _process(pid: int) -> str:
    """What identifies a process for all time; empty where it has ended."""
    birth = birth_of(pid)
    return "" if birth is None else f"{socket.gethostname()} {pid} {birth}"


def _read(path: Path) -> dict[str, str]:
    try:
        return read_object(path)
    except (OSError, InputError):
        return {}
