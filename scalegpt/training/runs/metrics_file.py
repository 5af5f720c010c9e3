"""Writes and reads ``metrics.jsonl``, which has a line for each step and each evaluation.

A resumed run reads the file once, up to the checkpoint's step. It learns the recent losses, which the guards need, and
whether the step's evaluation is missing: a checkpoint is written before the evaluation and the sample of its step, so a
process may end in between. The resumed run then evaluates and samples first. In this way an interrupted run ends with
the same files as an undisturbed run.
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
"""Keys of a line whose values must be numbers or null, since they are plotted or added up."""

LOSS, GRADIENT, SPIKE = "loss not finite", "gradient not finite", "loss spike"
"""The reasons for skipping a step, in the words of ``metrics.jsonl``."""


class MetricsFile:
    """Appends to ``metrics.jsonl`` and flushes each line. A :class:`~scalegpt.training.metrics.MetricSink`.

    Raises:
        RunError: the file cannot be opened for writing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with writing(path):
            self._file: TextIO = path.open("a", encoding="utf-8")

    def log(self, values: Mapping[str, Any]) -> None:
        """Append a line with the values. NaN and infinities become null, since JSON does not have them.

        Raises:
            RunError: the line cannot be written.
        """
        clean = {key: finite(value) for key, value in values.items()}
        with writing(self.path):
            self._file.write(json.dumps(clean) + "\n")
            self._file.flush()

    def log_sample(self, step: int, text: str) -> None:
        """Do nothing: samples have a file of their own."""

    def close(self) -> None:
        """Close the file. Errors are ignored here, since :meth:`log` flushes each line and raises its errors."""
        with suppress(OSError):
            self._file.close()


def metric_lines(path: Path, until: float = inf) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the lines of a ``metrics.jsonl`` up to a step, each as text and as parsed JSON; none where there is no file.

    Lines that a crash cut short, and lines that are not valid, are skipped.

    Args:
        path: the file.
        until: the last step to read.

    Raises:
        InputError: the file cannot be read.
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
    """A step that did not change the weights, with the reason for it and the step's mean loss over all ranks."""

    step: int
    reason: str
    loss: float


@dataclass
class RecentSteps:
    """The recent steps that the guards use to judge the next one.

    A resumed run reads them from ``metrics.jsonl``, so it judges as an uninterrupted run would.

    Attributes:
        losses: losses of the last steps that were not skipped, at most ``spike_window``.
        spiking: whether the last step was part of a loss spike.
        skipped_in_a_row: the unbroken series of skipped steps up to the last step; empty if the last step was taken.
        last_skipped: the last step that was skipped; None: no step was.
    """

    losses: deque[float]
    spiking: bool = False
    skipped_in_a_row: list[SkippedStep] = field(default_factory=list)
    last_skipped: SkippedStep | None = None

    def add(self, step: int, loss: float, reason: str | None, *, spiking: bool) -> None:
        """Add the next step.

        Args:
            step: number of the step, counted from 1.
            loss: the step's mean loss over all ranks.
            reason: why the step was skipped; None: it was taken.
            spiking: whether the loss is part of a spike.
        """
        self.spiking = spiking
        if reason is not None:
            self.last_skipped = SkippedStep(step, reason, loss)
            self.skipped_in_a_row.append(self.last_skipped)
            return
        self.skipped_in_a_row.clear()
        self.losses.append(loss)

    def add_line(self, values: dict[str, Any]) -> None:
        """Add the next step from its line in ``metrics.jsonl``. Older releases wrote no reason for a skipped step."""
        reason = str(values.get("reason", GRADIENT)) if values.get("skipped") else None
        loss = nan if values.get("loss") is None else float(values["loss"])
        self.add(int(values["step"]), loss, reason, spiking=bool(values.get("spike")))


@dataclass(frozen=True)
class History:
    """What ``metrics.jsonl`` says about the steps up to ``step``.

    Attributes:
        step: the step of a checkpoint, up to which the file was read.
        recent: the last steps, which the guards use to judge the next one.
        recorded: number of steps that have a line.
        first_missing: first step without a line; None: all steps have one.
        is_last_recorded: whether ``step`` has a line.
        is_evaluated: whether the evaluation right after ``step`` has a line.
        val_loss: held-out loss of that evaluation; None where there is no line, or the loss was not finite.
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

    Args:
        metrics: path of the file.
        step: the last step to read.
        spike_window: number of losses to keep for the guards.

    Raises:
        InputError: the file cannot be read.
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
    """Work that was not done after the checkpoint of a step. A resumed run does it before its next step.

    Attributes:
        evaluation: whether the held-out loss is still to be computed.
        sample: whether a sample is still to be generated.
    """

    evaluation: bool = False
    sample: bool = False

    @property
    def anything(self) -> bool:
        """Whether there is any such work."""
        return self.evaluation or self.sample


def pending_work(history: History, train: TrainConfig, *, finished: bool, sampled: bool, at_end: bool) -> PendingWork:
    """Find the work that an earlier process did not do after the checkpoint from which the run resumes.

    Args:
        history: what ``metrics.jsonl`` says about the steps up to the checkpoint's step.
        train: the settings, which say when an evaluation and a sample are due.
        finished: whether the earlier process finished the run; then no work is left.
        sampled: whether ``samples.txt`` has the sample of the checkpoint's step.
        at_end: whether the checkpoint's step is the run's last, after which an evaluation and a sample are always due.
    """
    if finished or not history.is_last_recorded:
        return PendingWork()  # without the step's line, what the earlier process did is not known
    evaluates = at_end or is_due(history.step, train.eval_every)
    samples = train.sample_tokens > 0 and (at_end or is_due(history.step, train.sample_every))
    return PendingWork(evaluates and not history.is_evaluated, samples and not sampled)
