"""Which start of a launcher a run was begun by: a restart goes on with what ``--fresh`` began, and begins nothing new.

torchrun starts all ranks again after a failure, with the same command; Slurm may put a job into the queue again. With
``--fresh`` each of these would begin one more run at step 0. So a run's folder says what began it, and later starts find it.
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
"""A file in a run's folder that says which launcher's start went back with ``--resume_step``, and to which step."""

NAMELESS = {"", "none"}
"""What torchrun calls a job that was given no ``--rdzv-id``, where it makes none up: the name of many."""


def launch_marks(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """What tells this start's launcher from others; empty without one.

    Returns:
        ``agent``: torchrun's process on this machine, which outlives the ranks that it starts again; ``torchrun``: its job's
        id; ``slurm``: that of the job.
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
    """The run of a name that an earlier start of this launcher began; None where this is the first, or it began none.

    torchrun's own process begins one job in its life: what it began is ours. A job's id may be used again for another, so it
    counts only where the launcher says that this start is not its first.

    Args:
        root: the folder of all runs.
        name: the run's; those beside it, which ``--fresh`` made, are ``NAME-2``, ``NAME-3`` …
        environment: that of the process, where it is not this one's.
    """
    marks = _earlier_marks(environment)
    for folder in reversed(runs_named(root, name)):
        theirs = _read(folder / STARTED_BY)
        if any(theirs.get(kind) == mark for kind, mark in marks.items()):
            return folder.name
    return None


def went_back_before(folder: Path, step: int, environment: Mapping[str, str] | None = None) -> bool:
    """Whether an earlier start of this launcher went back to that step: its restart resumes from the newest checkpoint.

    Args:
        folder: the run's.
        step: of ``--resume_step``.
        environment: that of the process, where it is not this one's.
    """
    theirs, marks = _read(folder / WENT_BACK), _earlier_marks(environment)
    return theirs.get("step") == str(step) and any(theirs.get(kind) == mark for kind, mark in marks.items())


def note_going_back(folder: Path, step: int) -> None:
    """Leave word for the restarts of this launcher that its first start went back to a step.

    Raises:
        OSError: the folder cannot be written.
    """
    write_whole(folder / WENT_BACK, json.dumps({**launch_marks(), "step": str(step)}))


def _earlier_marks(environment: Mapping[str, str] | None) -> dict[str, str]:
    """The marks by which an earlier start of this launcher would be known."""
    known = os.environ if environment is None else environment
    marks = launch_marks(known)
    if known.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        marks.pop("torchrun", None)
    if known.get("SLURM_RESTART_COUNT", "0") == "0":
        marks.pop("slurm", None)
    return marks


def runs_named(root: Path, name: str) -> list[Path]:
    """The folders of a name and of those that ``--fresh`` put beside it, in the order of their numbers."""
    pattern = re.compile(re.escape(name) + r"(?:-([0-9]{1,15}))?")
    found = [(int(match[1] or 1), path) for path in root.glob(f"{name}*") if (match := pattern.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _process(pid: int) -> str:
    """A process as no other one can be called; empty where it has gone."""
    birth = birth_of(pid)
    return "" if birth is None else f"{socket.gethostname()} {pid} {birth}"


def _read(path: Path) -> dict[str, str]:
    try:
        return read_object(path)
    except (OSError, InputError):
        return {}
