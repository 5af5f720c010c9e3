"""Keeps bad steps out of the weights: losses and gradients that are not finite, and loss spikes.

All ranks use the same two numbers, the mean loss and the gradient norm over all ranks, so they decide alike. They
decide when the gradients are complete and before the optimizer steps (:meth:`scalegpt.backends.base.Backend.step`). A
skipped step counts as a step of the run, and its learning rate and data are used up, but weights, moments and the
optimizer's step count do not change.

**The rule for a spike.** A loss is a spike if it is above both median + N × MAD and 1.2 × median. Median and MAD (the median
absolute deviation from the median) are those of the last ``spike_window`` losses of steps that were not skipped. N is
``spike_factor``. No step is a spike during the warm-up, or before there are ``spike_window`` losses. A spike lasts while
consecutive steps are above the limit, and is reported once.
"""

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from scalegpt.config import TrainConfig
from scalegpt.errors import RunError
from scalegpt.training.runs.directory import RunDirectory
from scalegpt.training.runs.files import finite, write_whole, writing
from scalegpt.training.runs.metrics_file import GRADIENT, LOSS, SPIKE, RecentSteps, SkippedStep

LEAST_RISE = 1.2
"""A loss of at most this multiple of the median is never a spike, not even if the MAD is tiny."""


@dataclass(frozen=True)
class Spike:
    """A loss spike.

    Attributes:
        step: number of the step, counted from 1.
        loss: the step's mean loss over all ranks.
        median: median of the recent losses.
        limit: a loss above this is a spike.
        begins: whether the spike begins with this step, that is, whether the step before was not a spike.
    """

    step: int
    loss: float
    median: float
    limit: float
    begins: bool

    def __str__(self) -> str:
        """The spike in words, as the run reports it."""
        return f"loss spike at step {self.step}: {self.loss:.4f}, above {self.limit:.4f} (median {self.median:.4f})"


class Guards:
    """Decides for each step of a run whether it may change the weights.

    Args:
        train: the settings.
        recent: losses and skips of the steps before the first step to judge.
        skipped: number of steps that the run has skipped so far.
    """

    def __init__(self, train: TrainConfig, recent: RecentSteps, skipped: int) -> None:
        self.train, self.recent, self.skipped = train, recent, skipped
        self._refusal: str | None = None
        self._spike: Spike | None = None

    def allow(self, step: int, loss: float) -> bool:
        """Whether the step may change the weights, judged by its loss.

        Args:
            step: number of the step, counted from 1.
            loss: the step's mean loss over all ranks.
        """
        self._spike = self.find_spike(step, loss)
        self._refusal = None
        if not isfinite(loss):
            self._refusal = LOSS
        elif self._spike is not None and self.train.on_spike in {"skip", "rollback"}:
            self._refusal = SPIKE
        return self._refusal is None

    def find_spike(self, step: int, loss: float) -> Spike | None:
        """Return the spike if the loss is one by the rule in the module's docstring, else None."""
        train, losses = self.train, self.recent.losses
        if train.on_spike == "off" or step <= train.warmup_steps or len(losses) < train.spike_window:
            return None
        median = statistics.median(losses)
        deviation = statistics.median(abs(value - median) for value in losses)
        limit = max(median + train.spike_factor * deviation, LEAST_RISE * median)
        return Spike(step, loss, median, limit, begins=not self.recent.spiking) if loss > limit else None

    def conclude(self, step: int, loss: float, *, skipped: bool) -> "Conclusion":
        """Record the outcome of the step that the last call of :meth:`allow` judged.

        Args:
            step: number of the step, counted from 1.
            loss: the step's mean loss over all ranks.
            skipped: whether the backend left the weights unchanged.
        """
        reason = (self._refusal or GRADIENT) if skipped else None
        self.skipped += skipped
        self.recent.add(step, loss, reason, spiking=self._spike is not None)
        return Conclusion(step, reason, self._spike)

    def as_status(self) -> dict[str, Any]:
        """The entries of ``run_status.json`` on skipped steps."""
        last = self.recent.last_skipped
        entry = None if last is None else {"step": last.step, "reason": last.reason}
        return {"skipped_steps": self.skipped, "last_skipped": entry}

    @property
    def gives_up(self) -> bool:
        """Whether the last ``max_skipped_in_a_row`` steps were all skipped, so that the run ends."""
        return len(self.recent.skipped_in_a_row) >= self.train.max_skipped_in_a_row

    def raise_skipped(self, advice: str = "") -> None:
        """End a run whose last steps were all skipped.

        Raises:
            RunError: always.
        """
        skipped = self.recent.skipped_in_a_row
        last, reasons = skipped[-1], ", ".join(dict.fromkeys(each.reason for each in skipped))
        raise RunError(
            f"{len(skipped)} steps in a row up to step {last.step} were skipped ({reasons}; last loss {last.loss:.4g}); "
            "bad_steps.jsonl names their samples: look at these, lower --learning_rate, or use --precision bf16"
            f"{'; ' if advice else ''}{advice}"
        )


@dataclass(frozen=True)
class Conclusion:
    """The outcome of a step.

    Attributes:
        step: number of the step, counted from 1.
        reason: why the step was skipped; None: it was taken.
        spike: the spike, if the step's loss is one; else None.
    """

    step: int
    reason: str | None
    spike: Spike | None

    def warning(self, precision: str) -> str | None:
        """The warning to print; None where there is nothing to report.

        With fp16, a gradient that is not finite is not reported: the loss scaler finds its scale by such gradients.
        """
        if self.spike is not None:
            skipped = "; the step is skipped" if self.reason else ""
            return f"warning: {self.spike}{skipped}" if self.spike.begins else None
        if self.reason is None or (self.reason == GRADIENT and precision == "fp16"):
            return None
        return f"warning: step {self.step} is skipped: {self.reason}"

    def as_metrics(self) -> dict[str, Any]:
        """The entries to add to the step's line in ``metrics.jsonl``; empty for a good step."""
        entries: dict[str, Any] = {"skipped": True, "reason": self.reason} if self.reason else {}
        return entries | ({"spike": True} if self.spike else {})


def write_bad_steps(directory: RunDirectory, steps: Iterable[SkippedStep]) -> None:
    """Write ``bad_steps.jsonl``: a line for each skipped step that ended the run, with the step's training samples.

    Raises:
        RunError: the file cannot be written.
    """
    lines = []
    for step in steps:
        stretch = directory.ledger.stretch_of(step.step)
        windows = [] if stretch is None else [asdict(window) for window in stretch.windows(step.step)]
        lines.append(json.dumps({**asdict(step), "loss": finite(step.loss), "windows": windows}) + "\n")
    with writing(directory.bad_steps):
        write_whole(directory.bad_steps, "".join(lines))
