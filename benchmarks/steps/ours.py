"""Our trainer, prepared as ``scalegpt train`` does it, whose steps are taken one at a time and timed by phase."""

import pickle
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
"""``loss`` holds the head, and chunked its gradients too; ``everything else`` is reductions, logging, metrics, guards."""

QUIET: dict[str, Any] = {
    "eval_every": 0, "sample_tokens": 0, "checkpoint_every": 0, "log_every": 10**6, "warmup_steps": 0,
}  # fmt: skip
"""Only steps, and what every step does."""

TOKENS_OF_DATA = 2**20
GPT2_TOKENS = 50257


def random_tokens(folder: Path, vocabulary: int, seed: int = 0) -> Path:
    """A folder of uniformly random tokens in nanoGPT's format: what they are does not change what a step costs."""
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
        preset: a preset's name.
        folder: where data and run go.
        world: the ranks.
        max_iters: more steps than will be taken.
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
        """Tokens of a step, of all ranks."""
        return self.job.batch_plan.tokens

    @property
    def layout(self) -> str:
        """The settings in force that matter to speed, in words."""
        train, parallel, plan = self.job.run.train, self.job.run.parallel, self.job.batch_plan
        stage = "" if parallel.backend == "plain" else f" {parallel.stage}"
        return (
            f"{parallel.backend}{stage}, {train.precision}, micro batch {plan.micro_batch} × {plan.grad_accum}, "
            f"recompute {train.recompute}, {train.loss} loss, compile {train.compile}"
        )

    def step(self) -> float:
        """Take a step; seconds until the device has done it."""
        begin = time.perf_counter()
        self.trainer._take_step()
        self._wait()
        return time.perf_counter() - begin

    def loader_rate(self, steps: int) -> float:
        """Tokens a second, of all ranks, that the loader gives when nothing else is done."""
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
        """End threads and close files."""
        self.trainer.close()

    def _wait(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)

    # --- by phase ----------------------------------------------------------------------------------------------------

    def phases(self, steps: int) -> dict[str, float]:
        """Median seconds of each phase over some steps. The device is waited for between phases, so they add up to more."""
        seen: dict[str, list[float]] = defaultdict(list)
        for _ in range(steps):
            for phase, seconds in self._one_by_phase().items():
                seen[phase].append(seconds)
        return {phase: statistics.median(seen[phase]) for phase in PHASES}

    def _one_by_phase(self) -> dict[str, float]:
        phases = _Phases(self._wait)
        phases.begin(self.trainer)
        try:
            whole = self.step()
        finally:
            phases.end()
        return phases.of(whole)


class _Phases:
    """Puts a clock around the parts of one step of a trainer, and takes it away again.

    Args:
        wait: waits for the device.
    """

    def __init__(self, wait: Callable[[], None]) -> None:
        self.wait = wait
        self.spent: dict[str, float] = defaultdict(float)
        self.loss_ended = 0.0
        self.replaced: list[tuple[Any, str, Any, bool]] = []

    def begin(self, trainer: Trainer) -> None:
        backend = trainer.job.backend
        self._replace(backend.model, "loss", self._loss)
        self._replace(backend, "micro_step", self._micro_step)
        self._replace(backend, "step", self._step)
        self._replace(backend.optimizer, "step", lambda real: lambda *a, **o: self._timed(OPTIMIZER, real, *a, **o))
        self._replace(trainer.batches, "step", self._batches)

    def end(self) -> None:
        for owner, name, real, was_its_own in self.replaced:
            if was_its_own:
                setattr(owner, name, real)
            else:  # the class's
                delattr(owner, name)

    def of(self, whole: float) -> dict[str, float]:
        """Seconds of each phase of a step that took so long."""
        self.spent[REST] = whole - sum(self.spent[phase] for phase in PHASES[:-1])
        return {phase: self.spent[phase] for phase in PHASES}

    def _replace(self, owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
        real = getattr(owner, name)
        self.replaced.append((owner, name, real, name in vars(owner)))
        setattr(owner, name, wrap(real))

    def _timed(self, phase: str, work: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        self.wait()
        begin = time.perf_counter()
        result = work(*arguments, **options)
        self.wait()
        self.spent[phase] += time.perf_counter() - begin
        return result

    def _loss(self, real: Any) -> Any:
        def loss(*arguments: Any) -> Any:
            result = self._timed(LOSS, real, *arguments)
            self.loss_ended = time.perf_counter()
            return result

        return loss

    def _micro_step(self, real: Any) -> Any:
        def micro_step(*arguments: Any, **options: Any) -> Any:
            self.wait()
            begin, loss_before = time.perf_counter(), self.spent[LOSS]
            result = real(*arguments, **options)
            self.wait()
            self.spent[BACKWARD] += time.perf_counter() - self.loss_ended
            self.spent[FORWARD] += self.loss_ended - begin - (self.spent[LOSS] - loss_before)
            return result

        return micro_step

    def _step(self, real: Any) -> Any:
        def step(*arguments: Any, **options: Any) -> Any:
            before = self.spent[OPTIMIZER]
            result = self._timed(NORM, real, *arguments, **options)
            self.spent[NORM] -= self.spent[OPTIMIZER] - before
            return result

        return step

    def _batches(self, real: Any) -> Any:
        def step(first: int) -> Iterator[Any]:
            batches = iter(real(first))
            while True:
                begin = time.perf_counter()
                batch = next(batches, None)
                self.spent[DATA] += time.perf_counter() - begin
                if batch is None:
                    return
                yield batch

        return step
