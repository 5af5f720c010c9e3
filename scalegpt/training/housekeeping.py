"""The trainer's work between steps: its progress, and the checkpoint, evaluation and sample after a step.

The checkpoint comes first, since the evaluation and the sample may fail. The evaluation then adds its loss to the checkpoint.
"""

import math
import os
from dataclasses import replace
from threading import Thread

import torch

from scalegpt import __version__
from scalegpt.checkpoint.manifest import Header, Progress
from scalegpt.checkpoint.saver import Evaluation
from scalegpt.config.presets import as_file
from scalegpt.data.windows.ledger import Stretch
from scalegpt.model.generation import DivergedError
from scalegpt.system.streams import lost_output
from scalegpt.training.batches import HeldOutBatches
from scalegpt.training.checkpointing import Saving
from scalegpt.training.job import Job, held_out_loss, sample_text
from scalegpt.training.memory import measure, memory_status
from scalegpt.training.metrics import MetricSink, Stopwatch
from scalegpt.training.resilience.guards import Guards
from scalegpt.training.resilience.heartbeat import Heartbeats
from scalegpt.training.resilience.stopping import Reason
from scalegpt.training.resilience.watchdog import Watchdog
from scalegpt.training.runs.files import finite
from scalegpt.training.runs.metrics_file import History, MetricsFile, PendingWork, pending_work
from scalegpt.training.schedules import is_due
from scalegpt.training.trackers.feed import Feed
from scalegpt.training.trackers.table import open_trackers

SECONDS_TO_CLEAR = 1.0
"""When a process ends at once, it may spend this many seconds on removing its live line from the terminal."""


class Housekeeping:
    """The part of the trainer that works between the steps. All ranks call its methods together.

    Attributes:
        step: number of steps taken.
        history: what ``metrics.jsonl`` said about the steps up to the last resume or rollback.
        val_loss: held-out loss of the last evaluation; None: no evaluation yet, in this process or before its
            checkpoint.
        best_val_loss: lowest held-out loss so far.
        left_out: number of windows (training sequences) that rollbacks skipped.
        reason: why the run stops before its last step; None: it does not stop early.
        sinks: where metrics are logged; empty on all ranks but rank 0.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.train = job.run.train
        self.load_progress(job.progress, job.stretch, job.history)
        self.held_out = HeldOutBatches(
            job.data.val, job.batch_plan, job.world, self.train.eval_tokens, job.document_end
        )
        self.sinks = self._open_sinks()
        for feed in (sink for sink in self.sinks if isinstance(sink, Feed)):
            job.logger.say(f"log_to   {feed.name}: {feed.place}")
        self.clock = Stopwatch()
        self.saving = Saving(job, self.clock)
        self.run_id = job.directory.read_id() or ""
        self.reason: Reason | None = None
        self.watchdog = Watchdog(
            job.directory,
            Heartbeats(job.directory.path, job.world),
            first=self.train.first_step_timeout,
            later=self.train.step_timeout,
            leave=self._leave,
        )

    def load_progress(self, progress: Progress, stretch: Stretch, history: History) -> None:
        """Set all counters to the progress of a checkpoint, or for a new run to zero."""
        self.step, self.stretch, self.history = progress.step, stretch, history
        self._step_before, self._tokens_before = progress.step, progress.tokens
        self.val_loss, self.best_val_loss = progress.val_loss, progress.best_val_loss
        self.left_out, self.rollbacks = progress.left_out, progress.rollbacks
        self.guards = Guards(self.train, history.recent, progress.skipped_steps)

    def _open_sinks(self) -> list[MetricSink]:
        job = self.job
        if not job.world.is_first:
            return []
        settings, plan = as_file(job.run), job.directory.read_plan() or {}
        feeds = open_trackers(self.train.trackers, job.directory, settings, plan, job.logger.say)
        return [MetricsFile(job.directory.metrics), *feeds]

    def _leave(self, status: int) -> None:
        """End this process at once and remove the live line from the terminal. The watchdog calls this."""
        clearing = Thread(target=self.job.logger.stop, daemon=True)  # a stopped terminal blocks who writes to it
        clearing.start()
        clearing.join(SECONDS_TO_CLEAR)
        os._exit(status)

    # --- where the run is --------------------------------------------------------------------------------------------

    @property
    def tokens(self) -> int:
        """Tokens that the run's steps have consumed, without the steps that rollbacks undid."""
        return self._tokens_before + (self.step - self._step_before) * self.job.batch_plan.tokens

    @property
    def all_taken(self) -> bool:
        """Whether all steps are taken."""
        return self.step >= self.job.total_steps

    def _cause_of_end(self) -> str:
        if self.all_taken or self.reason is None:
            return "all steps taken"
        return f"max_minutes {self.train.max_minutes} reached" if self.reason is Reason.TIME else self.reason.words

    def _progress(self) -> Progress:
        scaler = self.job.backend.scaler
        return Progress(
            step=self.step,
            tokens=self.tokens,
            val_loss=finite(self.val_loss),
            best_val_loss=self.best_val_loss,
            skipped_steps=self.guards.skipped,
            loss_scale=scaler.scale,
            good_steps=scaler.good_steps,
            seed=self.train.seed,
            sequences=self.stretch.window_of(self.step + 1),
            left_out=self.left_out,
            rollbacks=self.rollbacks,
        )

    def _header(self) -> Header:
        """The run's entries in the manifest of a checkpoint written now."""
        job = self.job
        written_by = {
            "backend": job.run.parallel.backend,
            "zero_stage": job.run.parallel.stage,
            "ranks": job.world.size,
            "scalegpt": __version__,
            "torch": torch.__version__,
        }
        tokenizer = job.data.tokenizer.as_dict()
        return Header(self._progress(), as_file(job.run), tokenizer, job.data_digest, self.run_id, written_by)

    def _status(self, state: str, cause: str | None = None) -> None:
        """Replace ``run_status.json``. Does nothing on ranks other than rank 0."""
        if self.job.world.is_first:
            lost = lost_output()
            self.job.directory.write_status(
                state=state,
                step=self.step,
                cause=cause,
                val_loss=self.val_loss,
                best_val_loss=self.best_val_loss,
                **self.guards.as_status(),
                rollbacks=self.rollbacks,
                windows_left_out=self.left_out,
                **memory_status(self.job.plan, measure(self.job.world.device)),
                **({} if lost is None else {"output_lost": lost}),
            )

    # --- what is due -------------------------------------------------------------------------------------------------

    def _housekeeping(self, *, last: bool) -> None:
        """Save, evaluate and sample, if they are due after this step or the run ends.

        A run that ends at its last step or its time limit does all three. A run stopped by a signal, or by the end of its
        launcher, saves, but evaluates and samples only if the step's number makes that due.
        """
        train = self.train
        ends_normally = last and (self.all_taken or self.reason is Reason.TIME)
        evaluates = ends_normally or is_due(self.step, train.eval_every)
        skipped = self.guards.recent.skipped_in_a_row
        if last or self.saving.wanted(self.step):
            if not skipped:
                self._save(last=last, evaluates=evaluates)
            elif not last:
                self.saving.postpone(self.step, skipped[-1].reason)
        if evaluates:
            self.watchdog.outside("evaluation")
            self._evaluate()
        if last and skipped and self.saving.may_save_after(skipped, self.val_loss, evaluated=evaluates):
            self._save(last=True)
        if train.sample_tokens and (ends_normally or is_due(self.step, train.sample_every)):
            self.watchdog.outside("sampling")
            self._sample(show=last)
        self.clock.lap()  # none of this is part of the next step's time

    def _save(self, *, last: bool, evaluates: bool = False) -> None:
        """Write a checkpoint, with None as its held-out loss if the step's evaluation is still to come."""
        self.watchdog.outside("saving")
        header = self._header()
        if evaluates:
            header = replace(header, progress=replace(header.progress, val_loss=None))
        self.saving.save(header, last=last)
        self._status("running")

    def _find_pending(self) -> PendingWork:
        """Find out whether the evaluation and the sample of the step from which the run resumed are missing.

        If ``metrics.jsonl`` already has that step's held-out loss, add it to the checkpoint. In a new run nothing is
        missing.
        """
        if not self.job.resumed:
            return PendingWork()
        directory, step = self.job.directory, self.step
        finished, sampled = self.job.world.on_first(
            lambda: (directory.read_state() == "finished", any(after == step for after, _ in directory.read_samples()))
        )
        if self.history.val_loss is not None:
            self._record_loss(self.history.val_loss)
        return pending_work(self.history, self.train, finished=finished, sampled=sampled, at_end=self.all_taken)

    def _catch_up(self, pending: PendingWork) -> None:
        """Do the evaluation and the sample that an earlier process did not do after its last checkpoint."""
        if pending.evaluation:
            self.watchdog.outside("evaluation")
            self._evaluate()
        if pending.sample:
            self.watchdog.outside("sampling")
            self._sample(show=self.all_taken)
        self.clock.lap()

    def _record_loss(self, value: float) -> bool:
        """Record the current step's held-out loss, and add it to the step's checkpoint.

        Returns:
            Whether the loss is the lowest so far.
        """
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
        """Compute and report the mean loss over the held-out windows, the same on every rank."""
        value, counted, losses = held_out_loss(self.job, self.held_out)
        several = dict(zip(self.job.data.labels, losses, strict=True)) if len(losses) > 1 else {}
        by_source = {"val_loss_by_source": several} if several else {}
        for sink in self.sinks:
            sink.log({"step": self.step, "tokens": self.tokens, "val_loss": value, "val_tokens": counted, **by_source})
        is_best = self._record_loss(value)
        best = "the best so far" if is_best else f"best {self.best_val_loss or math.nan:.4f}"
        each = "".join(f", {label} {loss:.4f}" for label, loss in several.items())
        self.job.logger.say(f"step {self.step}  held-out loss {value:.4f} over {counted:,} tokens ({best}){each}")
        if not math.isfinite(value) and self.saving.saved_step == self.step:
            advice = self.saving.rollback_advice(self.step + 1)
            self.job.logger.say(f"warning: the held-out loss is not finite; {advice}")

    def _sample(self, *, show: bool) -> None:
        """Generate a sample, append it to ``samples.txt``, and print it if ``show``; warn if the model has diverged."""
        job = self.job
        try:
            text = sample_text(job)
        except DivergedError as error:
            job.logger.say(f"warning: no sample after {self.step} steps: {error}")
            return
        if job.world.is_first:
            job.directory.add_sample(self.step, text)
        for sink in self.sinks:
            sink.log_sample(self.step, text)
        if show:
            job.logger.say(f"\nsample after {self.step} steps:\n{text}\n")
