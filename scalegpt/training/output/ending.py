"""The summary that a run prints at its end: losses, time, speed and energy, and what to do next."""

import shlex
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from scalegpt.system.invocation import program
from scalegpt.training.runs.metrics_file import metric_lines
from scalegpt.units import human_count, human_time

JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True)
class Review:
    """Figures from ``metrics.jsonl``: the speed of this process's steps, and the evaluations of the whole run.

    Attributes:
        last: step and held-out loss of the last evaluation; None: no evaluation, or its loss was not finite.
        best: step and held-out loss of the evaluation with the lowest loss; None: no evaluation had a finite loss.
        tokens_per_second: median over this process's steps without the first, which warms up; None: no such step.
    """

    last: tuple[int, float] | None = None
    best: tuple[int, float] | None = None
    tokens_per_second: float | None = None

    @classmethod
    def of(cls, metrics: Path, since: int) -> "Review":
        """Read the file ``metrics``. This process took the steps after ``since``."""
        evaluations: list[tuple[int, float | None]] = []
        speeds = []
        for _, entry in metric_lines(metrics):
            if "val_loss" in entry:
                evaluations.append((entry["step"], entry["val_loss"]))
            elif entry["step"] > since + 1 and entry.get("tokens_per_second"):
                speeds.append(entry["tokens_per_second"])
        finite = [(step, loss) for step, loss in evaluations if loss is not None]
        return cls(
            last=finite[-1] if finite and evaluations[-1][1] is not None else None,
            best=min(finite, key=lambda each: each[1], default=None),
            tokens_per_second=statistics.median(speeds) if speeds else None,
        )


@dataclass(frozen=True)
class Work:
    """The work of this process.

    Attributes:
        steps: number of steps that it took.
        tokens: tokens that these steps consumed.
        seconds: time of the steps, evaluations and saves.
        predicted: predicted tokens per second; None: not known.
        joules: energy that the GPUs of the job took; None: not known.
        gpus: number of these GPUs.
    """

    steps: int
    tokens: int
    seconds: float
    predicted: float | None = None
    joules: float | None = None
    gpus: int = 0


def progress_lines(review: Review, work: Work) -> Iterator[str]:
    """The lines on losses and on time."""
    if review.best is not None:
        step, loss = review.best
        now = f"held-out {review.last[1]:.4f}, " if review.last is not None and review.last != review.best else ""
        yield f"loss     {now}best held-out {loss:.4f} at step {step:,}"
    if work.steps:
        yield f"time     {human_time(work.seconds)} for {work.steps:,} steps and {work.tokens:,} tokens"


def speed_lines(review: Review, work: Work) -> Iterator[str]:
    """The lines on predicted and measured speed, and on energy."""
    measured = review.tokens_per_second
    if measured and work.predicted:
        error = work.predicted / measured - 1
        yield (
            f"speed    {human_count(work.predicted)} tokens/s predicted, {human_count(measured)} measured "
            f"(median of the steps, prediction {error:+.1%})"
        )
    elif measured:
        yield f"speed    {human_count(measured)} tokens/s measured (median of the steps)"
    if work.joules and work.tokens:
        whose = "the GPU" if work.gpus == 1 else f"the {work.gpus} GPUs"
        yield (
            f"energy   {work.joules / JOULES_PER_KWH:.3g} kWh by {whose}, {work.joules / work.tokens:.3g} J a token, "
            f"{work.joules / max(work.seconds, 1e-9) / work.gpus:,.0f} W each"
        )


def next_lines(folder: Path) -> Iterator[str]:
    """Commands to try with a trained model."""
    command, run = shlex.join(program("scalegpt")), shlex.quote(str(folder))
    yield f'next     {command} sample {run} --prompt "Once upon a time"'
    yield f"         {command} eval {run} --input_file other_text.txt"


def contents(folder: Path) -> str:
    """The names of what is in a run's folder, without hidden files."""
    return ", ".join(sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")))
