"""What keeps a bad step out of the weights: losses and gradients that are not finite, and loss spikes.

All ranks judge by the same numbers, the mean loss and the gradient norm over all ranks, and so they judge alike. They do so
when the gradients are complete and before the optimizer steps (:meth:`scalegpt.backends.base.Backend.step`). A step that is
left out counts as a step of the run, its learning rate and its data are used up, but weights, moments and the optimizer's own
count stay as they were.

**The rule for a spike.** Let m be the median of the losses of the last ``spike_window`` steps that were taken, and d the
median of their distances from m. A step's loss is a spike if it is above both ``m + spike_factor * d`` and ``1.2 * m``.
Nothing is judged during the warm-up, nor before there are ``spike_window`` such steps. A spike lasts as long as one step
after another is above; it is told once.
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
from scalegpt.training.runs.history import GRADIENT, LOSS, SPIKE, RecentSteps, SkippedStep

LEAST_RISE = 1.2
"""A loss below this multiple of the median is no spike, however still the losses were before."""


@dataclass(frozen=True)
class Spike:
    """A loss that is above what the steps before it allow.

    Attributes:
        step: counted from 1.
        begins: whether the step before was none.
    """

    step: int
    loss: float
    median: float
    limit: float
    begins: bool

    def __str__(self) -> str:
        """For the progress lines."""
        return f"loss spike at step {self.step}: {self.loss:.4f}, above {self.limit:.4f} (median {self.median:.4f})"


class Guards:
    """Judges the steps of a run.

    Args:
        train: the limits.
        known: the steps before.
        skipped: how many were left out until now.
    """

    def __init__(self, train: TrainConfig, known: RecentSteps, skipped: int) -> None:
        self.train, self.known, self.skipped = train, known, skipped
        self._refusal: str | None = None
        self._spike: Spike | None = None

    def allow(self, step: int, loss: float) -> bool:
        """Whether the step may change the weights, as far as its loss tells.

        Args:
            step: counted from 1.
            loss: the mean over all ranks.
        """
        self._spike = self.find_spike(step, loss)
        self._refusal = None
        if not isfinite(loss):
            self._refusal = LOSS
        elif self._spike is not None and self.train.on_spike in {"skip", "rollback"}:
            self._refusal = SPIKE
        return self._refusal is None

    def find_spike(self, step: int, loss: float) -> Spike | None:
        """The spike that the loss is by the rule above, if it is one."""
        train, losses = self.train, self.known.losses
        if train.on_spike == "off" or step <= train.warmup_steps or len(losses) < train.spike_window:
            return None
        median = statistics.median(losses)
        deviation = statistics.median(abs(value - median) for value in losses)
        limit = max(median + train.spike_factor * deviation, LEAST_RISE * median)
        return Spike(step, loss, median, limit, begins=not self.known.spiking) if loss > limit else None

    def conclude(self, step: int, loss: float, *, skipped: bool) -> "Conclusion":
        """Take note of how a step went.

        Args:
            step: the one that :meth:`allow` was asked for.
            loss: the same.
            skipped: whether the weights stayed as they were.
        """
        reason = (self._refusal or GRADIENT) if skipped else None
        self.skipped += skipped
        self.known.add(step, loss, reason, spiking=self._spike is not None)
        return Conclusion(step, reason, self._spike)

    def as_status(self) -> dict[str, Any]:
        """What ``run_status.json`` says of steps left out."""
        last = self.known.last_skipped
        told = None if last is None else {"step": last.step, "reason": last.reason}
        return {"skipped_steps": self.skipped, "last_skipped": told}

    @property
    def gives_up(self) -> bool:
        """Whether as many steps in a row were left out as may be."""
        return len(self.known.skipped_in_a_row) >= self.train.max_skipped_in_a_row

    def raise_row(self, way_back: str = "") -> None:
        """End a run whose steps are all left out.

        Args:
            way_back: which earlier checkpoint to go back to, and how.

        Raises:
            RunError: ``max_skipped_in_a_row`` were.
        """
        row = self.known.skipped_in_a_row
        last, reasons = row[-1], ", ".join(dict.fromkeys(each.reason for each in row))
        raise RunError(
            f"{len(row)} steps in a row up to step {last.step} were left out ({reasons}; last loss {last.loss:.4g}); "
            "bad_steps.jsonl names their samples: look at these, lower --learning_rate, or use --precision bf16"
            f"{'; ' if way_back else ''}{way_back}"
        )


@dataclass(frozen=True)
class Conclusion:
    """How a step went.

    Attributes:
        step: counted from 1.
        reason: why it was left out; None: it was not.
        spike: that it is part of, or None.
    """

    step: int
    reason: str | None
    spike: Spike | None

    def warning(self, precision: str) -> str | None:
        """What to tell of it; fp16 finds its loss scale by gradients that are not finite, which is nothing to tell."""
        if self.spike is not None:
            left_out = "; the step is left out" if self.reason else ""
            return f"warning: {self.spike}{left_out}" if self.spike.begins else None
        if self.reason is None or (self.reason == GRADIENT and precision == "fp16"):
            return None
        return f"warning: step {self.step} is left out: {self.reason}"

    def as_metrics(self) -> dict[str, Any]:
        """What the step's line in ``metrics.jsonl`` says of it; nothing of a good step."""
        told: dict[str, Any] = {"skipped": True, "reason": self.reason} if self.reason else {}
        return told | ({"spike": True} if self.spike else {})


def write_bad_steps(directory: RunDirectory, steps: Iterable[SkippedStep]) -> None:
    """Write ``bad_steps.jsonl``: the samples of the steps that ended a run, a step a line.

    Raises:
        RunError: it cannot be written.
    """
    lines = []
    for step in steps:
        stretch = directory.ledger.stretch_of(step.step)
        windows = [] if stretch is None else [asdict(window) for window in stretch.windows(step.step)]
        lines.append(json.dumps({**asdict(step), "loss": finite(step.loss), "windows": windows}) + "\n")
    with writing(directory.bad_steps):
        write_whole(directory.bad_steps, "".join(lines))
