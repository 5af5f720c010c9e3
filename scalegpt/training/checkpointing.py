"""When a run's checkpoints are due, what its ranks tell each other of them, and what is said about them."""

import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from scalegpt.checkpoint.manifest import Header
from scalegpt.checkpoint.saver import Evaluation, Keeping, Saver, SpoiledError
from scalegpt.checkpoint.store import checkpoint_name, find_checkpoints, step_of
from scalegpt.errors import RunError
from scalegpt.training.job import Job
from scalegpt.training.metrics import Stopwatch
from scalegpt.training.runs.history import SkippedStep
from scalegpt.training.runs.resume import way_back
from scalegpt.training.schedules import is_due

SECONDS_TO_FINISH_A_SAVE = 60.0
"""How long a run that ends by an error waits for the checkpoint that is being written."""


class Saving:
    """A run's checkpoints on their way.

    Args:
        job: the run.
        clock: the loop's; what time-based saving counts by.

    Attributes:
        saver: writes them.
        saved_step: that of the newest checkpoint of this process, complete or under way; None: there is none.
    """

    def __init__(self, job: Job, clock: Stopwatch) -> None:
        self.job, self.train, self.clock = job, job.run.train, clock
        keeping = Keeping(self.train.keep_checkpoints, self.train.keep_best)
        self.saver = Saver(job.backend, job.directory.checkpoints, keeping, asynchronous=self.train.async_checkpoint)
        self.saved_step: int | None = None
        self._is_due = False
        self._is_put_off = False
        self._told: set[str] = set()
        self._last = clock.total
        if job.resumed and job.world.is_first:
            self.saver.resumed_from(job.directory.checkpoints / checkpoint_name(job.progress.step))

    def prepare(self, steps_left: int) -> None:
        """Make room for the first copy, where a checkpoint is due before the last of the steps that are left."""
        if self.train.checkpoint_minutes is not None or 0 < self.train.checkpoint_every < steps_left:
            self.saver.prepare()

    def flags(self) -> list[float]:
        """What this rank tells the others with each step: 1 if its part of a save has failed; 1 if one is due by time."""
        minutes = self.train.checkpoint_minutes
        is_due = self.job.world.is_first and minutes is not None and self.clock.total - self._last >= 60 * minutes
        return [float(self.saver.failed), float(is_due)]

    def hear(self, failed: float, due: float) -> None:
        """Heed the sums of all ranks' :meth:`flags`.

        Raises:
            RunError: a checkpoint could not be written; on all ranks alike.
        """
        if failed:
            self.saver.raise_failure()
        self._is_due = due > 0
        self._tell()

    def wanted(self, step: int) -> bool:
        """Whether a checkpoint is due after a step: by its number, by the clock, or since one was put off."""
        return self._is_put_off or self._is_due or is_due(step, self.train.checkpoint_every)

    def put_off(self, step: int, reason: str) -> None:
        """Do not save after a step that was skipped: what made it bad may be in the weights. The next good step saves."""
        if not self._is_put_off:
            self.job.logger.say(
                f"warning: no checkpoint is written after step {step}, which was skipped ({reason}); "
                "one is due after the next step that is not"
            )
        self._is_put_off = True

    def confirm(self, step: int) -> None:
        """Learn that the weights after a step have proven good: now older checkpoints may be deleted.

        Raises:
            RunError: their folder cannot be read.
        """
        self.saver.confirm(step)
        self._tell()

    def amend(self, evaluation: Evaluation) -> None:
        """Let the checkpoint of a step know its held-out loss, which was found after it was written.

        Raises:
            RunError: it cannot be written.
        """
        if self.job.world.is_first:
            self.saver.amend(evaluation)

    def went_back(self, checkpoint: Path) -> None:
        """Start from an earlier checkpoint of this run."""
        self._is_due = self._is_put_off = False
        self.saved_step = None
        if self.job.world.is_first:
            self.saver.resumed_from(checkpoint)

    def way_back(self, first_skipped: int) -> str:
        """Where to resume from after steps that were skipped, in words; all ranks call it together.

        A save under way is waited for: it may be of the very step that ruined the weights.

        Raises:
            RunError: it failed.
        """
        job = self.job
        self.finish()
        self._tell()
        return job.world.on_first(
            lambda: way_back(find_checkpoints(job.directory.checkpoints), first_skipped, job.again)
        )

    def may_save_after(self, row: list[SkippedStep], val_loss: float | None, *, evaluated: bool) -> bool:
        """Whether a run whose last steps were skipped may save at its end: its held-out loss shows that the weights are good.

        Args:
            row: the steps.
            val_loss: of the last evaluation.
            evaluated: whether that came after them; where a signal ends the run it did not.

        Raises:
            RunError: it shows that they are not.
        """
        if evaluated and val_loss is not None and math.isfinite(val_loss):
            return True
        skipped = f"no checkpoint is written after step {row[-1].step}, which was skipped ({row[-1].reason})"
        if evaluated:
            raise RunError(f"{skipped}: the held-out loss is not finite either; {self.way_back(row[0].step)}")
        self.job.logger.say(f"warning: {skipped}")
        return False

    def save(self, header: Header, *, last: bool) -> None:
        """Save the state as it is now; the last time, wait until it is written. All ranks call it together.

        Raises:
            RunError: an earlier save failed, or this one; or the state is not finite.
        """
        told, step = self.saver.lacks_memory, header.progress.step
        try:
            self.saver.save(header, wait=last)
        except SpoiledError as error:
            raise RunError(f"{error}; {self.way_back(step + 1)}") from error
        self.saved_step = step
        self._is_put_off = False
        if self.saver.lacks_memory and not told:
            self.job.logger.say(
                "warning: host memory has no room for a copy of the state: training waits for checkpoints"
            )
        self._last = self.clock.total
        self._tell()

    def finish(self) -> None:
        """Wait for the save under way; all ranks call it together.

        Raises:
            RunError: it failed.
        """
        self.saver.finish()

    def leave(self, gone: Callable[[int], bool]) -> None:
        """End by an error, without the other ranks: wait for the checkpoint that is being written, and tell of it.

        Args:
            gone: whether a rank has ended, so that no part of it is waited for.
        """
        self.saver.close(SECONDS_TO_FINISH_A_SAVE, gone)
        with suppress(RunError):  # what ended the run is the error to tell
            self._tell()

    def _tell(self) -> None:
        """Say which checkpoints have become complete; the status knows of each from now on, so that it would be missed."""
        for path in self.saver.committed():
            self.job.directory.amend_status()
            self.job.logger.say(f"step {step_of(path)}  checkpoint {path}")
        for problem in self.saver.problems():
            if problem not in self._told:
                self._told.add(problem)
                self.job.logger.say(f"warning: {problem}; delete it yourself, or it takes up room")
