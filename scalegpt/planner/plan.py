"""A plan: a configuration on a machine, with its predicted memory and time.

:func:`make_plan` predicts a fixed configuration; :mod:`scalegpt.planner.search.choose` searches for the best one.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from scalegpt.config import RunConfig
from scalegpt.config.backends import Mesh
from scalegpt.hardware.gpus import GIB, find_card
from scalegpt.hardware.machine import ASSUMED, GIVEN, Machine
from scalegpt.planner.attention import attention_kernel
from scalegpt.planner.batches import BatchPlan
from scalegpt.planner.memory.cpu import ProcessOverheads, checkpoint_copy_bytes
from scalegpt.planner.memory.overheads import Overheads
from scalegpt.planner.memory.predict import predict_with
from scalegpt.planner.memory.step import Prediction
from scalegpt.planner.time.calibration import Calibration
from scalegpt.planner.time.rates import Rates, speed_range
from scalegpt.planner.time.step_time import StepTime, StepWork, least_seconds, step_time
from scalegpt.planner.time.work import Work, count_work, flops_per_token
from scalegpt.units import gib

HOST_PROCESS = int(2.5 * GIB)
"""Estimated bytes of host memory that one rank's process on a GPU takes for libraries and the driver."""

STAND_IN = "a100-80gb"
"""The card whose rates are used to compare plans if no card is named. In this case no time is printed."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A configuration on a machine, with its predicted memory and time."""

    run: RunConfig
    machine: Machine
    batch: BatchPlan
    prediction: Prediction
    overheads: Overheads
    time: StepTime
    peak_flops: float

    @property
    def peak_bytes(self) -> int:
        """Peak of the bytes that the allocator has allocated on one rank, as ``max_memory_allocated`` reports it."""
        return self.prediction.peak_bytes

    @property
    def reserved_bytes(self) -> int:
        """Peak of the bytes that the allocator has reserved on one rank, as ``max_memory_reserved`` reports it."""
        return self.overheads.reserved_bytes(self.peak_bytes)

    @property
    def total_bytes(self) -> int:
        """Bytes that the driver counts for one rank's process; on a CPU, the bytes that the operating system counts."""
        return self.overheads.total_bytes(self.peak_bytes, self.host_bytes)

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that each rank needs for offloaded tensors."""
        return self.prediction.host_bytes

    @property
    def checkpoint_copy_bytes(self) -> int:
        """Bytes of host memory per rank for the copy of its state from which an asynchronous checkpoint is written.

        It is 0 if checkpoints are not asynchronous. :attr:`fits_host` does not count the copy: if host memory is too small
        for it, training waits for its checkpoints. On a CPU the copy is part of :attr:`total_bytes`.
        """
        return checkpoint_copy_bytes(self.run, self.machine.ranks)

    @property
    def copy_fits(self) -> bool:
        """Whether host memory can hold the checkpoint copy beside offloaded tensors.

        It is true if the size of host memory is not known. It is also true on a CPU, where :attr:`total_bytes` counts
        the copy.
        """
        there = self.machine.host_bytes
        needed = self.host_bytes + self.checkpoint_copy_bytes + HOST_PROCESS
        return not self.machine.is_gpu or there is None or needed * self.machine.gpus <= there

    @property
    def missing_bytes(self) -> int:
        """Bytes by which :attr:`total_bytes` exceeds the card's memory; negative if it fits; 0 if the memory is not known."""
        usable = self.machine.usable_bytes
        return 0 if usable is None else self.total_bytes - usable

    @property
    def fits(self) -> bool | None:
        """Whether :attr:`total_bytes` fits the card, or on a CPU the rank's share of memory; None: memory not known."""
        return None if self.machine.usable_bytes is None else self.missing_bytes <= 0

    @property
    def host_needed(self) -> int:
        """Bytes of host memory that each machine needs with offload, for the tensors and the processes of all its ranks.

        It is 0 without offload, and on a CPU, where :attr:`total_bytes` counts all memory.
        """
        return host_needed(self.machine, self.host_bytes)

    @property
    def fits_host(self) -> bool:
        """Whether :attr:`host_needed` fits host memory; true if the size of host memory is not known."""
        there = self.machine.host_bytes
        return there is None or self.host_needed <= there

    @property
    def can_train(self) -> bool:
        """Whether the plan fits the card and the host memory; memory that is not known counts as sufficient."""
        return self.fits is not False and self.fits_host

    @property
    def shortage(self) -> float:
        """The ratio of needed to available memory, for the card or for the host, whichever ratio is larger."""
        usable, there = self.machine.usable_bytes, self.machine.host_bytes
        card = 0.0 if not usable else self.total_bytes / usable
        return max(card, 0.0 if there is None else self.host_needed / max(1, there))

    @property
    def seconds(self) -> float:
        """Seconds of a step at the rates of the machine's card, or of :data:`STAND_IN` if no card is named."""
        return self.time.seconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second over all ranks, at the same rates as :attr:`seconds`."""
        return self.batch.tokens / self.time.seconds

    @property
    def tokens_per_second_range(self) -> tuple[float, float]:
        """The lowest and highest likely tokens per second over all ranks; see :func:`speed_range`."""
        low, high = speed_range(self.machine.card or find_card(STAND_IN), measured=self.is_measured)
        return low * self.tokens_per_second, high * self.tokens_per_second

    @property
    def is_measured(self) -> bool:
        """Whether the times rest on measured rates of the processor."""
        measured = self.machine.measured
        return measured is not None and measured.rates(self.run.train.precision) is not None

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization: model FLOP/s, without recompute, as a share of the cards' dense peak FLOP/s."""
        return self.tokens_per_second / self.machine.ranks * flops_per_token(self.run.model) / self.peak_flops

    def memory(self) -> dict[str, Any]:
        """The predicted memory as plain values for JSON, in bytes."""
        return {
            "peak_bytes": self.peak_bytes,
            "reserved_bytes": self.reserved_bytes,
            "total_bytes": self.total_bytes,
            "host_bytes": self.host_bytes,
            "host_needed_bytes": self.host_needed,
            "checkpoint_copy_bytes": self.checkpoint_copy_bytes,
            "breakdown": self.prediction.breakdown,
            "overheads": self.overheads.parts(self.peak_bytes),
            "overheads_measured_on_runs": self.overheads.measured,
            "phases": self.prediction.phases,
            "binding_phase": self.prediction.phase,
        }

    def speed(self) -> dict[str, Any]:
        """The predicted time, throughput and MFU as plain values for JSON; all None if no card is named."""
        known = self.machine.card is not None
        low, high = self.tokens_per_second_range
        return {
            "step_seconds": self.seconds if known else None,
            "tokens_per_second": self.tokens_per_second if known else None,
            "tokens_per_second_low": low if known else None,
            "tokens_per_second_high": high if known else None,
            "mfu": self.mfu if known and self.machine.is_gpu else None,
            "time": dict(self.time.parts) if known else None,
        }

    def as_choice(self, command: str) -> dict[str, Any]:
        """The plan in the form that ``scalegpt plan --json`` prints."""
        train, parallel = self.run.train, self.run.parallel
        return {
            "fits": None if self.fits is None else self.fits and self.fits_host,
            "fits_host": self.fits_host,
            "missing_bytes": max(0, self.missing_bytes),
            "backend": parallel.backend,
            "zero_stage": parallel.stage,
            "shard_size": parallel.shard_size,
            "micro_batch": self.batch.micro_batch,
            "grad_accum": self.batch.grad_accum,
            "tokens_per_step": self.batch.tokens,
            "recompute": train.recompute,
            "loss": train.loss,
            "precision": train.precision,
            "optimizer": train.optimizer,
            "offload": parallel.offload,
            **self.memory(),
            **self.speed(),
            "command": command,
        }


def host_needed(machine: Machine, host_bytes: int) -> int:
    """Bytes of host memory that each machine needs if each rank offloads ``host_bytes``; see :attr:`Plan.host_needed`."""
    return (host_bytes + HOST_PROCESS) * machine.gpus if machine.is_gpu and host_bytes else 0


def host_words(plan: Plan) -> str:
    """How much host memory each machine needs for offload, and how much it has, in words; empty without offload."""
    if not plan.host_needed:
        return ""
    there = plan.machine.host_bytes
    if there is None:
        return f"{gib(plan.host_needed)} of host memory in each machine, whose size is not known"
    source = {ASSUMED: "assumed", GIVEN: "given"}.get(plan.machine.host_source or "", "available")
    return f"{gib(plan.host_needed)} of host memory in each machine, of {gib(there)} {source}"


class Estimator:
    """Predicts memory and time of configurations on one machine.

    Args:
        machine: the machine that the configurations run on.
        calibration: measurements that correct the overheads (memory outside the step's tensors); None: no correction.
    """

    def __init__(self, machine: Machine, calibration: Calibration | None = None) -> None:
        self.machine, self.calibration = machine, calibration
        self.card = machine.card or find_card(STAND_IN)
        self._rates: dict[str, Rates] = {}
        self._overheads: dict[tuple[str, int | None, int], Overheads] = {}

    def plan(
        self, run: RunConfig, batch: BatchPlan, prediction: Prediction | None = None, work: StepWork | None = None
    ) -> Plan:
        """Predict the memory and the time of a configuration.

        Args:
            run: as for :func:`make_plan`; its micro batch and tokens per step must be those of ``batch``.
            batch: how the step is divided into micro batches.
            prediction: the memory prediction; None: compute it.
            work: the work of the step; None: count it.

        Raises:
            InputError: as for :func:`make_plan`.
        """
        if prediction is None:
            prediction = predict_with(self.kernel(run), run, ranks=batch.ranks, grad_accum=batch.grad_accum)
        return Plan(
            run=run,
            machine=self.machine,
            batch=batch,
            prediction=prediction,
            overheads=self.overheads(run, batch.ranks),
            time=work.time(self.rates(run)) if work else self.time(run, batch),
            peak_flops=self.rates(run).peak,
        )

    def time(self, run: RunConfig, batch: BatchPlan) -> StepTime:
        """Predict only the time of a step."""
        return step_time(
            run, self.rates(run), ranks=batch.ranks, grad_accum=batch.grad_accum, kernel=self.kernel(run),
            compiled=self.compiles(run),
        )  # fmt: skip

    def least_seconds(self, run: RunConfig) -> float:
        """A lower bound on the seconds that one card needs per sequence, with any layout, recompute and micro batch."""
        return least_seconds(_work_of_a_sequence(run, self.kernel(run)), self.rates(run))

    def compiles(self, run: RunConfig) -> bool:
        """Whether the run's blocks are compiled on this machine."""
        return self.machine.is_gpu and run.train.compile != "off"

    def kernel(self, run: RunConfig) -> str:
        """The attention kernel that the run uses on this machine's card."""
        return attention_kernel(run, self.machine.card)

    def rates(self, run: RunConfig) -> Rates:
        """The card's rates (FLOP/s, bytes/s) in the run's compute dtype."""
        precision = run.train.precision
        if precision not in self._rates:
            self._rates[precision] = Rates.of(self.card, self.machine, precision)
        return self._rates[precision]

    def overheads(self, run: RunConfig, ranks: int) -> Overheads:
        """The memory of one rank outside the step's tensors, for example fragmentation and the CUDA context."""
        if not self.machine.is_gpu:
            return ProcessOverheads.of_process(run, ranks, keeps_freed_memory=self.machine.keeps_freed_memory)
        key = run.parallel.backend, run.parallel.shard_size, ranks
        if key not in self._overheads:
            self._overheads[key] = self._overheads_of(run, ranks)
        return self._overheads[key]

    def _overheads_of(self, run: RunConfig, ranks: int) -> Overheads:
        machine, tables = self.machine, Overheads.of(run, self.machine.card, ranks)
        if self.calibration is None:
            return tables
        return self.calibration.corrected(tables, run, machine.card, ranks, torch=machine.torch, driver=machine.driver)


@lru_cache(maxsize=1024)
def _work_of_a_sequence(run: RunConfig, kernel: str) -> Work:
    run = replace(run, train=run.train.changed(micro_batch=1))
    return count_work(run, Mesh(), kernel=kernel, compiled=True)


def make_plan(run: RunConfig, machine: Machine, batch: BatchPlan, calibration: Calibration | None = None) -> Plan:
    """Predict the memory and the time of a fixed configuration.

    Args:
        run: a run whose precision is resolved and whose vocabulary is known.
        machine: the machine that it runs on.
        batch: how a step is divided into micro batches; it replaces the micro batch and the tokens per step of ``run``.
        calibration: measurements that correct the overheads (memory outside the step's tensors); None: no correction.

    Raises:
        InputError: a setting that the prediction needs is still open, or DeepSpeed's configuration contradicts the run.
    """
    run = replace(run, train=run.train.changed(micro_batch=batch.micro_batch, tokens_per_step=batch.tokens))
    return Estimator(machine, calibration).plan(run, batch)
