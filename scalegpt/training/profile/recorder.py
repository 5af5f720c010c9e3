"""Records steps with torch's profiler (``--profile A:B``): a trace for Chrome or Perfetto, and on CUDA a memory snapshot."""

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from scalegpt.config import TrainConfig
from scalegpt.errors import InputError
from scalegpt.storage import temporary_name
from scalegpt.text import brief
from scalegpt.training.job import Job
from scalegpt.training.profile.operators import operators, table

FOLDER = "profile"
"""The folder in a run's folder that holds the traces."""

_MOST_ALLOCATIONS = 1_000_000
"""The most allocations in the history of the memory snapshot."""


def check_profile(train: TrainConfig, total: int) -> None:
    """Refuse to profile steps that the run does not have.

    Raises:
        InputError: the run ends before the first step to record.
    """
    steps = train.profiled_steps
    if steps is not None and steps[0] > total > 0:
        raise InputError(f"profile {train.profile}: the run has {total:,} steps; give steps among them")


class Recorder:
    """Records the steps of ``--profile`` on this rank.

    If a resumed run has already taken some of the steps, it records the others and prints a line about it.

    Args:
        job: the run.
        step: number of steps taken.
    """

    def __init__(self, job: Job, step: int) -> None:
        train, self._job = job.run.train, job
        steps = train.profiled_steps if job.world.is_first or train.profile_ranks == "all" else None
        self._steps = steps and range(max(steps[0], step + 1), min(steps[1], job.total_steps) + 1)
        self._profile: Any = None
        self._began, self._first = 0.0, 0
        self._on_card = job.world.device.type == "cuda"
        if steps is not None and self._steps is not None and len(self._steps) < steps[1] - steps[0] + 1:
            kept = (
                f"steps {self._steps[0]:,} to {self._steps[-1]:,} are recorded" if self._steps else "none is recorded"
            )
            job.logger.say(
                f"profile  of steps {train.profile} {kept}: the other steps were taken before, or come after the run's end"
            )

    def before(self, step: int) -> None:
        """Begin to record, if the next step is the first to record."""
        if self._steps is None or self._profile is not None or step not in self._steps:
            return
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_card else [])]
        if self._on_card:
            torch.cuda.memory._record_memory_history(max_entries=_MOST_ALLOCATIONS)
            torch.cuda.synchronize(self._job.world.device)
        self._profile = profile(activities=activities)
        self._profile.start()
        self._first, self._began = step, time.perf_counter()

    def after(self, step: int, *, last: bool) -> None:
        """Write the recording, if the step just taken is the last to record or the run's last."""
        if self._profile is None or self._steps is None or not (last or step >= self._steps[-1]):
            return
        if self._on_card:
            torch.cuda.synchronize(self._job.world.device)
        seconds = (time.perf_counter() - self._began) / (step - self._first + 1)
        recorded, self._profile, steps, self._steps = self._profile, None, step - self._first + 1, None
        recorded.stop()
        folder = self._job.directory.path / FOLDER
        path = folder / f"steps_{self._first}_{step}_rank_{self._job.world.rank}.json"
        try:
            folder.mkdir(exist_ok=True)
            _write(path, lambda part: recorded.export_chrome_trace(str(part)))
            if self._on_card:
                dump: Any = torch.cuda.memory._dump_snapshot
                _write(path.with_suffix(".pickle"), lambda part: dump(str(part)))
        except (OSError, RuntimeError) as error:  # torch raises either; the run itself continues
            self._job.logger.say(f"warning: the profile was not written: {brief(error, 200)}")
        else:
            snapshot = f", and {path.with_suffix('.pickle').name} at pytorch.org/memory_viz" if self._on_card else ""
            self._job.logger.say(f"profile  {path}; open it at ui.perfetto.dev{snapshot}")
        self._stop_history()
        if self._job.world.is_first:
            predicted = self._job.plan.speed()["time"]
            self._job.logger.say(table(operators(recorded.events(), on_card=self._on_card), steps, seconds, predicted))

    def close(self) -> None:
        """Stop recording without writing anything, if the run ends by an error."""
        if self._profile is not None:
            with suppress(RuntimeError):  # the error that ends the run is the one to report
                self._profile.stop()
            self._profile = None
            self._stop_history()

    def _stop_history(self) -> None:
        if self._on_card:
            torch.cuda.memory._record_memory_history(enabled=None)


def _write(path: Path, write: Any) -> None:
    """Write a file under a temporary name, and rename it once it is whole."""
    part = temporary_name(path).with_suffix(path.suffix)
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
