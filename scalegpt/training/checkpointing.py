"""When a run's checkpoints are due, and what the log says about them."""

import math
from collections.abc import Callable
from contextlib import suppress

from scalegpt.checkpoint.address import Place
from scalegpt.checkpoint.manifest import Header
from scalegpt.checkpoint.saver import Evaluation, Keeping, Saver, SpoiledError
from scalegpt.checkpoint.store import checkpoint_name, find_checkpoints, step_of
from scalegpt.errors import RunError
from scalegpt.training.job import Job
from scalegpt.training.metrics import Stopwatch
from scalegpt.training.runs.metrics_file import SkippedStep
from scalegpt.training.runs.mirror import Mirror
from scalegpt.training.runs.resume import rollback_advice
from scalegpt.training.schedules import is_due

SECONDS_TO_FINISH_A_SAVE = 60.0
"""When an error ends a run, it waits this many seconds for the checkpoint that is being written."""


class Saving:
    """Decides when the run's checkpoints are written, and prints a line when one is complete.

    Attributes:
        saver: writes the checkpoints.
        mirror: copies the run's files to the address of the checkpoints, if they are at one.
        saved_step: step of the newest checkpoint of this process, complete or being written; None: there is none.
    """

    def __init__(self, job: Job, clock: Stopwatch) -> None:
        self.job, self.train, self.clock = job, job.run.train, clock
        keeping = Keeping(self.train.keep_checkpoints, self.train.keep_best)
        self.mirror = Mirror(job.directory)
        self.saver = Saver(
            job.backend,
            job.directory.checkpoints,
            keeping,
            asynchronous=self.train.async_checkpoint,
            before_commit=self.mirror.update,
        )
        self.saved_step: int | None = None
        self._is_due = False
        self._is_postponed = False
        self._reported: set[str] = set()
        self._last = clock.total
        if job.resumed and job.world.is_first:
            self.saver.resumed_from(job.directory.checkpoints / checkpoint_name(job.progress.step))

    def prepare(self, steps_left: int) -> None:
        """Allocate host memory for the first copy of the state, if a checkpoint is due before the run's last step."""
        if self.train.checkpoint_minutes is not None or 0 < self.train.checkpoint_every < steps_left:
            self.saver.prepare()

    @property
    def is_due_by_time(self) -> bool:
        """Whether ``checkpoint_minutes`` have passed since the last save.

        Only rank 0 decides this; other ranks return False.
        """
        minutes = self.train.checkpoint_minutes
        return self.job.world.is_first and minutes is not None and self.clock.total - self._last >= 60 * minutes

    def seconds_to_next(self, step: int, last: int, step_seconds: float) -> float | None:
        """Seconds until the next checkpoint is due by its step or by the clock; None: only at the run's end.

        Args:
            step: number of steps taken.
            last: number of steps of the run.
            step_seconds: seconds of a step.
        """
        every, minutes = self.train.checkpoint_every, self.train.checkpoint_minutes
        due = []
        if every and step - step % every + every < last:
            due.append((every - step % every) * step_seconds)
        if minutes is not None:
            due.append(60 * minutes - (self.clock.total - self._last))
        return min(due, default=None)

    def update(self, *, failed: bool, due: bool) -> None:
        """Take over the flags that the ranks have exchanged in a step.

        Args:
            failed: whether some rank could not write its part of a checkpoint.
            due: whether a checkpoint is due by the clock of rank 0.

        Raises:
            RunError: a checkpoint could not be written. All ranks raise this.
        """
        if failed:
            self.saver.raise_failure()
        self._is_due = due
        self._report()

    def wanted(self, step: int) -> bool:
        """Whether a checkpoint is due after a step: by its number, by the clock, or because one was postponed."""
        return self._is_postponed or self._is_due or is_due(step, self.train.checkpoint_every)

    def postpone(self, step: int, reason: str) -> None:
        """Postpone the checkpoint due after a skipped step to the next good step.

        Ruined weights may have caused the skip.
        """
        if not self._is_postponed:
            self.job.logger.say(
                f"warning: no checkpoint is written after step {step}, which was skipped ({reason}); "
                "one is written after the next step that is not skipped"
            )
        self._is_postponed = True

    def confirm(self, step: int) -> None:
        """Record that the weights after a step are good, so that older checkpoints may be deleted.

        Raises:
            RunError: the folder of the checkpoints cannot be read.
        """
        self.saver.confirm(step)
        self._report()

    def amend(self, evaluation: Evaluation) -> None:
        """Add the held-out loss of a step to the step's checkpoint, which was written before the evaluation.

        Raises:
            RunError: the checkpoint cannot be changed.
        """
        if self.job.world.is_first:
            self.saver.amend(evaluation)

    def rolled_back(self, checkpoint: Place) -> None:
        """Continue from the checkpoint to which the run has rolled back.

        Forget newer saves, and those that were due or postponed.
        """
        self._is_due = self._is_postponed = False
        self.saved_step = None
        if self.job.world.is_first:
            self.saver.resumed_from(checkpoint)

    def rollback_advice(self, first_skipped: int) -> str:
        """Return a sentence on where to resume from after skipped steps. All ranks must call it together.

        First waits for the checkpoint that is being written, since the sentence says whether it may hold ruined
        weights.

        Args:
            first_skipped: the first of the skipped steps.

        Raises:
            RunError: that checkpoint could not be written.
        """
        job = self.job
        self.saver.finish()
        self._report()
        return job.world.on_first(
            lambda: rollback_advice(find_checkpoints(job.directory.checkpoints), first_skipped, job.resume_hint)
        )

    def may_save_after(self, skipped: list[SkippedStep], val_loss: float | None, *, evaluated: bool) -> bool:
        """Whether a run whose last steps were skipped may save at its end.

        It may if the held-out loss after them is finite.

        If no evaluation came after the skipped steps, prints a warning and returns False.

        Args:
            skipped: the skipped steps.
            val_loss: held-out loss of the last evaluation.
            evaluated: whether the last evaluation came after the skipped steps; False where a signal ends the run.

        Raises:
            RunError: the held-out loss after the skipped steps is not finite.
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
        """Save the state; all ranks must call it together.

        Args:
            header: the run's entries in the checkpoint's manifest.
            last: whether this is the run's last save, which returns only when the checkpoint is complete.

        Raises:
            RunError: this save or an earlier one failed, or the state is not finite.
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
        """Wait for the checkpoint that is being written, and report it.

        Called by a rank that ends alone after an error.

        Args:
            is_gone: whether the process of a rank has ended; the checkpoint parts of such ranks are not waited for.
        """
        self.saver.close(SECONDS_TO_FINISH_A_SAVE, is_gone)
        with suppress(RunError):  # only the error that ended the run is reported
            self._report()

    def _report(self) -> None:
        """Print the checkpoints completed since the last call, and the deletions that failed.

        ``run_status.json`` also names each completed checkpoint, so that the next start notices if the checkpoint is gone.
        """
        for path in self.saver.committed():
            self.job.directory.amend_status()
            self.job.logger.say(f"step {step_of(path)}  checkpoint {path}")
        for problem in self.saver.problems():
            if problem not in self._reported:
                self._reported.add(problem)
                self.job.logger.say(f"warning: {problem}; delete it yourself to free disk space")
