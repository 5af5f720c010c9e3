"""What comes between steps: the checkpoint, the evaluation and the sample, in this order, since the latter two may fail."""

import math
from abc import ABC, abstractmethod
from dataclasses import replace

from scalegpt.checkpoint.manifest import Header
from scalegpt.checkpoint.saver import Evaluation
from scalegpt.config import TrainConfig
from scalegpt.model.generation import DivergedError
from scalegpt.training.batches import HeldOutBatches
from scalegpt.training.checkpointing import Saving
from scalegpt.training.job import Job, held_out_loss, sample_text
from scalegpt.training.metrics import MetricsFile, Stopwatch
from scalegpt.training.resilience.guards import Guards
from scalegpt.training.resilience.stopping import Reason
from scalegpt.training.resilience.watchdog import Watchdog
from scalegpt.training.runs.files import finite
from scalegpt.training.runs.history import History, PendingWork, pending_work
from scalegpt.training.schedules import is_due


class Housekeeping(ABC):
    """The part of the trainer that is no step. All ranks call its methods together.

    Attributes:
        step: the steps taken.
        history: what ``metrics.jsonl`` says of the steps up to the last resume or rollback.
        val_loss: of the last evaluation; None before the first, or where it was not finite.
        best_val_loss: the lowest so far.
        reason: why the run is to end before its last step.
    """

    job: Job
    train: TrainConfig
    step: int
    history: History
    val_loss: float | None
    best_val_loss: float | None
    reason: Reason | None
    held_out: HeldOutBatches
    metrics: MetricsFile | None
    guards: Guards
    clock: Stopwatch
    saving: Saving
    watchdog: Watchdog

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Tokens that the run's steps consumed so far."""

    @abstractmethod
    def _header(self) -> Header:
        """What a checkpoint written now says of its run."""

    @abstractmethod
    def _status(self, state: str, cause: str | None = None) -> None:
        """Replace the run's status."""

    def _housekeeping(self, *, last: bool) -> None:
        """Save, evaluate and sample where they are due, and at the end; save first, since the others may fail.

        The checkpoint is told its held-out loss afterwards. Where a signal ends the run, only what is due anyway is done.
        """
        train = self.train
        at_leisure = last and (self.step >= self.job.total_steps or self.reason is Reason.TIME)
        evaluates = at_leisure or is_due(self.step, train.eval_every)
        row = self.guards.known.skipped_in_a_row
        if last or self.saving.wanted(self.step):
            if not row:
                self._save(last=last, evaluates=evaluates)
            elif not last:
                self.saving.put_off(self.step, row[-1].reason)
        if evaluates:
            self.watchdog.outside("evaluation")
            self._evaluate()
        if last and row and self.saving.may_save_after(row, self.val_loss, evaluated=evaluates):
            self._save(last=True)
        if train.sample_tokens and (at_leisure or is_due(self.step, train.sample_every)):
            self.watchdog.outside("sampling")
            self._sample(show=last)
        self.clock.lap()  # what was done here is no part of the next step's time

    def _save(self, *, last: bool, evaluates: bool = False) -> None:
        """Write a checkpoint; its held-out loss is left open where the evaluation of the same step comes next."""
        self.watchdog.outside("saving")
        header = self._header()
        if evaluates:
            header = replace(header, progress=replace(header.progress, val_loss=None))
        self.saving.save(header, last=last)
        self._status("running")

    def _find_pending(self, *, at_end: bool) -> PendingWork:
        """What the checkpoint's step still lacks after a resume. Its held-out loss, if there is one, is in the files."""
        if not self.job.resumed:
            return PendingWork()
        directory, step = self.job.directory, self.step
        finished, sampled = self.job.world.on_first(
            lambda: (directory.read_state() == "finished", any(after == step for after, _ in directory.read_samples()))
        )
        if self.history.val_loss is not None:
            self._learn(self.history.val_loss)
        return pending_work(self.history, self.train, finished=finished, sampled=sampled, at_end=at_end)

    def _catch_up(self, pending: PendingWork, *, last: bool) -> None:
        """Evaluate and sample where an earlier process ended between a checkpoint and that."""
        if pending.evaluation:
            self.watchdog.outside("evaluation")
            self._evaluate()
        if pending.sample:
            self.watchdog.outside("sampling")
            self._sample(show=last)
        self.clock.lap()

    def _learn(self, value: float) -> bool:
        """Take note of the step's held-out loss, and let its checkpoint know; whether it is the best so far."""
        is_finite = math.isfinite(value)
        is_best = is_finite and (self.best_val_loss is None or value < self.best_val_loss)
        self.val_loss = value
        if is_best:
            self.best_val_loss = value
        self.saving.amend(Evaluation(self.step, finite(value), self.best_val_loss))
        if is_finite:
            self.saving.confirm(self.step)
        return is_best

    def _evaluate(self) -> None:
        """Find and report the mean loss over the held-out windows, the same on every rank."""
        value, counted = held_out_loss(self.job, self.held_out)
        if self.metrics is not None:
            self.metrics.write(step=self.step, tokens=self.tokens, val_loss=value, val_tokens=counted)
        is_best = self._learn(value)
        best = "the best so far" if is_best else f"best {self.best_val_loss or math.nan:.4f}"
        self.job.logger.say(f"step {self.step}  held-out loss {value:.4f} over {counted:,} tokens ({best})")
        if not math.isfinite(value) and self.saving.saved_step == self.step:
            self.job.logger.say(f"warning: the held-out loss is not finite; {self.saving.way_back(self.step + 1)}")

    def _sample(self, *, show: bool) -> None:
        """Let the model write, keep it, and show it; a model that has diverged cannot, which is said."""
        job = self.job
        try:
            text = sample_text(job)
        except DivergedError as error:
            job.logger.say(f"warning: no sample after {self.step} steps: {error}")
            return
        if job.world.is_first:
            job.directory.add_sample(self.step, text)
        if show:
            job.logger.say(f"\nsample after {self.step} steps:\n{text}\n")
