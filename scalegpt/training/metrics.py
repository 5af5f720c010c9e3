"""What a run measures about itself (throughput, MFU, memory), and the interface of metric loggers."""

import math
import statistics
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, Protocol

import psutil
import torch

from scalegpt.backends import World
from scalegpt.hardware.nvml import CardGauge, energy_joules
from scalegpt.training.memory import card_uuid, largest_resident


class MetricSink(Protocol):
    """A logger of a run's metrics. The trainer on rank 0 has a list of sinks, of which ``metrics.jsonl`` is the first."""

    def log(self, values: Mapping[str, Any]) -> None:
        """Log the values of a step or of an evaluation.

        Args:
            values: the values by their names in ``metrics.jsonl``. ``step`` and ``tokens`` are always there. A step has
                ``loss`` and more, an evaluation ``val_loss``, and with several sources ``val_loss_by_source``: label → loss.
        """

    def log_sample(self, step: int, text: str) -> None:
        """Log the sample of a step, which ``samples.txt`` has already."""

    def close(self) -> None:
        """Close the sink at the end of the run, or before a rollback.

        A rollback removes logged steps and then opens new sinks.
        """


class Throughput:
    """Tokens per second, from the median time of the last steps, so that one slow step does not change it.

    Args:
        tokens_per_step: tokens of a step over all ranks.
        window: number of recent steps over which the median is taken.
    """

    def __init__(self, tokens_per_step: int, window: int = 20) -> None:
        self.tokens_per_step = tokens_per_step
        self.seconds: deque[float] = deque(maxlen=window)

    def add(self, seconds: float) -> None:
        """Add the time of a step."""
        self.seconds.append(seconds)

    @property
    def step_seconds(self) -> float:
        """Median seconds per step; NaN before the first step."""
        return statistics.median(self.seconds) if self.seconds else math.nan

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second over all ranks."""
        return self.tokens_per_step / self.step_seconds


def mfu(tokens_per_second: float, flops: int, peak: float | None, ranks: int) -> float | None:
    """Model FLOPs utilization: the share of the devices' dense peak FLOP/s that the model's own FLOPs use.

    Args:
        tokens_per_second: tokens per second over all ranks.
        flops: model FLOPs per token, forward and backward, without recompute.
        peak: dense peak FLOP/s of one device; None: not known, and the result is None.
        ranks: number of devices.
    """
    return tokens_per_second * flops / (peak * ranks) if peak else None


def peak_bytes(device: torch.device) -> int:
    """The peak memory of this process in bytes: of the CUDA allocator on a card, of resident memory on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else largest_resident()


class Gauges:
    """Measures the machine of rank 0 at every Nth step: host memory, and the card's memory and utilization.

    Args:
        device: rank 0's device.
        every: N.
    """

    def __init__(self, device: torch.device, every: int) -> None:
        self._every, self._process = every, psutil.Process()
        uuid = card_uuid(device)
        self._card = None if uuid is None else CardGauge(uuid)

    def read(self, step: int) -> dict[str, float]:
        """The entries to add to the step's line in ``metrics.jsonl``; empty where the step is not the Nth.

        ``host_used_bytes`` is the machine's memory in use, ``process_bytes`` this process's resident memory. Where NVML
        reports them, ``gpu_used_bytes`` and ``gpu_utilization`` follow.
        """
        if step % self._every:
            return {}
        memory = psutil.virtual_memory()
        host = {"host_used_bytes": memory.total - memory.available, "process_bytes": self._process.memory_info().rss}
        return {**host, **(self._card.read() if self._card is not None else {})}


class EnergyMeter:
    """Measures the energy that the GPUs of a job have taken since the meter was made.

    Args:
        world: the ranks, each with its device.
    """

    def __init__(self, world: World) -> None:
        self._world, self._uuid = world, card_uuid(world.device)
        self._before = self._now()

    def _now(self) -> float | None:
        return None if self._uuid is None else energy_joules(self._uuid)

    def mine(self) -> tuple[str, float] | None:
        """UUID and joules of this rank's GPU; None: not known."""
        now = self._now()
        return None if now is None or self._before is None else (str(self._uuid), now - self._before)

    def taken(self) -> dict[str, float]:
        """UUID of each GPU → joules; empty unless all are known. All ranks must call it together."""
        found = self._world.gather(self.mine())
        return {} if None in found else dict(each for each in found if each is not None)


class Stopwatch:
    """Measures the seconds since the stopwatch was made (``total``), and between two calls of ``lap``."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()

    def lap(self) -> float:
        """Return the seconds since the last call, or for the first call since the stopwatch was made."""
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        return seconds

    @property
    def total(self) -> float:
        """Seconds since the stopwatch was made."""
        return time.perf_counter() - self.start
