"""A plan: a configuration on a machine, with the memory and the time that it takes there.

:func:`make_plan` predicts what is fixed; :mod:`scalegpt.planner.search.choose` chooses what is not.
"""

from dataclasses import dataclass, replace
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
from scalegpt.planner.time.rates import Rates
from scalegpt.planner.time.step_time import StepTime, StepWork, least_seconds, step_time
from scalegpt.planner.time.work import count_work, flops_per_token
from scalegpt.units import gib

HOST_PROCESS = int(2.5 * GIB)
"""Host memory of a rank's process that trains on a GPU, without offload: libraries, the driver's part. An estimate."""

STAND_IN = "a100-80gb"
"""The card whose rates decide what is faster where no card is named; no time is printed then."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A configuration, the machine, and the memory and the time that it takes there."""

    run: RunConfig
    machine: Machine
    batch: BatchPlan
    prediction: Prediction
    overheads: Overheads
    time: StepTime
    peak_flops: float

    @property
    def peak_bytes(self) -> int:
        """The allocator's peak."""
        return self.prediction.peak_bytes

    @property
    def reserved_bytes(self) -> int:
        """What the allocator will have reserved."""
        return self.overheads.reserved_bytes(self.peak_bytes)

    @property
    def total_bytes(self) -> int:
        """What the driver will count; of a process on a processor, what the kernel will."""
        return self.overheads.total_bytes(self.peak_bytes, self.host_bytes)

    @property
    def host_bytes(self) -> int:
        """Host memory of each rank for what is offloaded."""
        return self.prediction.host_bytes

    @property
    def checkpoint_copy_bytes(self) -> int:
        """Host memory of each rank for the copy from which a checkpoint is written while training continues; 0 without one.

        :attr:`fits_host` does not count it: where it has no room, training waits for its checkpoints. On a processor it
        is part of the total.
        """
        return checkpoint_copy_bytes(self.run, self.machine.ranks)

    @property
    def copy_fits(self) -> bool:
        """Whether the copy for a checkpoint has room in host memory besides what is offloaded, as far as that is known."""
        there = self.machine.host_bytes
        needed = self.host_bytes + self.checkpoint_copy_bytes + HOST_PROCESS
        return not self.machine.is_gpu or there is None or needed * self.machine.gpus <= there

    @property
    def missing_bytes(self) -> int:
        """By how much the total exceeds the card; negative: what is left; 0 where the card is not known."""
        usable = self.machine.usable_bytes
        return 0 if usable is None else self.total_bytes - usable

    @property
    def fits(self) -> bool | None:
        """Whether the total stays within the card's memory, or the rank's share of the host's; None where it is not known."""
        return None if self.machine.usable_bytes is None else self.missing_bytes <= 0

    @property
    def host_needed(self) -> int:
        """Host memory of each machine that offload needs, all its ranks with their processes; 0 without offload.

        On a processor it is part of the total.
        """
        return host_needed(self.machine, self.host_bytes)

    @property
    def fits_host(self) -> bool:
        """Whether what is offloaded has room in host memory, as far as that is known."""
        there = self.machine.host_bytes
        return there is None or self.host_needed <= there

    @property
    def can_train(self) -> bool:
        """Whether it fits, on the card and in host memory, as far as those are known."""
        return self.fits is not False and self.fits_host

    @property
    def shortage(self) -> float:
        """What is needed over what there is, of the card's memory or the host's, whichever lacks more."""
        usable, there = self.machine.usable_bytes, self.machine.host_bytes
        card = 0.0 if not usable else self.total_bytes / usable
        return max(card, 0.0 if there is None else self.host_needed / max(1, there))

    @property
    def seconds(self) -> float:
        """Seconds of a step at the rates of the card, or of :data:`STAND_IN`."""
        return self.time.seconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second over all ranks, at the same rates."""
        return self.batch.tokens / self.time.seconds

    @property
    def mfu(self) -> float:
        """Share of the cards' dense peak that the model's own operations use."""
        return self.tokens_per_second / self.machine.ranks * flops_per_token(self.run.model) / self.peak_flops

    def memory(self) -> dict[str, Any]:
        """The memory as plain values, in bytes."""
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
        """The time as plain values; None where the card is not known."""
        known = self.machine.card is not None
        return {
            "step_seconds": self.seconds if known else None,
            "tokens_per_second": self.tokens_per_second if known else None,
            "mfu": self.mfu if known else None,
            "time": dict(self.time.parts) if known else None,
        }

    def as_choice(self, command: str) -> dict[str, Any]:
        """The plan as ``scalegpt plan --json`` prints it."""
        train, parallel = self.run.train, self.run.parallel
        return {
            "fits": None if self.fits is None else self.fits and self.fits_host,
            "fits_host": self.fits_host,
            "missing_bytes": max(0, self.missing_bytes),
            "backend": parallel.backend,
            "zero_stage": parallel.stage,
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
    """Host memory of each machine that offload needs where a rank offloads ``host_bytes``; see :attr:`Plan.host_needed`."""
    return (host_bytes + HOST_PROCESS) * machine.gpus if machine.is_gpu and host_bytes else 0


def host_words(plan: Plan) -> str:
    """The host memory that offload needs in each machine, and how much there is; empty without offload."""
    if not plan.host_needed:
        return ""
    there = plan.machine.host_bytes
    if there is None:
        return f"{gib(plan.host_needed)} of host memory in each machine, of an unknown amount available"
    source = {ASSUMED: "assumed", GIVEN: "given"}.get(plan.machine.host_source or "", "available")
    return f"{gib(plan.host_needed)} of host memory in each machine, of {gib(there)} {source}"


class Estimator:
    """Predicts memory and time of configurations on one machine.

    Args:
        machine: what they run on.
        calibration: measurements that correct the overheads; None: none.
    """

    def __init__(self, machine: Machine, calibration: Calibration | None = None) -> None:
        self.machine, self.calibration = machine, calibration
        self.card = machine.card or find_card(STAND_IN)
        self._rates: dict[str, Rates] = {}
        self._overheads: dict[tuple[str, int], Overheads] = {}

    def plan(
        self, run: RunConfig, batch: BatchPlan, prediction: Prediction | None = None, work: StepWork | None = None
    ) -> Plan:
        """Predict a configuration.

        Args:
            run: as for :func:`make_plan`, with the batch entered in it.
            batch: how its step is divided.
            prediction: its memory, where that is known already.
            work: what its step has to do, where that is known already.

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
        """Predict the time alone."""
        return step_time(
            run, self.rates(run), ranks=batch.ranks, grad_accum=batch.grad_accum, kernel=self.kernel(run),
            compiled=self.compiles(run),
        )  # fmt: skip

    def least_seconds(self, run: RunConfig) -> float:
        """What a sequence takes at least on one card, however it is trained: the operations and what they move, no more."""
        run = replace(run, train=run.train.changed(micro_batch=1))
        return least_seconds(count_work(run, Mesh(), kernel=self.kernel(run), compiled=True), self.rates(run))

    def compiles(self, run: RunConfig) -> bool:
        """Whether the run's blocks are compiled here."""
        return self.machine.is_gpu and run.train.compile != "off"

    def kernel(self, run: RunConfig) -> str:
        """The attention kernel that the card computes the run with."""
        return attention_kernel(run, self.machine.card)

    def rates(self, run: RunConfig) -> Rates:
        """What the card does in a second in the run's compute dtype."""
        precision = run.train.precision
        if precision not in self._rates:
            self._rates[precision] = Rates.of(self.card, self.machine, precision)
        return self._rates[precision]

    def overheads(self, run: RunConfig, ranks: int) -> Overheads:
        """What lies outside the step's tensors."""
        if not self.machine.is_gpu:
            return ProcessOverheads.of_process(run, ranks, keeps_freed_memory=self.machine.keeps_freed_memory)
        key = run.parallel.backend, ranks
        if key not in self._overheads:
            self._overheads[key] = self._overheads_of(run, ranks)
        return self._overheads[key]

    def _overheads_of(self, run: RunConfig, ranks: int) -> Overheads:
        machine, tables = self.machine, Overheads.of(run, self.machine.card, ranks)
        if self.calibration is None:
            return tables
        return self.calibration.corrected(tables, run, machine.card, ranks, torch=machine.torch, driver=machine.driver)


def make_plan(run: RunConfig, machine: Machine, batch: BatchPlan, calibration: Calibration | None = None) -> Plan:
    """Predict a configuration that is fixed.

    Args:
        run: a run whose precision is resolved and whose vocabulary is known.
        machine: what it runs on.
        batch: how its step is divided; its micro batch is the one that counts.
        calibration: measurements that correct the overheads; None: none.

    Raises:
        InputError: something that the prediction needs is left open, or DeepSpeed's configuration will not do.
    """
    run = replace(run, train=run.train.changed(micro_batch=batch.micro_batch, tokens_per_step=batch.tokens))
    return Estimator(machine, calibration).plan(run, batch)
