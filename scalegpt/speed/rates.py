"""Measures this machine's processor: the rates with which the planner's time model best predicts the probes' times.

The time of a forward and backward pass is a sum over kinds of work. Each kind takes (amount of work) / (rate). The
amounts are known, the times are measured, and non-negative least squares give the rates. The rates therefore include
effects that the planner does not model, for example those of caches.
"""

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import psutil
import torch

from scalegpt.backends import World
from scalegpt.errors import RunError
from scalegpt.hardware.processor import MEASURED, Measured, Processor, ProcessorRates, keep, kept, threads_alone
from scalegpt.speed.probes import SHAPES, Probe, Timed, clock
from scalegpt.text import one_line

SECONDS = 2.5
"""No further round of a dtype's probes begins after this many seconds.

Only the second round may begin later, up to twice this time.
"""

LEAST_ROUNDS, MOST_ROUNDS = 2, 8

SLOW = 3.0
"""A dtype is measured with fewer tokens if a probe takes at least this many times as long in it as in fp32."""

COMPARED = "narrow"
"""The probe that is timed to find out whether a dtype is slow."""

DISTURBED = 1.3
"""The machine was busy if the median times of the probes' passes add up to this many times their least times."""

UNDISTURBED = 0.85
"""The machine is idle if at least this share of the cores that the probes want is idle or used by them."""

GLANCE = 0.3
"""Seconds for which :func:`is_busy` watches the cores."""

LONGEST = 180
"""Seconds after which measuring is given up."""

TRUST = 0.1
"""The weight of the other dtype's rates in the fit; each probe has weight 1."""

LEAST = 1e-18
"""The least seconds of a unit of work, for kinds of work that take no measurable time."""

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "TORCHELASTIC_RUN_ID")
"""Environment variables that make a process a rank of a job."""


@dataclass(frozen=True)
class Measurement:
    """The outcome of measuring a processor.

    Attributes:
        measured: its rates.
        seconds: how long measuring took.
        problem: why the rates could not be stored for later plans and runs; None: they were stored.
    """

    measured: Measured
    seconds: float
    problem: str | None

    def line(self) -> str:
        """Say in one line how long measuring took, and whether the rates were stored."""
        where = "stored for later plans and runs" if self.problem is None else f"not stored ({self.problem})"
        busy = "" if self.measured.quiet else "; the machine was busy, so a later run measures again"
        return f"the processor's rates were measured in {self.seconds:.1f} s, and are {where}{busy}"


def measure_if_needed() -> Measurement | None:
    """Measure the processor and store its rates, unless they are stored already; then return None.

    Rates that were measured on a busy machine are measured again when it is idle.

    Raises:
        RunError: as for :func:`measure_and_keep`.
    """
    known = kept(Processor.here(torch.__version__)).measured
    if known is not None and (known.quiet or is_busy()):
        return None
    return measure_and_keep()


def measure_and_keep() -> Measurement:
    """Measure the processor in a process of its own, and store its rates for later plans and runs.

    The separate process keeps the memory of the probes out of the run's measured memory.

    Raises:
        RunError: the process failed, for example for lack of memory.
    """
    start = time.perf_counter()
    is_rank = "TORCHELASTIC_RUN_ID" in os.environ  # torchrun sets OMP_NUM_THREADS, for ranks that share the cores
    hidden = {*LAUNCHERS, *(("OMP_NUM_THREADS",) if is_rank else ())}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-m", "scalegpt.speed"]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", timeout=LONGEST, check=False
        )
    except subprocess.TimeoutExpired:
        raise RunError(f"measuring the processor took more than {LONGEST} s; try again when it is idle") from None
    if done.returncode:
        last = one_line(done.stderr.strip().rpartition("\n")[2]) or f"exit status {done.returncode}"
        raise RunError(f"the processor could not be measured: {last}")
    measured = Measured.parse(json.loads(done.stdout))
    return Measurement(measured, time.perf_counter() - start, keep(Processor.here(torch.__version__), measured))


def main() -> None:
    """Measure the processor with the threads of a run on one process, and print its rates as JSON."""
    World.join("cpu")
    print(json.dumps(asdict(measure())))


def measure() -> Measured:
    """Measure the processor in fp32 and bf16, with torch's current number of threads."""
    cores = Cores()
    fp32, few = timed("fp32"), {precision: _few_tokens(precision) for precision in MEASURED}
    bf16 = timed("bf16", fewer=few["bf16"] > SLOW * few["fp32"])
    threads = torch.get_num_threads()
    # With one thread the clock counts the process's own time.
    undisturbed = threads == 1 or cores.available() >= UNDISTURBED * threads
    quiet = undisturbed and sum(each.typical for each in fp32) < DISTURBED * sum(each.least for each in fp32)
    first = fitted(fp32, quiet=quiet)
    return Measured(first, fitted(bf16, expected=first, quiet=quiet), quiet=quiet)


def _few_tokens(precision: str) -> float:
    """Time the second step of the probe :data:`COMPARED` with few tokens, in seconds."""
    probe = Probe(COMPARED, precision, fewer=True)
    probe.step(counts=False)
    return probe.step()


def timed(precision: str, *, fewer: bool = False) -> list[Timed]:
    """Time all probes in rounds, so that a short disturbance of the machine affects only a few steps of each.

    In a round each probe takes three steps. The first does not count, because it finds the caches filled by another probe.
    When the time is nearly over, each probe takes one step, which counts.
    """
    probes = {name: Probe(name, precision, fewer=fewer) for name in SHAPES}
    start = clock()
    for number in range(MOST_ROUNDS):
        if number and clock() - start > (SECONDS if number >= LEAST_ROUNDS else 2 * SECONDS):
            break
        for probe in probes.values():
            is_late = clock() - start > 2 * SECONDS
            probe.step(counts=is_late)
            for _ in range(0 if is_late else 2):
                probe.step()
    return [probe.timed() for probe in probes.values()]


def fitted(probes: Sequence[Timed], expected: ProcessorRates | None = None, *, quiet: bool = True) -> ProcessorRates:
    """The rates with which the time model predicts the probes' times with the least squares of relative errors.

    Args:
        probes: the work and the times.
        expected: the rates of another dtype. Where slow matmuls hide the cost of moving bytes or of starting kernels,
            the times do not determine these rates, and they stay near the expected ones.
        quiet: whether the machine was idle. The median times of an idle machine are used: for a moment a processor may run
            faster than it does for minutes. Of a busy machine the least times are used, which other processes affect least.
    """
    amounts, seconds = [], []
    for probe in probes:
        passes = zip(probe.work.forward, probe.work.backward, strict=True)
        flops, attention, moved, kernels, outputs, loss = map(sum, passes)
        amounts.append([flops, 2 * outputs, attention, moved, loss, kernels])
        seconds.append(probe.typical if quiet else probe.least)
    for place, unit in (
        () if expected is None else enumerate((1 / expected.memory, 1 / expected.loss, expected.kernel), 3)
    ):
        amounts.append([(column == place) / unit for column in range(6)])
        seconds.append(1.0)
    solved = non_negative(amounts, seconds, [1.0] * len(probes) + [TRUST] * (len(amounts) - len(probes)))
    matmul, filling, attention, memory, loss, kernel = (max(LEAST, each) for each in solved)
    largest = max(probes, key=lambda probe: probe.work.update.bytes)
    updating = max(largest.update - kernel * largest.work.update.kernels, 0.1 * largest.update)
    return ProcessorRates(
        matmul=1 / matmul,
        fill=filling / matmul if filling > LEAST else 0.0,
        attention=1 / attention,
        memory=1 / memory,
        loss=1 / loss,
        update=largest.work.update.bytes / updating,
        kernel=kernel,
    )


def non_negative(amounts: Sequence[Sequence[float]], seconds: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Solve ``amounts`` · x = ``seconds`` for x ≥ 0 by weighted least squares of the relative errors.

    Tries each set of unknowns that may differ from 0, with ordinary least squares. With few unknowns this is quick and
    exact.
    """
    wanted = torch.tensor(weights, dtype=torch.float64)[:, None]
    rows = wanted * torch.tensor(amounts, dtype=torch.float64) / torch.tensor(seconds, dtype=torch.float64)[:, None]
    scale = rows.amax(0).clamp(min=1e-300)
    rows /= scale
    best, least = torch.zeros(len(scale), dtype=torch.float64), float("inf")
    for count in range(1, len(scale) + 1):
        for chosen in itertools.combinations(range(len(scale)), count):
            some = rows[:, list(chosen)]
            x = torch.linalg.lstsq(some, wanted).solution
            error = float((some @ x - wanted).square().sum())
            if error < least and bool((x >= 0).all()):
                best, least = torch.zeros_like(best), error
                best[list(chosen)] = x[:, 0]
    return list((best / scale).tolist())


class Cores:
    """Watches how many cores other processes leave to this one, from its making on."""

    def __init__(self) -> None:
        self._start, self._idle, self._own = time.perf_counter(), _idle_seconds(), time.process_time()

    def available(self) -> float:
        """The number of cores that were idle or used by this process, on average since this object was made.

        The load average does not tell: it lags by a minute, and counts this process.
        """
        passed = max(time.perf_counter() - self._start, 1e-3)
        return (_idle_seconds() - self._idle + time.process_time() - self._own) / passed


def _idle_seconds() -> float:
    """Seconds for which cores were idle or waited for a disk, of all cores together, since the machine started."""
    times = psutil.cpu_times()
    return float(times.idle + getattr(times, "iowait", 0.0))


def is_busy() -> bool:
    """Whether other processes now use cores that a process that trains alone wants."""
    cores = Cores()
    time.sleep(GLANCE)
    return cores.available() < UNDISTURBED * threads_alone()
