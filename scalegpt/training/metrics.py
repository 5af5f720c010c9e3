"""What a run measures of itself: throughput, MFU, memory; and the file that keeps it, a line a step."""

import json
import math
import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import torch

from scalegpt.config.train import MOST_STEPS
from scalegpt.structured import read_lines
from scalegpt.training.memory import largest_resident
from scalegpt.training.runs.files import finite, writing


class Throughput:
    """Tokens per second over the last steps: the median, which a slow step (compile, a checkpoint) does not move."""

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
    """The largest memory that this process has held: the CUDA allocator's peak, or on CPU the resident set's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return largest_resident()


class MetricsFile:
    """``metrics.jsonl``: one JSON object a line, flushed as it is written.

    Raises:
        RunError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with writing(path):
            self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, **values: Any) -> None:
        """Append a line; what is not finite becomes null, since JSON has no word for it."""
        clean = {key: finite(value) for key, value in values.items()}
        with writing(self.path):
            self._file.write(json.dumps(clean) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file; what could not be written has been said already."""
        with suppress(OSError):
            self._file.close()


_NUMBERS = frozenset({"loss", "val_loss", "lr", "grad_norm", "step_seconds", "tokens_per_second", "tokens"})
"""What is drawn or added up from a line of metrics."""


def metric_lines(path: Path, until: float = math.inf) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of ``metrics.jsonl`` up to a step, each with its object; none where there is no such file.

    What a crash cut short, and what no run has written, is skipped.

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
    return value is None or (isinstance(value, int | float) and math.isfinite(value))


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
