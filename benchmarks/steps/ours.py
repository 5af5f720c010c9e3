"""Takes steps with our trainer, prepared as in ``scalegpt train``, and times them as a whole or by phase."""

import pickle
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from scalegpt.backends import World
from scalegpt.config.presets import resolve
from scalegpt.training.batches import TrainingBatches
from scalegpt.training.request import Request
from scalegpt.training.setup.prepare import prepare
from scalegpt.training.trainer import Trainer

DATA, FORWARD, LOSS, BACKWARD, NORM, OPTIMIZER, REST = (
    "data", "forward", "loss", "backward", "norm and clipping", "optimizer", "everything else",
)  # fmt: skip
PHASES = (DATA, FORWARD, LOSS, BACKWARD, NORM, OPTIMIZER, REST)
"""The phases of a step. ``loss`` includes the head; the chunked loss also computes its gradients there. ``everything else``
is reductions, logging, metrics and guards."""

QUIET: dict[str, Any] = {
    "eval_every": 0, "sample_tokens": 0, "checkpoint_every": 0, "log_every": 10**6, "warmup_steps": 0,
}  # fmt: skip
"""Settings with which the trainer takes only steps, without evaluation, samples, checkpoints or warm-up."""

TOKENS_OF_DATA = 2**20
GPT2_TOKENS = 50257


def random_tokens(folder: Path, vocabulary: int, seed: int = 0) -> Path:
    """Write uniformly random tokens in nanoGPT's format, and return their folder.

    A step takes the same time on any tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for name, count in (("train", TOKENS_OF_DATA), ("val", 2**17)):
        generator.integers(min(vocabulary, GPT2_TOKENS), size=count, dtype=np.uint16).tofile(folder / f"{name}.bin")
    if vocabulary < GPT2_TOKENS:  # characters, as nanoGPT's data/shakespeare_char has them
        characters = [chr(33 + token) for token in range(vocabulary)]
        names = {"itos": dict(enumerate(characters)), "stoi": {each: i for i, each in enumerate(characters)}}
        (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocabulary, **names}))
    return folder


class OurSteps:
    """Steps of our trainer.

    Args:
        flags: settings, as on the trainer's command line.
        preset: a preset's name; None: no preset.
        folder: the folder for data and run.
        world: the ranks.
        max_iters: the length of the run in steps; it must be larger than the number of steps taken.
    """

    def __init__(
        self, flags: dict[str, Any], preset: str | None, folder: Path, world: World, max_iters: int = 10**6
    ) -> None:
        flags = {**QUIET, "max_iters": max_iters, "vocab_size": flags.get("vocab_size", 50304), **flags}
        if "input_file" not in flags:
            flags["input_file"] = str(
                world.on_first(lambda: random_tokens(folder / "tokens", int(flags["vocab_size"])))
            )
        run = resolve(preset=preset, flags=flags, name="bench")
        self.world = world
        request = Request(run, folder / "runs", fresh=True, given=frozenset(flags))
        self.trainer = Trainer(prepare(request, world))
        self.job = self.trainer.job

    @property
    def tokens(self) -> int:
        """Tokens of a step over all ranks."""
        return self.job.batch_plan.tokens

    @property
    def layout(self) -> str:
        """The run's settings that affect speed, in words."""
        train, parallel, plan = self.job.run.train, self.job.run.parallel, self.job.batch_plan
        stage = "" if parallel.backend == "plain" else f" {parallel.stage}"
        return (
            f"{parallel.backend}{stage}, {train.precision}, micro batch {plan.micro_batch} × {plan.grad_accum}, "
            f"recompute {train.recompute}, {train.loss} loss, compile {train.compile}"
        )

    def step(self) -> float:
        """Take a step, and return the seconds until the device has finished it."""
        begin = time.perf_counter()
        self.trainer._take_step()
        self._wait()
        return time.perf_counter() - begin

    def loader_rate(self, steps: int) -> float:
        """Measure the tokens per second of the data loader alone, over all ranks and ``steps`` steps."""
        job = self.job
        batches = TrainingBatches(job.data.train, job.batch_plan, self.world, job.run.train.seed)
        begin = time.perf_counter()
        for step in range(steps):
            for _ in batches.step(step * job.batch_plan.sequences):
                pass
        seconds = time.perf_counter() - begin
        batches.close()
        return steps * job.batch_plan.tokens / seconds

    def close(self) -> None:
        """End the trainer's threads and close its files."""
        self.trainer.close()

    def _wait(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)

    # --- by phase ----------------------------------------------------------------------------------------------------

    def phases(self, steps: int) -> dict[str, float]:
        """Median seconds of each phase over ``steps`` steps.

        Waiting for the device between phases makes the steps longer.
        """
        seen = []
        for _ in range(steps):
            clock = _Clock(self._wait)
            with clock.around(self.trainer):
                self.step()
            seen.append(clock.spent)
        return {phase: statistics.median(spent[phase] for spent in seen) for phase in PHASES}


class _Clock:
    """Times the phases of one step. The time of a phase within another phase counts only for the inner one.

    Args:
        wait: a function that waits for the device.
    """

    def __init__(self, wait: Callable[[], None]) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self._wait, self._open, self._last = wait, [REST], time.perf_counter()

    @contextmanager
    def around(self, trainer: Trainer) -> Iterator[None]:
        """Time the phases of the trainer's step within the block, by wrapping the trainer's methods."""
        backend = trainer.job.backend
        with ExitStack() as stack:
            for owner, name, wrap in (
                (backend.model, "loss", self._loss),
                (backend, "micro_step", partial(self._timed, FORWARD)),
                (backend, "step", partial(self._timed, NORM)),
                (backend.optimizer, "step", partial(self._timed, OPTIMIZER)),
                (trainer.batches, "step", self._batches),
            ):
                stack.enter_context(patch.object(owner, name, wrap(getattr(owner, name))))
            self._mark()
            self.spent.clear()
            yield
            self._mark()

    def _mark(self) -> None:
        """Add the time since the last mark to the innermost open phase."""
        self._wait()
        now = time.perf_counter()
        self.spent[self._open[-1]] += now - self._last
        self._last = now

    @contextmanager
    def _phase(self, phase: str) -> Iterator[None]:
        self._mark()
        self._open.append(phase)
        yield
        self._mark()
        self._open.pop()

    def _timed(self, phase: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def work(*arguments: Any, **options: Any) -> Any:
            with self._phase(phase):
                return real(*arguments, **options)

        return work

    def _loss(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def loss(*arguments: Any) -> Any:
            with self._phase(LOSS):
                result = real(*arguments)
            self._open[-1] = BACKWARD  # what follows in this micro step
            return result

        return loss

    def _batches(self, real: Callable[[int], Iterator[Any]]) -> Callable[[int], Iterator[Any]]:
        def step(first: int) -> Iterator[Any]:
            batches = iter(real(first))
            while True:
                with self._phase(DATA):
                    batch = next(batches, None)
                if batch is None:
                    return
                yield batch

        return step
