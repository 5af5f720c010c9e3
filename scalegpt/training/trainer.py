"""The training loop. Read :meth:`Trainer.fit` first: evaluate, sample, save, step, log, until the end."""

import math
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from scalegpt.backends import Backend, World
from scalegpt.backends.base import ParameterState
from scalegpt.backends.capabilities import device_name
from scalegpt.checkpoint import store
from scalegpt.checkpoint.store import Header, Progress
from scalegpt.config import RunConfig
from scalegpt.config.presets import as_file
from scalegpt.data.shards import TokenSet
from scalegpt.errors import RunError
from scalegpt.model.generation import SamplingSettings, generate
from scalegpt.planner.batches import BatchPlan
from scalegpt.planner.gpus import peak_flops
from scalegpt.planner.plan import Plan
from scalegpt.planner.work import flops_per_token
from scalegpt.training.ending import end
from scalegpt.training.heartbeat import Heartbeats
from scalegpt.training.loader import HeldOutBatches, TrainingBatches
from scalegpt.training.loggers import Logger, StepLine
from scalegpt.training.memory import MemoryWatch, comparison, keep_for_later
from scalegpt.training.metrics import MetricsFile, Stopwatch, Throughput, mfu, peak_bytes
from scalegpt.training.rundir import RunDirectory, finite
from scalegpt.training.schedules import learning_rate
from scalegpt.training.stopping import Reason, StopRequest
from scalegpt.training.watchdog import Watchdog

MAX_SKIPPED_IN_A_ROW = 20
"""Steps with a non-finite gradient after which a run is given up; fp16 needs a few to find its first loss scale."""


@dataclass
class Job:
    """Everything a run needs, made by :func:`scalegpt.training.setup.prepare`.

    Attributes:
        data_digest: SHA-256 of the data's tokens.
        prompt: ids that the samples continue.
        progress: where the run stands: step 0, or where a checkpoint left it.
        resumed: whether a checkpoint left it there.
        memory: the prediction.
        watch: measures what is held.
        stop: whether this process was asked to stop.
    """

    run: RunConfig
    world: World
    plan: BatchPlan
    data: TokenSet
    data_digest: str
    prompt: list[int]
    backend: Backend
    directory: RunDirectory
    logger: Logger
    total_steps: int
    progress: Progress
    resumed: bool
    memory: Plan
    watch: MemoryWatch
    stop: StopRequest = field(default_factory=StopRequest)


class Trainer:
    """Trains a prepared job to its end."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.train = job.run.train
        self.step = job.progress.step
        self.val_loss, self.best_val_loss = job.progress.val_loss, job.progress.best_val_loss
        self.skipped, self.skipped_in_a_row = job.progress.skipped_steps, 0
        self.batches = TrainingBatches(job.data.train, job.plan, job.world, self.train.seed)
        self.held_out = HeldOutBatches(job.data.val, job.plan, job.world, self.train.eval_tokens)
        self.metrics = MetricsFile(job.directory.metrics) if job.world.is_first else None
        self.throughput = Throughput(job.plan.tokens)
        self.flops = flops_per_token(job.run.model)
        self.peak = peak_flops(device_name(job.world.device), self.train.precision)
        self.clock = Stopwatch()
        self.reason: Reason | None = None
        self.watchdog = Watchdog(
            job.directory,
            Heartbeats(job.directory.path, job.world),
            first=self.train.first_step_timeout,
            later=self.train.step_timeout,
        )

    def fit(self) -> None:
        """Train until the last step or minute; leave a checkpoint, a sample and a status.

        Raises:
            RunError: the loss stays non-finite, or a file cannot be written.
        """
        all_taken = self.step >= self.job.total_steps
        if all_taken and self.job.resumed:
            self._nothing_left()
            return
        self._status("running")
        self.watchdog.start(self.step)
        self.job.stop.last_words = self._interrupted_again
        self.job.logger.start(self.step)
        self.clock.lap()
        if all_taken:  # of none
            self._housekeeping(last=True)
        over = all_taken
        while not over:
            self._take_step()
            over = self._is_over()
            self._housekeeping(last=over)
        self.watchdog.stop()
        self.job.logger.stop()
        self._compare_memory()
        self._status("finished" if self.step >= self.job.total_steps else "stopped", self._cause_of_end())

    def outcome(self) -> str:
        """How the run ended, in words for its last line."""
        if self.step >= self.job.total_steps:
            return "done"
        left = f"stopped at step {self.step} of {self.job.total_steps}: {self._cause_of_end()}"
        return f"{left}; the same command goes on from there"

    @property
    def exit_status(self) -> int:
        """What the process returns: 0, or that of the signal that stopped it."""
        return 0 if self.step >= self.job.total_steps or self.reason is None else self.reason.exit_status

    def _nothing_left(self) -> None:
        """Leave a finished run as it is."""
        job = self.job
        job.logger.say(
            f"nothing left to do: {self.step} of {job.total_steps} steps are taken; "
            "a higher --max_iters (or --max_tokens) trains on, --fresh starts anew"
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
        ending = end(error, self.watchdog, self.job.memory, on_oom=self.train.on_oom)
        if ending.is_ours:
            with suppress(RunError):  # the first error is the one to tell
                self._status(ending.halt.state, ending.halt.cause)
        self.job.directory.unlock()
        saved = self.job.directory.newest_checkpoint()
        since = (
            f"the checkpoint of step {int(saved.name.removeprefix('step_'))}" if saved else "the start: none was saved"
        )
        self.job.logger.say(f"ended at step {self.step}; the same command goes on from {since}")
        return ending.error

    def _interrupted_again(self) -> None:
        """What a second SIGINT leaves, before the process ends at once."""
        self.watchdog.halt(
            "SIGINT, twice: left at once, without a checkpoint", status=Reason.INT.exit_status, state="stopped"
        )

    def close(self) -> None:
        """Close what is open."""
        if self.metrics is not None:
            self.metrics.close()

    def files(self) -> str:
        """What the run has left, for its last line."""
        left = sorted(path.name for path in self.job.directory.path.iterdir() if not path.name.startswith("."))
        return ", ".join(left)

    # --- one step ----------------------------------------------------------------------------------------------------

    def _take_step(self) -> None:
        job, lr = self.job, learning_rate(self.train, self.step, self.job.total_steps)
        self._seed_dropout()
        self.watchdog.begin_step(self.step + 1)
        total = torch.zeros((), device=job.world.device)
        for micro, (tokens, targets) in enumerate(self.watchdog.loading(self.batches.step(self.step))):
            total += job.backend.micro_step(tokens, targets, last=micro == job.plan.grad_accum - 1)
        result = job.backend.step(lr)
        loss = self._reduce(total)
        self.step += 1
        self._count_skipped(skipped=result.skipped, loss=loss)
        seconds = self.clock.lap()
        self.throughput.add(seconds)
        self._log(loss, lr, result.grad_norm, seconds)

    def _reduce(self, total: torch.Tensor) -> float:
        """The step's mean loss, and whether any rank was asked to stop: one reduction for both."""
        job, limit = self.job, self.train.max_minutes
        self.watchdog.at("reduction of the loss")
        time_is_up = limit is not None and self.clock.total >= 60 * limit
        marks = job.stop.marks(total.device, time_is_up=time_is_up)
        summed = job.world.sum(torch.cat([total.reshape(1), marks]))
        summed[0] /= job.plan.grad_accum * job.world.size
        loss, *counts = summed.tolist()
        self.reason = job.stop.agreed(counts)
        return float(loss)

    def _seed_dropout(self) -> None:
        """Make dropout a function of seed, step and rank, so that a resumed run draws what the first would have."""
        if self.job.run.model.dropout:
            torch.manual_seed(((self.train.seed * 1_000_003 + self.step) * 1_009 + self.job.world.rank) % 2**63)

    def _count_skipped(self, *, skipped: bool, loss: float) -> None:
        self.skipped += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise RunError(
                f"the gradient was not finite in {self.skipped_in_a_row} steps in a row up to step {self.step} "
                f"(loss {loss}); lower --learning_rate, or use --precision bf16"
            )

    def _log(self, loss: float, lr: float, grad_norm: float, seconds: float) -> None:
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
            )
        left = self._seconds_left()
        job.logger.step(
            StepLine(self.step, loss, lr, grad_norm, self.throughput.tokens_per_second, share, left, self.skipped)
        )

    # --- around the steps --------------------------------------------------------------------------------------------

    def _housekeeping(self, *, last: bool) -> None:
        """Evaluate, sample and save where they are due, and at the end; save last, so that a checkpoint means all three.

        Where a signal ends the run, somebody waits: then only what is due anyway comes before the checkpoint.
        """
        train = self.train
        at_leisure = last and (self.step >= self.job.total_steps or self.reason is Reason.TIME)
        if at_leisure or _is_due(self.step, train.eval_every):
            self.watchdog.outside("evaluation")
            self._evaluate()
        if train.sample_tokens and (at_leisure or _is_due(self.step, train.sample_every)):
            self.watchdog.outside("sampling")
            self._sample(show=last)
        if last or _is_due(self.step, train.checkpoint_every):
            self.watchdog.outside("saving")
            self._save()
        self.clock.lap()  # what was done here is no part of the next step's time

    def _evaluate(self) -> None:
        """Find and report the mean loss over the held-out windows, the same on every rank."""
        job = self.job
        sums = torch.zeros(2, dtype=torch.float64, device=job.world.device)  # loss × tokens, tokens
        for tokens, targets, count in self.held_out:
            loss = job.backend.evaluate(tokens, targets)
            sums += torch.stack([loss.double() * count, torch.tensor(float(count), device=loss.device).double()])
        total, counted = job.world.sum(sums).tolist()
        value = float(total / counted)
        is_best = math.isfinite(value) and (self.best_val_loss is None or value < self.best_val_loss)
        self.val_loss = value
        if is_best:
            self.best_val_loss = value
        if self.metrics is not None:
            self.metrics.write(step=self.step, tokens=self.tokens, val_loss=value, val_tokens=int(counted))
        best = "the best so far" if is_best else f"best {self.best_val_loss or math.nan:.4f}"
        job.logger.say(f"step {self.step}  held-out loss {value:.4f} over {int(counted):,} tokens ({best})")

    def _sample(self, *, show: bool) -> None:
        """Continue the sample prompt; every rank generates the same tokens, since a sharded model needs all of them."""
        job, tokenizer, prompt = self.job, self.job.data.tokenizer, self.job.prompt
        settings = SamplingSettings(
            temperature=0.8, top_k=200, seed=self.train.seed, max_new_tokens=self.train.sample_tokens
        )
        job.backend.model.eval()
        tokens = torch.tensor([prompt], device=job.world.device)
        drawn = generate(job.backend.forward, job.run.model, tokens, settings, limit_vocab=tokenizer.vocab_size)
        text = tokenizer.decode([*prompt, *(int(token[0]) for token in drawn)])
        job.backend.model.train()
        if job.world.is_first:
            job.directory.add_sample(self.step, text)
        if show:
            job.logger.say(f"\nsample after {self.step} steps:\n{text}\n")

    def _save(self) -> None:
        """Gather the canonical state on the first rank, which writes it; where it cannot, every rank learns of it."""
        job, is_first = self.job, self.job.world.is_first
        states = [state for state in job.backend.states() if is_first]  # all ranks take part in gathering
        path = job.world.on_first(lambda: self._write_checkpoint(states))
        job.logger.say(f"step {self.step}  checkpoint {path}")
        self._status("running")

    def _write_checkpoint(self, states: list[ParameterState]) -> Path:
        job, scaler = self.job, self.job.backend.scaler
        progress = Progress(
            step=self.step,
            tokens=self.tokens,
            val_loss=finite(self.val_loss),
            best_val_loss=self.best_val_loss,
            skipped_steps=self.skipped,
            loss_scale=scaler.scale,
            good_steps=scaler.good_steps,
        )
        header = Header(progress, as_file(job.run), job.data.tokenizer.as_dict(), job.data_digest)
        path = store.save(job.directory.checkpoints, header, states)
        store.prune(job.directory.checkpoints, self.train.keep_checkpoints)
        return path

    # --- where we are ------------------------------------------------------------------------------------------------

    @property
    def tokens(self) -> int:
        """Tokens consumed by the run so far."""
        return self.step * self.job.plan.tokens

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
            self.job.directory.write_status(
                state=state,
                step=self.step,
                cause=cause,
                val_loss=self.val_loss,
                best_val_loss=self.best_val_loss,
                skipped_steps=self.skipped,
                predicted_peak_bytes=self.job.memory.peak_bytes,
                **self.job.watch.measure().as_status(),
            )

    def _compare_memory(self) -> None:
        """Show the prediction beside what was held, and keep that for later plans."""
        job = self.job
        if not job.world.is_first or self.step == job.progress.step:
            return
        measured = job.watch.measure()
        job.logger.say(comparison(job.memory, measured))
        lost = keep_for_later(job.memory, measured)
        if lost:
            job.logger.say(f"warning: calibration {lost}")

    def _cause_of_end(self) -> str:
        if self.step >= self.job.total_steps or self.reason is None:
            return "all steps taken"
        return f"max_minutes {self.train.max_minutes} reached" if self.reason is Reason.TIME else self.reason.words


def _is_due(step: int, every: int) -> bool:
    """Whether something is due that happens every so many steps; never where that is 0."""
    return every > 0 and step % every == 0
