"""What the folder of a run needs before the first step of a process: what others left goes, what is new is written."""

from typing import Any

from scalegpt.checkpoint import store
from scalegpt.config import RunConfig
from scalegpt.data.ledger import Stretch
from scalegpt.storage import remove_temporaries
from scalegpt.training.runs.directory import RunDirectory
from scalegpt.training.runs.files import writing
from scalegpt.training.runs.history import History
from scalegpt.training.runs.launch_marks import launch_marks, note_going_back
from scalegpt.training.runs.resume import Found


def write_directory(
    directory: RunDirectory,
    run: RunConfig,
    plan: dict[str, Any],
    stretch: Stretch,
    found: Found,
    history: History,
    resume_step: int | None,
) -> None:
    """Write what a run that goes on begins with; a finished one keeps its own. First rank only, which has the lock."""
    step = stretch.first_step - 1
    with writing(directory.path):
        remove_temporaries(directory.path)
        store.remove_leftovers(directory.checkpoints)  # what it cannot delete is told with the next pruning
        store.remove_amendments(directory.checkpoints)
        for path in store.named_as_checkpoints(directory.checkpoints):
            if store.step_of(path) > step:  # that step will be saved again
                store.set_aside(path, store.REPLACED if path in found.replaced else store.DAMAGED)
        if resume_step is not None:
            note_going_back(directory.path, resume_step)
    if step >= plan["steps"] > 0 and directory.config.is_file():
        return
    directory.create(run, plan, launch_marks())
    directory.forget_after(history)
    with writing(directory.ledger.path):
        directory.ledger.append(stretch)
