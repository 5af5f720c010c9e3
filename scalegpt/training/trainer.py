"""The training loop. Read :meth:`Trainer.fit` first: step, log, save, evaluate, sample, until the end."""

from collections.abc import Iterator
from contextlib import suppress

import torch
from torch import Tensor

from scalegpt import __version__
from scalegpt.backends.capabilities import device_name
from scalegpt.checkpoint.manifest import Header, Progress
from scalegpt.checkpoint.reader import Checkpoint
from scalegpt.checkpoint.store import step_of
from scalegpt.config.presets import as_file
from scalegpt.data.ledger import Stretch
from scalegpt.errors import RunError
from scalegpt.hardware.gpus import peak_flops
from scalegpt.planner.time.work import flops_per_token
from scalegpt.system.streams import lost_output
from scalegpt.training import interpreter
from scalegpt.training.batches import HeldOutBatches, TrainingBatches
from scalegpt.training.checkpointing import Saving
from scalegpt.training.housekeeping import Housekeeping
from scalegpt.training.job import Job
from scalegpt.training.loggers import StepLine
from scalegpt.training.memory import compare, memory_status
from scalegpt.training.metrics import MetricsFile, Stopwatch, Throughput, mfu, peak_bytes
from scalegpt.training.resilience.failure import end
from scalegpt.training.resilience.guards import Conclusion, Guards, Spike, write_bad_steps
from scalegpt.training.resilience.heartbeat import Heartbeats
from scalegpt.training.resilience.rollback import RollbackTarget, check_rollbacks, go_back, restore, whole_before
from scalegpt.training.resilience.stopping import Reason
from scalegpt.training.resilience.watchdog import Watchdog
from scalegpt.training.runs.files import finite
from scalegpt.training.runs.history import History
from scalegpt.training.runs.rate_change import keeping
from scalegpt.training.schedules import learning_rate


class Trainer(Housekeeping):
    """Trains a prepared job to its end."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.train = job.run.train
        self.load_progress(job.progress, job.stretch, job.history)
        self.batches = TrainingBatches(job.data.train, job.plan, job.world, self.train.seed)
        self.held_out = HeldOutBatches(job.data.val, job.plan, job.world, self.train.eval_tokens)
        self.metrics = MetricsFile(job.directory.metrics) if job.world.is_first else None
        self.throughput = Throughput(job.plan.tokens)
        self.flops = flops_per_token(job.run.model)
        self.peak = peak_flops(device_name(job.world.device), self.train.precision)
        self.clock = Stopwatch()
        self.saving = Saving(job, self.clock)
        self.run_id = job.directory.read_id() or ""
        self.reason: Reason | None = None
        self.watchdog = Watchdog(
            job.directory,
            Heartbeats(job.directory.path, job.world),
            first=self.train.first_step_timeout,
            later=self.train.step_timeout,
        )

    def load_progress(self, progress: Progress, stretch: Stretch, history: History) -> None:
        """Continue from where a checkpoint left the run, or from its start."""
        self.step, self.stretch, self.history = progress.step, stretch, history
        self._step_before, self._tokens_before = progress.step, progress.tokens
        self.val_loss, self.best_val_loss = progress.val_loss, progress.best_val_loss
        self.left_out, self.rollbacks = progress.left_out, progress.rollbacks
        self.guards = Guards(self.train, history.recent, progress.skipped_steps)

    def fit(self) -> None:
        """Train until the last step or minute; leave a checkpoint, a sample and a status.

        Raises:
            RunError: the loss stays non-finite, or a file cannot be written.
        """
        all_taken = self.step >= self.job.total_steps
        pending = self._find_pending(at_end=all_taken)
        if all_taken and self.job.resumed and not pending.anything:
            self._nothing_left()
            return
        self._status("running")
        self.watchdog.start(self.step)
        self.job.stop.last_words, self.job.stop.course = self._interrupted_again, self._course
        self.job.logger.start(self.step)
        self.saving.prepare(self.job.total_steps - self.step)
        self.clock.lap()
        if self.job.resumed:
            self._catch_up(pending, last=all_taken)
        elif all_taken:  # of none
            self._housekeeping(last=True)
        over = all_taken
        while not over:
            spike = self._take_step()
            if spike is not None and self._roll_back(spike):
                continue
            if self.step == self._step_before + 1:
                interpreter.spare_the_collector()
            over = self._is_over()
            self._housekeeping(last=over)
        self.watchdog.stop()
        self.job.logger.stop()
        self.job.stop.course = lambda: ""
        self._compare_memory()
        self._status("finished" if self.step >= self.job.total_steps else "stopped", self._cause_of_end())

    def outcome(self) -> str:
        """How the run ended, in words for its last line."""
        if self.step >= self.job.total_steps:
            return "done"
        left = f"stopped at step {self.step} of {self.job.total_steps}: {self._cause_of_end()}"
        if self.saving.saved_step != self.step:
            return f"{left}; {self._way_on()}"
        return f"{left}; {self.job.again} goes on from there"

    @property
    def exit_status(self) -> int:
        """What the process returns: 0, or that of the signal that stopped it."""
        return 0 if self.step >= self.job.total_steps or self.reason is None else self.reason.exit_status

    def _nothing_left(self) -> None:
        """Leave a finished run as it is."""
        job = self.job
        rate = learning_rate(self.train, self.step - 1, job.total_steps) if self.step else 0.0
        rises = (
            f" (the learning rate, now {rate:.2e}, then follows the longer schedule; to keep it, add {keeping(rate)})"
            if rate > 0 and self.train.schedule != "constant"
            else ""
        )
        job.logger.say(
            f"nothing left to do: {self.step} of {job.total_steps} steps are taken; a higher --max_iters (or --max_tokens) "
            f"continues the training{rises}; --fresh starts anew beside it"
        )
        if job.world.is_first and job.directory.read_state() != "finished":
            # It was ended between its last checkpoint and its last status.
            self._status("finished", self._cause_of_end())

    def fail(self, error: BaseException) -> BaseException:
        """Leave a status that tells how the run ended, and tell the other ranks to end too.

        Args:
            error: what ended this rank.

        Returns:
            What to raise for it: the error itself, or what is behind it, which may have begun on another rank.
        """
        self.job.logger.stop()
        self.job.stop.course = lambda: ""  # launchers end the other ranks by a signal
        ending = end(error, self.watchdog, self.job.memory, on_oom=self.train.on_oom)
        if ending.is_ours:
            with suppress(RunError):  # the first error is the one to tell
                self._status(ending.halt.state, ending.halt.cause)
        self.saving.leave(self.watchdog.beats.is_gone)
        self.job.directory.unlock()
        self.job.logger.say(f"ended at step {self.step}; {self._way_on()}")
        return ending.error

    def _interrupted_again(self) -> None:
        """What a second SIGINT leaves, before the process ends at once."""
        cause = "SIGINT, twice: left at once, without a checkpoint"
        self.watchdog.halt(cause, status=Reason.INT.exit_status, state="stopped")
        self.watchdog.say_first(f"left at once in step {self.watchdog.step}; {self._way_on()}")

    def _course(self) -> str:
        """What happens after a request to stop; called from another thread."""
        watch = self.watchdog
        if self._is_over():
            return f"no further step is taken; finishing what is under way: {watch.place}"
        if watch.is_within_step:
            return f"finishing step {watch.step}, then saving"
        return f"finishing what is under way ({watch.place}) and one step, then saving"

    def _way_on(self) -> str:
        """From where a run that ended without a last checkpoint goes on."""
        saved = self.job.directory.newest_checkpoint()
        since = f"the checkpoint of step {step_of(saved)}" if saved else "the start: no checkpoint was complete"
        return f"{self.job.again} goes on from {since}"

    def close(self) -> None:
        """Close what is open."""
        interpreter.unspare()
        self.batches.close()
        self.saving.saver.close()
        if self.metrics is not None:
            self.metrics.close()

    def files(self) -> str:
        """What the run has left, for its last line."""
        names = (path.name for path in self.job.directory.path.iterdir())
        return ", ".join(sorted(name for name in names if not name.startswith(".")))

    # --- one step ----------------------------------------------------------------------------------------------------

    def _take_step(self) -> Spike | None:
        """Take a step, or leave it out; the spike that the run is to go back behind, if there is one."""
        job, lr = self.job, learning_rate(self.train, self.step, self.job.total_steps)
        self._seed_dropout()
        self.watchdog.begin_step(self.step + 1)
        total = torch.zeros((), device=job.world.device)
        for micro, (tokens, targets) in enumerate(self.watchdog.loading(self._batches())):
            total += job.backend.micro_step(tokens, targets, last=micro == job.plan.grad_accum - 1)
        self.watchdog.at("reduction of the loss")
        told, heard = job.world.sum(self._told(total)), list[float]()

        def may_step() -> bool:
            # Fetched here, where the device has been waited for: after the optimizer's step it would be waited for again.
            heard.extend(told.tolist())
            heard[0] /= job.plan.grad_accum * job.world.size
            return self.guards.allow(self.step + 1, heard[0])

        result = job.backend.step(lr, may_step)
        loss, failed, due, *marks = heard
        self.saving.hear(failed, due)
        self.reason = job.stop.agreed(marks)
        self.step += 1
        conclusion = self.guards.conclude(self.step, loss, skipped=result.skipped)
        seconds = self.clock.lap()
        self.throughput.add(seconds)
        self._log(loss, lr, result.grad_norm, seconds, conclusion)
        if conclusion.reason is None:
            self.saving.confirm(self.step - 1)  # from the weights before it came a finite loss
        return self._heed(conclusion)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.batches.step(self.stretch.window_of(self.step + 1))

    def _told(self, total: Tensor) -> Tensor:
        """What this rank tells the others after its micro steps, in one message: its losses' sum, its saves, its signals."""
        limit = self.train.max_minutes
        time_is_up = limit is not None and self.clock.total >= 60 * limit
        told = [*self.saving.flags(), *self.job.stop.marks(time_is_up=time_is_up)]
        return torch.cat([total.reshape(1), self.job.world.numbers(told)])

    def _seed_dropout(self) -> None:
        """Make dropout a function of seed, step and rank, so that a resumed run draws what the first would have."""
        if self.job.run.model.dropout:
            torch.manual_seed(((self.train.seed * 1_000_003 + self.step) * 1_009 + self.job.world.rank) % 2**63)

    def _heed(self, conclusion: Conclusion) -> Spike | None:
        """Tell of a bad step, end a run that has no other, and say whether to go back.

        Raises:
            RunError: too many steps in a row were left out.
        """
        job, warning = self.job, conclusion.warning(self.train.precision)
        if warning:
            job.logger.say(warning)
        if self.guards.gives_up:
            row = self.guards.known.skipped_in_a_row
            job.world.on_first(lambda: write_bad_steps(job.directory, row))
            self.guards.raise_row(self.saving.way_back(row[0].step))
        return conclusion.spike if self.train.on_spike == "rollback" else None

    def _roll_back(self, spike: Spike) -> bool:
        """Go back behind a spike; False where there is no checkpoint to go back to, so that the step is only left out.

        Raises:
            RunError: the run went back as often as it may.
        """
        job = self.job
        self.watchdog.outside("going back")
        self.saving.finish()  # what is being saved lies behind the spike
        check_rollbacks(spike, self.train, self.rollbacks)
        checkpoint = whole_before(job.directory.checkpoints, spike, self.train.spike_window, job.world, job.logger.say)
        if checkpoint is None:
            job.logger.say("warning: there is no checkpoint to go back to yet: training goes on without the step")
            return False
        whole = checkpoint
        back = job.world.on_first(lambda: self._take_files_back(spike, whole))
        restore(job.backend, checkpoint, back.progress)
        self.saving.went_back(back.checkpoint)
        self.load_progress(back.progress, back.stretch, back.history)
        job.logger.say(
            f"rolled back to {back.checkpoint}, rollback {self.rollbacks} of at most {self.train.max_rollbacks}; "
            f"{self.left_out:,} windows of the data are left out"
        )
        self._status("running")
        self.clock.lap()
        return True

    def _take_files_back(self, spike: Spike, checkpoint: Checkpoint) -> RollbackTarget:
        if self.metrics is not None:
            self.metrics.close()
        try:
            return go_back(
                self.job.directory,
                spike,
                checkpoint,
                now=self._progress(),
                stretch=self.stretch,
                window=self.train.spike_window,
            )
        finally:
            self.metrics = MetricsFile(self.job.directory.metrics)

    def _log(self, loss: float, lr: float, grad_norm: float, seconds: float, conclusion: Conclusion) -> None:
        job = self.job
        rate = job.plan.tokens / seconds
        share = mfu(self.throughput.tokens_per_second, self.flops, self.peak, job.world.size)
        if self.metrics is not None:
            self.metrics.write(
                step=self.step,
                tokens=self.tokens,
                loss=loss,
                lr=lr,
                grad_norm=grad_norm,
                step_seconds=seconds,
                tokens_per_second=rate,
                mfu=mfu(rate, self.flops, self.peak, job.world.size),
                peak_bytes=peak_bytes(job.world.device),
                **conclusion.as_metrics(),
            )
        speed, left = self.throughput.tokens_per_second, self._seconds_left()
        job.logger.step(StepLine(self.step, loss, lr, grad_norm, speed, share, left, self.guards.skipped))

    # --- around the steps --------------------------------------------------------------------------------------------

    def _progress(self) -> Progress:
        """Where the run stands, for a checkpoint."""
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

    # --- where we are ------------------------------------------------------------------------------------------------

    @property
    def tokens(self) -> int:
        """Tokens that the run's steps consumed so far; what a rollback took back is not counted."""
        return self._tokens_before + (self.step - self._step_before) * self.job.plan.tokens

    def _is_over(self) -> bool:
        """Whether the steps are taken, or any rank was asked to stop; asked after a step, so that there is always one."""
        return self.step >= self.job.total_steps or self.reason is not None

    def _seconds_left(self) -> float:
        by_steps = (self.job.total_steps - self.step) * self.throughput.step_seconds
        if self.train.max_minutes is None:
            return by_steps
        return min(by_steps, max(0.0, 60 * self.train.max_minutes - self.clock.total))

    def _status(self, state: str, cause: str | None = None) -> None:
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
                **memory_status(self.job.memory, self.job.watch.measure()),
                **({} if lost is None else {"output_lost": lost}),
            )

    def _compare_memory(self) -> None:
        """Show the prediction beside what was held, and keep that for later plans."""
        job = self.job
        if job.world.is_first and self.step > job.progress.step:
            job.logger.say(compare(job.memory, job.watch.measure()))

    def _cause_of_end(self) -> str:
        if self.step >= self.job.total_steps or self.reason is None:
            return "all steps taken"
        return f"max_minutes {self.train.max_minutes} reached" if self.reason is Reason.TIME else self.reason.words
