"""``metrics.jsonl``: a line for each step and each evaluation. What it says up to a checkpoint is read in one pass.

A checkpoint is written before the evaluation and the sample of its step. A process that ends in between leaves these two
undone, and the resumed run does them first. So an interrupted run ends with the same files as an undisturbed one.
"""

import json
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf, isfinite, nan
from pathlib import Path
from typing import Any, TextIO

from scalegpt.config import TrainConfig
from scalegpt.config.train import MOST_STEPS
from scalegpt.structured import read_lines
from scalegpt.training.runs.files import finite, writing
from scalegpt.training.schedules import is_due

_NUMBERS = frozenset({"loss", "val_loss", "lr", "grad_norm", "step_seconds", "tokens_per_second", "tokens"})
"""The values of a line that are drawn or added up, and so must be numbers."""

LOSS, GRADIENT, SPIKE = "loss not finite", "gradient not finite", "loss spike"
"""Why a step was skipped, in the words of ``metrics.jsonl``."""


class MetricsFile:
    """Writes ``metrics.jsonl``: a :class:`~scalegpt.training.metrics.MetricSink` whose lines are flushed one by one.

    Raises:
        RunError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with writing(path):
            self._file: TextIO = path.open("a", encoding="utf-8")

    def log(self, values: Mapping[str, Any]) -> None:
        """Append a line; what is not finite becomes null, since JSON has no such numbers.

        Raises:
            RunError: it cannot be written.
        """
        clean = {key: finite(value) for key, value in values.items()}
        with writing(self.path):
            self._file.write(json.dumps(clean) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file; :meth:`log` has raised what could not be written."""
        with suppress(OSError):
            self._file.close()


def metric_lines(path: Path, until: float = inf) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a ``metrics.jsonl`` up to a step, each with its object; none where there is no such file.

    A line that a crash cut short, or that no run has written, is skipped.

    Raises:
        InputError: it cannot be read.
    """
    with suppress(FileNotFoundError):
        for line, values in read_lines(path):
            step = values.get("step")
            is_step = type(step) is int and 0 <= step <= min(until, MOST_STEPS)
            if is_step and all(_is_number(values[key]) for key in _NUMBERS & values.keys()):
                yield line, values


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and isfinite(value))


@dataclass(frozen=True)
class SkippedStep:
    """A step that did not change the weights, and why."""

    step: int
    reason: str
    loss: float


@dataclass
class RecentSteps:
    """What the guards know of the steps before. A resumed run takes it from ``metrics.jsonl``, and so judges alike.

    Attributes:
        losses: of the last steps that were taken, at most ``spike_window``.
        spiking: whether the last step was part of a spike.
        skipped_in_a_row: the last steps, as far as all of them were skipped.
        last_skipped: the last step that was skipped.
    """

    losses: deque[float]
    spiking: bool = False
    skipped_in_a_row: list[SkippedStep] = field(default_factory=list)
    last_skipped: SkippedStep | None = None

    def add(self, step: int, loss: float, reason: str | None, *, spiking: bool) -> None:
        """Add the next step; reason: why it was skipped, if it was."""
        self.spiking = spiking
        if reason is not None:
            self.last_skipped = SkippedStep(step, reason, loss)
            self.skipped_in_a_row.append(self.last_skipped)
            return
        self.skipped_in_a_row.clear()
        self.losses.append(loss)

    def add_line(self, values: dict[str, Any]) -> None:
        """Add the next step as its line in ``metrics.jsonl`` has it; older releases wrote no reason."""
        reason = str(values.get("reason", GRADIENT)) if values.get("skipped") else None
        loss = nan if values.get("loss") is None else float(values["loss"])
        self.add(int(values["step"]), loss, reason, spiking=bool(values.get("spike")))


@dataclass(frozen=True)
class History:
    """What ``metrics.jsonl`` says up to a step.

    Attributes:
        step: the last that is read of: a checkpoint's.
        recent: the steps before the next one.
        recorded: how many of the steps have a line.
        first_missing: the first step that has none; None: all have.
        is_last_recorded: whether the last step has a line.
        is_evaluated: whether the held-out loss after the last step has one.
        val_loss: that loss; None where it is not known or was not finite.
        size: bytes of the lines that were read.
    """

    step: int
    recent: RecentSteps
    recorded: int
    first_missing: int | None
    is_last_recorded: bool
    is_evaluated: bool
    val_loss: float | None
    size: int


def read_history(metrics: Path, step: int, spike_window: int) -> History:
    """Read a run's ``metrics.jsonl``, which need not exist, up to a step.

    Raises:
        InputError: it cannot be read.
    """
    recent, recorded, size = RecentSteps(deque(maxlen=spike_window)), set[int](), 0
    evaluations: list[Any] = []
    for line, values in metric_lines(metrics, until=step):
        size += len(line.encode())
        if "loss" in values:
            recent.add_line(values)
            recorded.add(values["step"])
        if "val_loss" in values and values["step"] == step:
            evaluations.append(values["val_loss"])
    recorded.discard(0)
    return History(
        step=step,
        recent=recent,
        recorded=len(recorded),
        first_missing=_first_missing(recorded) if len(recorded) < step else None,
        is_last_recorded=step in recorded,
        is_evaluated=bool(evaluations),
        val_loss=float(evaluations[-1]) if evaluations and type(evaluations[-1]) in {int, float} else None,
        size=size,
    )


def _first_missing(recorded: set[int]) -> int:
    step = 1
    while step in recorded:
        step += 1
    return step


@dataclass(frozen=True)
class PendingWork:
    """What is to be done for the step of a checkpoint before the next step.

    Attributes:
        evaluation: whether to compute the held-out loss.
        sample: whether to generate a sample.
    """

    evaluation: bool = False
    sample: bool = False

    @property
    def anything(self) -> bool:
        """Whether something is to be done."""
        return self.evaluation or self.sample


def pending_work(history: History, train: TrainConfig, *, finished: bool, sampled: bool, at_end: bool) -> PendingWork:
    """What an earlier process did not do after the checkpoint that a run resumes from.

    Args:
        history: up to the checkpoint's step.
        train: what is due when.
        finished: whether the run had ended as it should: then nothing is pending.
        sampled: whether the step has its sample.
        at_end: whether the run has no more steps: then both are due.
    """
    if finished or not history.is_last_recorded:
        return PendingWork()  # of a step that the file does not have nothing can be said
    evaluates = at_end or is_due(history.step, train.eval_every)
    samples = train.sample_tokens > 0 and (at_end or is_due(history.step, train.sample_every))
    return PendingWork(evaluates and not history.is_evaluated, samples and not sampled)
