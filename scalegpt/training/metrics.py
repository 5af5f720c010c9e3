"""What a run measures of itself: throughput, MFU, memory; and where the values of a step are logged."""

import math
import statistics
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from scalegpt.training.memory import largest_resident


class MetricSink(Protocol):
    """Takes what is measured of a run; the first rank's trainer has a list of sinks, and ``metrics.jsonl`` is the first."""

    def log(self, values: Mapping[str, Any]) -> None:
        """Take the values of a step, or of an evaluation.

        Args:
            values: by the names of ``metrics.jsonl``: ``step`` and ``tokens`` always; a step has ``loss``, an evaluation
                ``val_loss``.
        """

    def close(self) -> None:
        """Take no more: the run ends, or a rollback is about to drop some of the steps."""


class Throughput:
    """Tokens per second by the median of the last steps, which one slow step (compile, a checkpoint) does not change."""

    def __init__(self, tokens_per_step: int, window: int = 20) -> None:
        self.tokens_per_step = tokens_per_step
        self.seconds: deque[float] = deque(maxlen=window)

    def add(self, seconds: float) -> None:
        """Count a step."""
        self.seconds.append(seconds)

    @property
    def step_seconds(self) -> float:
        """Median seconds per step; NaN before the first."""
        return statistics.median(self.seconds) if self.seconds else math.nan

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second over all ranks."""
        return self.tokens_per_step / self.step_seconds


def mfu(tokens_per_second: float, flops: int, peak: float | None, ranks: int) -> float | None:
    """Share of the devices' dense peak that the model's own FLOPs use; None where the device's peak is not known."""
    return tokens_per_second * flops / (peak * ranks) if peak else None


def peak_bytes(device: torch.device) -> int:
    """The largest memory that this process has held: the CUDA allocator's peak, or the resident set's on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else largest_resident()


class Stopwatch:
    """Seconds since it was made, and since it was last asked."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        return seconds

    @property
    def total(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.start
