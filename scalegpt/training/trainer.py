"""The training loop. Read :meth:`Trainer.fit` first: evaluate, sample, save, step, log, until the end."""

import math
from dataclasses import dataclass

import torch

from scalegpt.backends import Backend, World
from scalegpt.backends.capabilities import device_name
from scalegpt.checkpoint import store
from scalegpt.checkpoint.store import Header, Progress
from scalegpt.config import RunConfig
from scalegpt.config.presets import as_file
from scalegpt.data.shards import TokenSet
from scalegpt.errors import RunError
from scalegpt.model.generation import SamplingSettings, generate
from scalegpt.planner.gpus import peak_flops
from scalegpt.training.batches import BatchPlan
from scalegpt.training.loader import HeldOutBatches, TrainingBatches
from scalegpt.training.loggers import Logger, StepLine
from scalegpt.training.metrics import MetricsFile, Stopwatch, Throughput, flops_per_token, mfu, peak_bytes
from scalegpt.training.rundir import RunDirectory
from scalegpt.training.schedules import learning_rate

MAX_SKIPPED_IN_A_ROW = 20
"""Steps with a non-finite gradient after which a run is given up; fp16 needs a few to find its first loss scale."""


@dataclass
class Job:
    """Everything a run needs, made by :func:`scalegpt.training.setup.prepare`.

    Attributes:
        progress: where the run stands: step 0, or where a checkpoint left it.
    """

    run: RunConfig
    world: World
    plan: BatchPlan
    data: TokenSet
    backend: Backend
    directory: RunDirectory
    logger: Logger
    total_steps: int
    progress: Progress


class Trainer:
    """Trains a prepared job to its end."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.train = job.run.train
        self.step = job.progress.step
        self.best_val_loss = job.progress.best_val_loss
        self.last_val_loss: float | None = None
        self.skipped = self.skipped_in_a_row = 0
        self.batches = TrainingBatches(job.data.train, job.plan, job.world, self.train.seed)
        self.held_out = HeldOutBatches(job.data.val, job.plan, job.world, self.train.eval_tokens)
        self.metrics = MetricsFile(job.directory.metrics) if job.world.is_first else None
        self.throughput = Throughput(job.plan.tokens)
        self.flops = flops_per_token(job.run.model)
        self.peak = peak_flops(device_name(job.world.device), self.train.precision)
        self.clock = Stopwatch()

    def fit(self) -> None:
        """Train until the last step or minute; leave a checkpoint, a sample and a status.

        Raises:
            RunError: the loss stays non-finite, or a checkpoint cannot be written.
        """
        self._status("running")
        self.job.logger.start(self.step)
        self.clock.lap()
        while not self._is_over():
            self._take_step()
            self._housekeeping(last=False)
        self._housekeeping(last=True)
        self.job.logger.stop()
        self._status("finished", self._cause_of_end())

    def fail(self, error: BaseException) -> None:
        """Leave a status that tells how the run ended, in place of an exception that ends it."""
        self.job.logger.stop()
        stopped = isinstance(error, KeyboardInterrupt)
        cause = "interrupted" if stopped else f"{type(error).__name__}: {error}"
        self._status("stopped" if stopped else "failed", cause)

    def files(self) -> str:
        """What the run has left, for its last line."""
        left = sorted(path.name for path in self.job.directory.path.iterdir())
        return ", ".join(left)

    # --- one step ----------------------------------------------------------------------------------------------------

    def _take_step(self) -> None:
        job, lr = self.job, learning_rate(self.train, self.step, self.job.total_steps)
        self._seed_dropout()
        total = torch.zeros((), device=job.world.device)
        for micro, (tokens, targets) in enumerate(self.batches.step(self.step)):
            total += job.backend.micro_step(tokens, targets, last=micro == job.plan.grad_accum - 1)
        result = job.backend.step(lr)
        loss = (job.world.sum(total) / (job.plan.grad_accum * job.world.size)).item()
        self.step += 1
        self._count_skipped(skipped=result.skipped, loss=loss)
        seconds = self.clock.lap()
        self.throughput.add(seconds)
        self._log(loss, lr, result.grad_norm, seconds)

    def _seed_dropout(self) -> None:
        """Make dropout a function of seed, step and rank, so that a resumed run draws what the first would have."""
        if self.job.run.model.dropout:
            torch.manual_seed((self.train.seed * 1_000_003 + self.step) * 1_009 + self.job.world.rank)

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
        """Evaluate, sample and save where they are due; everything once more at the end."""
        train = self.train
        if _is_due(self.step, train.eval_every, last):
            self._evaluate()
        if train.sample_tokens and _is_due(self.step, train.sample_every, last):
            self._sample(show=last)
        if _is_due(self.step, train.checkpoint_every, last):
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
        is_best = self.best_val_loss is None or value < self.best_val_loss
        self.last_val_loss = value
        if is_best and math.isfinite(value):
            self.best_val_loss = value
        if self.metrics is not None:
            self.metrics.write(step=self.step, tokens=self.tokens, val_loss=value, val_tokens=int(counted))
        best = "the best so far" if is_best else f"best {self.best_val_loss:.4f}"
        job.logger.say(f"step {self.step}  held-out loss {value:.4f} over {int(counted):,} tokens ({best})")

    def _sample(self, *, show: bool) -> None:
        """Continue the sample prompt; every rank generates the same tokens, since a sharded model needs all of them."""
        job, tokenizer = self.job, self.job.data.tokenizer
        prompt = self._prompt_ids()
        settings = SamplingSettings(
            temperature=0.8, top_k=200, seed=self.train.seed, max_new_tokens=self.train.sample_tokens
        )
        job.backend.model.eval()
        tokens = torch.tensor([prompt], device=job.world.device)
        drawn = generate(job.backend.forward, job.run.model, tokens, settings, limit_vocab=tokenizer.vocab_size)
        text = tokenizer.decode([*prompt, *(int(token[0]) for token in drawn)])
        job.backend.model.train()
        if job.world.is_first:
            with job.directory.samples.open("a", encoding="utf-8") as file:
                file.write(f"--- step {self.step}\n{text}\n")
        if show:
            job.logger.say(f"\nsample after {self.step} steps:\n{text}\n")

    def _prompt_ids(self) -> list[int]:
        tokenizer = self.job.data.tokenizer
        if self.train.sample_prompt:
            return [int(token) for token in tokenizer.encode(self.train.sample_prompt)]
        if tokenizer.end_of_text is not None:
            return [tokenizer.end_of_text]
        return [int(self.job.data.val[0])]

    def _save(self) -> None:
        """Gather the canonical state on the first rank, which writes it."""
        job, scaler = self.job, self.job.backend.scaler
        progress = Progress(self.step, self.tokens, self.best_val_loss, scaler.scale, scaler.good_steps)
        header = Header(progress, as_file(job.run), job.data.tokenizer.as_dict())
        if job.world.is_first:
            path = store.save(job.directory.checkpoints, header, job.backend.states())
            store.prune(job.directory.checkpoints, self.train.keep_checkpoints)
            job.logger.say(f"step {self.step}  checkpoint {path}")
        else:
            for _ in job.backend.states():
                pass  # takes part in gathering
        job.world.barrier()
        self._status("running")

    # --- where we are ------------------------------------------------------------------------------------------------

    @property
    def tokens(self) -> int:
        """Tokens consumed by the run so far."""
        return self.step * self.job.plan.tokens

    def _is_over(self) -> bool:
        if self.step >= self.job.total_steps:
            return True
        limit = self.train.max_minutes
        return limit is not None and self.job.world.any(self.clock.total >= 60 * limit)

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
                val_loss=self.last_val_loss,
                best_val_loss=self.best_val_loss,
                skipped_steps=self.skipped,
                predicted_peak_bytes=None,
                measured_peak_bytes=peak_bytes(self.job.world.device),
            )

    def _cause_of_end(self) -> str:
        return (
            "all steps taken" if self.step >= self.job.total_steps else f"max_minutes {self.train.max_minutes} reached"
        )


def _is_due(step: int, every: int, last: bool) -> bool:
    """Whether something is due that happens every so many steps and, if it has not just happened, at the end."""
    on_schedule = every > 0 and step > 0 and step % every == 0
    return not on_schedule if last else on_schedule
