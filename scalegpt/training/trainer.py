"""The training loop: step, log, save, evaluate, sample, until the run ends. Read :meth:`Trainer.fit` first."""

import gc
from contextlib import suppress

import torch
from torch import Tensor

from scalegpt.backends.capabilities import device_name
from scalegpt.checkpoint.reader import Checkpoint
from scalegpt.checkpoint.store import step_of
from scalegpt.errors import InputError, RunError
from scalegpt.hardware.gpus import peak_flops
from scalegpt.model.packing import counted_share
from scalegpt.planner.time.work import flops_per_token
from scalegpt.system.processes import freeze_gc
from scalegpt.training.batches import TrainingBatches
from scalegpt.training.housekeeping import Housekeeping
from scalegpt.training.job import Job
from scalegpt.training.memory import comparison, keep_for_later, measure, planned_peak
from scalegpt.training.metrics import EnergyMeter, Gauges, Throughput, mfu, peak_bytes
from scalegpt.training.output.ending import Review, Work, progress_lines, speed_lines
from scalegpt.training.output.step_line import StepLine
from scalegpt.training.profile.recorder import Recorder
from scalegpt.training.resilience.failure import handle_failure
from scalegpt.training.resilience.guards import Conclusion, Spike, write_bad_steps
from scalegpt.training.resilience.pace import Pace
from scalegpt.training.resilience.rollback import (
    RollbackTarget,
    check_rollbacks,
    find_target,
    restore,
    roll_back_files,
)
from scalegpt.training.resilience.stopping import Reason
from scalegpt.training.runs.changes import nothing_left_line
from scalegpt.training.schedules import learning_rate
from scalegpt.training.step_flags import StepFlags


class Trainer(Housekeeping):
    """Trains a prepared job to its end."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.batches = TrainingBatches(job.data.train, job.batch_plan, job.world, self.train.seed, job.document_end)
        self.throughput = Throughput(job.batch_plan.tokens)
        self.flops = flops_per_token(job.run.model)
        self.energy = EnergyMeter(job.world)
        self.pace = Pace(job.world, self.train.log_every)
        self.recorder = Recorder(job, self.step)
        self.gauges = Gauges(job.world.device, self.train.log_every)
        self.peak = peak_flops(device_name(job.world.device), self.train.precision)

    def fit(self) -> None:
        """Train until the last step, the time limit or a request to stop; leave a checkpoint and a status.

        Raises:
            RunError: too many steps in a row are skipped, or a file cannot be written.
        """
        job, nothing_left = self.job, self.all_taken
        pending = self._find_pending()
        if nothing_left and job.resumed and not pending.anything:
            self._report_nothing_left()
            return
        self._status("running")
        self.watchdog.start(self.step)
        job.stop.before_leaving, job.stop.what_next = self._interrupted_again, self._what_next
        job.logger.start(self.step, planned_bytes=planned_peak(job.plan), doing=self._doing)
        if job.compiled:
            job.logger.say("the first step compiles the model, which can take minutes")
        self.saving.prepare(job.total_steps - self.step)
        self.clock.lap()
        if job.resumed:
            self._catch_up(pending)
        elif nothing_left:  # a run of no steps
            self._housekeeping(last=True)
        over = nothing_left
        while not over:
            self.recorder.before(self.step + 1)
            spike = self._take_step()
            if spike is not None and self._roll_back(spike):
                continue
            if self.step == self._step_before + 1:
                freeze_gc()
            over = self._is_over()
            self.recorder.after(self.step, last=over)
            self._housekeeping(last=over)
        self.watchdog.stop()
        job.logger.stop()
        job.stop.what_next = lambda: ""
        self._summarize()
        self._status("finished" if self.all_taken else "stopped", self._cause_of_end())

    def close(self) -> None:
        """Close the batches, the saver and the metric sinks, and undo :func:`freeze_gc`."""
        gc.unfreeze()
        self.recorder.close()
        self.batches.close()
        self.saving.saver.close()
        for sink in self.sinks:
            sink.close()

    # --- one step ----------------------------------------------------------------------------------------------------

    def _take_step(self) -> Spike | None:
        """Take the next step, or skip it where a guard refuses.

        Returns:
            The loss spike for which the run is to roll back; None: it is not to roll back.
        """
        job, lr = self.job, learning_rate(self.train, self.step, self.job.total_steps)
        self._seed_dropout()
        self.watchdog.begin_step(self.step + 1)
        total = torch.zeros((), device=job.world.device)
        counted = None if job.document_end is None else torch.zeros_like(total)
        batches = self.batches.step(self.stretch.window_of(self.step + 1))
        for micro, (tokens, targets) in enumerate(self.pace.timed(self.watchdog.loading(batches))):
            total += job.backend.micro_step(tokens, targets, last=micro == job.batch_plan.grad_accum - 1)
            if counted is not None:
                counted += counted_share(targets)
        self.watchdog.at("reduction of the loss")
        sums = job.world.sum(self._report(total, counted))
        unpacked: list[tuple[float, StepFlags]] = []

        def may_step() -> bool:
            # Read the loss here, where the backend has waited for the device. Later it would cost another wait.
            loss, shares, flags = StepFlags.unpack(sums.tolist(), job.world.size)
            unpacked.append((loss / (shares or job.batch_plan.grad_accum * job.world.size), flags))
            return self.guards.allow(self.step + 1, unpacked[0][0])

        result = job.backend.step(lr, may_step)
        loss, flags = unpacked[0]
        self.saving.update(failed=flags.save_failed, due=flags.save_due)
        self.reason = flags.stop
        for line in self.pace.compare(flags.seconds):
            job.logger.say(line)
        self.step += 1
        conclusion = self.guards.conclude(self.step, loss, skipped=result.skipped)
        seconds = self.clock.lap()
        self.throughput.add(seconds)
        self._log(loss, lr, result.grad_norm, seconds, conclusion)
        if conclusion.reason is None:
            self.saving.confirm(self.step - 1)  # the weights before this step gave a finite loss
        return self._act_on(conclusion)

    def _report(self, total: Tensor, counted: Tensor | None) -> Tensor:
        """Pack this rank's losses, shares of counted targets, and flags into the tensor that is summed over the ranks.

        Requests a stop first, if ``max_minutes`` have passed.
        """
        limit = self.train.max_minutes
        if limit is not None and self.clock.total >= 60 * limit:
            self.job.stop.ask(Reason.TIME)
        failed, due = self.saving.saver.failed, self.saving.is_due_by_time
        flags = StepFlags(failed, due, self.job.stop.reason, (self.pace.taken(),))
        return flags.pack(total, self.job.world, counted)

    def _seed_dropout(self) -> None:
        """Seed torch from seed, step and rank, so that a resumed run draws the same dropout masks."""
        if self.job.run.model.dropout:
            torch.manual_seed(((self.train.seed * 1_000_003 + self.step) * 1_009 + self.job.world.rank) % 2**63)

    def _act_on(self, conclusion: Conclusion) -> Spike | None:
        """Report a bad step, and end the run after too many skipped steps in a row.

        Returns:
            The spike for which the run is to roll back; None: it is not to roll back.

        Raises:
            RunError: too many steps in a row were skipped.
        """
        job, warning = self.job, conclusion.warning(self.train.precision)
        if warning:
            job.logger.say(warning)
        if self.guards.gives_up:
            skipped = self.guards.recent.skipped_in_a_row
            job.world.on_first(lambda: write_bad_steps(job.directory, skipped))
            self.guards.raise_skipped(self.saving.rollback_advice(skipped[0].step))
        return conclusion.spike if self.train.on_spike == "rollback" else None

    def _log(self, loss: float, lr: float, grad_norm: float, seconds: float, conclusion: Conclusion) -> None:
        job = self.job
        rate, used = job.batch_plan.tokens / seconds, peak_bytes(job.world.device)
        if self.sinks:
            values = {
                "step": self.step, "tokens": self.tokens, "loss": loss, "lr": lr, "grad_norm": grad_norm,
                "step_seconds": seconds, "tokens_per_second": rate,
                "mfu": mfu(rate, self.flops, self.peak, job.world.size), "peak_bytes": used,
                **conclusion.as_metrics(), **self.gauges.read(self.step),
            }  # fmt: skip
            for sink in self.sinks:
                sink.log(values)
        speed, left = self.throughput.tokens_per_second, self._seconds_left()
        share = mfu(speed, self.flops, self.peak, job.world.size)
        job.logger.step(
            StepLine(
                self.step, loss, lr, grad_norm, speed, share, left, self.guards.skipped, self.val_loss, used,
                self.saving.seconds_to_next(self.step, self.job.total_steps, self.throughput.step_seconds),
            )
        )  # fmt: skip

    def _doing(self) -> str:
        """What the run does now, in a word or two: the first step, or work between steps; empty in later steps."""
        if not self.watchdog.is_within_step:
            return self.watchdog.place
        return "first step" if self.step == self._step_before else ""

    # --- rollback ----------------------------------------------------------------------------------------------------

    def _roll_back(self, spike: Spike) -> bool:
        """Roll the run back to a checkpoint from before a spike.

        Returns:
            Whether the run was rolled back; False where there is no such checkpoint, and the step is only skipped.

        Raises:
            RunError: the run has already made ``max_rollbacks`` rollbacks.
        """
        job = self.job
        self.watchdog.outside("going back")
        self.saving.saver.finish()  # the checkpoint being saved must be complete before files are rolled back
        check_rollbacks(spike, self.train, self.rollbacks)
        checkpoint = find_target(job.directory.checkpoints, spike, self.train.spike_window, job.world, job.logger.say)
        if checkpoint is None:
            job.logger.say(
                "warning: there is no checkpoint to go back to yet: the step is skipped and training continues"
            )
            return False
        target = job.world.on_first(lambda: self._roll_back_files(spike, checkpoint))
        restore(job.backend, checkpoint, target.progress)
        self.saving.rolled_back(target.checkpoint)
        self.load_progress(target.progress, target.stretch, target.history)
        job.logger.say(
            f"rolled back to {target.checkpoint}, rollback {self.rollbacks} of at most {self.train.max_rollbacks}; "
            f"{self.left_out:,} windows of the data are skipped"
        )
        self._status("running")
        self.clock.lap()
        return True

    def _roll_back_files(self, spike: Spike, checkpoint: Checkpoint) -> RollbackTarget:
        for sink in self.sinks:
            sink.close()
        try:
            return roll_back_files(
                self.job.directory, spike, checkpoint, self._progress(), self.stretch, self.train.spike_window
            )
        finally:
            self.sinks = self._open_sinks()

    # --- the end -----------------------------------------------------------------------------------------------------

    def outcome(self) -> str:
        """How the run ended, in words for its last printed line."""
        if self.all_taken:
            return "done"
        stopped = f"stopped at step {self.step} of {self.job.total_steps}: {self._cause_of_end()}"
        if self.saving.saved_step != self.step:
            return f"{stopped}; {self._resume_advice()}"
        return f"{stopped}; {self.job.resume_hint} resumes from there"

    @property
    def exit_status(self) -> int:
        """The exit status of the process: 0, or that of the reason for which the run stopped."""
        return 0 if self.all_taken or self.reason is None else self.reason.exit_status

    def fail(self, error: BaseException) -> BaseException:
        """Write the cause of the end into ``run_status.json``, and make the other ranks end too.

        Args:
            error: the exception that ended this rank's loop.

        Returns:
            The exception to raise: ``error`` if it is the cause and its message is clear, else a ``RunError`` with the cause.
        """
        self.job.logger.stop()
        self.job.stop.what_next = lambda: ""  # print nothing when the launcher signals this rank: it is ending already
        failure = handle_failure(error, self.watchdog, self.job.plan, on_oom=self.train.on_oom)
        if failure.is_ours:
            with suppress(RunError):  # the first error is the one to report
                self._status(failure.halt.state, failure.halt.cause)
        self.saving.abort(self.watchdog.beats.is_gone)
        self.job.directory.unlock()
        if self.job.world.is_first and self.step > self.job.progress.step:
            with suppress(OSError, InputError):  # the first error is the one to report
                for line in progress_lines(*self._review({})):
                    self.job.logger.say(line)
        self.job.logger.say(f"ended at step {self.step}; {self._resume_advice()}")
        return failure.error

    def _report_nothing_left(self) -> None:
        """Print that no steps are left. The run's files do not change, except that a missing last status is written."""
        job = self.job
        rate = learning_rate(self.train, self.step - 1, job.total_steps) if self.step else 0.0
        job.logger.say(nothing_left_line(self.step, job.total_steps, rate, self.train.schedule))
        if job.world.is_first and job.directory.read_state() != "finished":
            # An earlier process ended between the run's last checkpoint and its last status.
            self._status("finished", self._cause_of_end())

    def _interrupted_again(self) -> None:
        """Write the cause into the status and print it. Called on a second SIGINT, before the process ends at once."""
        self.job.logger.stop()
        cause = "a second SIGINT ended the run at once, without a checkpoint"
        self.watchdog.halt(cause, status=Reason.INT.exit_status, state="stopped")
        self.watchdog.say_if_first(f"ended at once in step {self.watchdog.step}; {self._resume_advice()}")

    def _what_next(self) -> str:
        """What the run does after a request to stop, in words. Called from another thread."""
        watch = self.watchdog
        if self._is_over():
            return f"no further step is taken; finishing the current work: {watch.place}"
        if watch.is_within_step:
            return f"finishing step {watch.step}, then saving"
        return f"finishing the current work ({watch.place}) and one step, then saving"

    def _resume_advice(self) -> str:
        """A sentence that says from where a run that ended without a last checkpoint resumes."""
        saved = self.job.directory.newest_checkpoint()
        place = f"the checkpoint of step {step_of(saved)}" if saved else "the start: no checkpoint was complete"
        return f"{self.job.resume_hint} resumes from {place}"

    def _is_over(self) -> bool:
        """Whether all steps are taken, or a rank was asked to stop. Called after a step, so at least one is taken."""
        return self.all_taken or self.reason is not None

    def _seconds_left(self) -> float:
        by_steps = (self.job.total_steps - self.step) * self.throughput.step_seconds
        if self.train.max_minutes is None:
            return by_steps
        return min(by_steps, max(0.0, 60 * self.train.max_minutes - self.clock.total))

    def _summarize(self) -> None:
        """Print the run's summary, and store the measured memory for later plans; all ranks must call it together."""
        job, measured, joules = self.job, measure(self.job.world.device), self.energy.taken()
        if not job.world.is_first or self.step <= job.progress.step:
            return
        review, work = self._review(joules)
        for line in (*progress_lines(review, work), comparison(job.plan, measured), *speed_lines(review, work)):
            job.logger.say(line)
        if problem := keep_for_later(job.plan, measured):
            job.logger.say(f"warning: calibration {problem}")

    def _review(self, joules: dict[str, float]) -> tuple[Review, Work]:
        """The figures in ``metrics.jsonl``, and the work of this process. ``joules`` holds the energy of each GPU."""
        job, steps = self.job, self.step - self.job.progress.step
        predicted, energy = job.plan.speed()["tokens_per_second"], sum(joules.values()) or None
        work = Work(steps, steps * job.batch_plan.tokens, self.clock.total, predicted, energy, len(joules))
        return Review.of(job.directory.metrics, job.progress.step), work
