"""When a run's checkpoints are due, what its ranks tell each other of them, and what is said about them."""

from collections.abc import Callable
from contextlib import suppress

from scalegpt.checkpoint.manifest import Header
from scalegpt.checkpoint.saver import Keeping, Saver
from scalegpt.checkpoint.store import step_of
from scalegpt.errors import RunError
from scalegpt.training.job import Job
from scalegpt.training.metrics import Stopwatch

SECONDS_TO_FINISH_A_SAVE = 60.0
"""How long a run that ends by an error waits for the checkpoint that is being written."""


class Saving:
    """A run's checkpoints on their way.

    Args:
        job: the run.
        clock: the loop's; what time-based saving counts by.

    Attributes:
        saver: writes them.
        is_due: whether the first rank's clock asked for one after the step that all have just taken.
    """

    def __init__(self, job: Job, clock: Stopwatch) -> None:
        self.job, self.train, self.clock = job, job.run.train, clock
        keeping = Keeping(self.train.keep_checkpoints, self.train.keep_best)
        self.saver = Saver(job.backend, job.directory.checkpoints, keeping, asynchronous=self.train.async_checkpoint)
        self.is_due = False
        self._last = clock.total

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
        self.is_due = due > 0
        self._tell()

    def save(self, header: Header, *, last: bool) -> None:
        """Save the state as it is now; the last time, wait until it is written. All ranks call it together.

        Raises:
            RunError: an earlier save failed, or this one.
        """
        told = self.saver.lacks_memory
        self.saver.save(header, wait=last)
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
