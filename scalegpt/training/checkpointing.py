"""When a run's checkpoints are due, and what is reported about them."""

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
from scalegpt.training.runs.metrics_file import SkippedStep
from scalegpt.training.runs.resume import rollback_advice
from scalegpt.training.schedules import is_due

SECONDS_TO_FINISH_A_SAVE = 60.0
"""How long a run that ends by an error waits for the checkpoint that is being written."""


class Saving:
    """The checkpoints of a run.

    Attributes:
        saver: writes them.
        saved_step: that of this process's newest checkpoint, complete or being written; None: there is none.
    """

    def __init__(self, job: Job, clock: Stopwatch) -> None:
        self.job, self.train, self.clock = job, job.run.train, clock
        keeping = Keeping(self.train.keep_checkpoints, self.train.keep_best)
        self.saver = Saver(job.backend, job.directory.checkpoints, keeping, asynchronous=self.train.async_checkpoint)
        self.saved_step: int | None = None
        self._is_due = False
        self._is_postponed = False
        self._reported: set[str] = set()
        self._last = clock.total
        if job.resumed and job.world.is_first:
            self.saver.resumed_from(job.directory.checkpoints / checkpoint_name(job.progress.step))

    def prepare(self, steps_left: int) -> None:
        """Allocate the first copy of the state, where a checkpoint is due before the last of the steps that are left."""
        if self.train.checkpoint_minutes is not None or 0 < self.train.checkpoint_every < steps_left:
            self.saver.prepare()

    @property
    def is_due_by_time(self) -> bool:
        """Whether ``checkpoint_minutes`` are over, by the clock of the first rank."""
        minutes = self.train.checkpoint_minutes
        return self.job.world.is_first and minutes is not None and self.clock.total - self._last >= 60 * minutes

    def update(self, *, failed: bool, due: bool) -> None:
        """Take what the ranks have agreed on after a step.

        Raises:
            RunError: a checkpoint could not be written; on all ranks alike.
        """
        if failed:
            self.saver.raise_failure()
        self._is_due = due
        self._report()

    def wanted(self, step: int) -> bool:
        """Whether a checkpoint is due after a step: by its number, by the clock, or because one was postponed."""
        return self._is_postponed or self._is_due or is_due(step, self.train.checkpoint_every)

    def postpone(self, step: int, reason: str) -> None:
        """Do not save after a step that was skipped: its cause may be in the weights. The next good step saves."""
        if not self._is_postponed:
            self.job.logger.say(
                f"warning: no checkpoint is written after step {step}, which was skipped ({reason}); "
                "one is written after the next step that is not skipped"
            )
        self._is_postponed = True

    def confirm(self, step: int) -> None:
        """Record that the weights after a step have proved good: now older checkpoints may be deleted.

        Raises:
            RunError: their folder cannot be read.
        """
        self.saver.confirm(step)
        self._report()

    def amend(self, evaluation: Evaluation) -> None:
        """Add to the checkpoint of a step its held-out loss, which is computed after it was written.

        Raises:
            RunError: it cannot be written.
        """
        if self.job.world.is_first:
            self.saver.amend(evaluation)

    def rolled_back(self, checkpoint: Path) -> None:
        """Continue from an earlier checkpoint of this run."""
        self._is_due = self._is_postponed = False
        self.saved_step = None
        if self.job.world.is_first:
            self.saver.resumed_from(checkpoint)

    def rollback_advice(self, first_skipped: int) -> str:
        """Where to resume from after steps that were skipped, in words; all ranks must call it together.

        It waits for a save under way, which may be of the step that ruined the weights.

        Raises:
            RunError: that save failed.
        """
        job = self.job
        self.saver.finish()
        self._report()
        return job.world.on_first(
            lambda: rollback_advice(find_checkpoints(job.directory.checkpoints), first_skipped, job.resume_hint)
        )

    def may_save_after(self, skipped: list[SkippedStep], val_loss: float | None, *, evaluated: bool) -> bool:
        """Whether a run whose last steps were skipped may save at its end: only if the held-out loss shows good weights.

        Args:
            skipped: the steps.
            val_loss: of the last evaluation.
            evaluated: whether that came after them; where a signal ends the run it did not.

        Raises:
            RunError: the held-out loss is not finite.
        """
        if evaluated and val_loss is not None and math.isfinite(val_loss):
            return True
        last = skipped[-1]
        line = f"no checkpoint is written after step {last.step}, which was skipped ({last.reason})"
        if evaluated:
            raise RunError(f"{line}: the held-out loss is not finite either; {self.rollback_advice(skipped[0].step)}")
        self.job.logger.say(f"warning: {line}")
        return False

    def save(self, header: Header, *, last: bool) -> None:
        """Save the state; the last time, wait until it is written. All ranks must call it together.

        Raises:
            RunError: an earlier save failed, or this one; or the state is not finite.
        """
        lacked_memory, step = self.saver.lacks_memory, header.progress.step
        try:
            self.saver.save(header, wait=last)
        except SpoiledError as error:
            raise RunError(f"{error}; {self.rollback_advice(step + 1)}") from error
        self.saved_step = step
        self._is_postponed = False
        if self.saver.lacks_memory and not lacked_memory:
            self.job.logger.say(
                "warning: host memory has no room for a copy of the state: training waits while checkpoints are written"
            )
        self._last = self.clock.total
        self._report()

    def abort(self, is_gone: Callable[[int], bool]) -> None:
        """End after an error, without the other ranks: wait for the checkpoint that is being written, and report it."""
        self.saver.close(SECONDS_TO_FINISH_A_SAVE, is_gone)
        with suppress(RunError):  # the error that ended the run is reported
            self._report()

    def _report(self) -> None:
        """Print which checkpoints have become complete, and enter each in the status: if it is lost, it will be missed."""
        for path in self.saver.committed():
            self.job.directory.amend_status()
            self.job.logger.say(f"step {step_of(path)}  checkpoint {path}")
        for problem in self.saver.problems():
            if problem not in self._reported:
                self._reported.add(problem)
                self.job.logger.say(f"warning: {problem}; delete it yourself to free disk space")
