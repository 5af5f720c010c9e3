"""A plan: a configuration on a machine, with the memory that it takes there.

:func:`make_plan` predicts what is fixed. :func:`first_that_fits` looks for the nearest configuration that fits where it does
not.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from scalegpt.config import RunConfig
from scalegpt.config.machine import MachineConfig
from scalegpt.config.run import STAGES
from scalegpt.config.train import RECOMPUTE
from scalegpt.errors import InputError
from scalegpt.planner.batches import LARGEST_MICRO_BATCH, BatchPlan, plan_batches
from scalegpt.planner.calibration import Calibration
from scalegpt.planner.gpus import GB, GIB, Card, find_card
from scalegpt.planner.memory import Prediction, predict
from scalegpt.planner.overheads import Overheads


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a run is planned for.

    Attributes:
        name: what to call the card; None where none is named.
        usable_bytes: memory of one card that a run may fill; None: not known.
        card: its entry in the catalogue, if it has one.
        gpus: cards in each machine.
        nodes: machines.
        is_gpu: false for a run on the CPU, which has no overheads of a card.
        torch: version of torch that will run, if known.
        driver: version of the driver, if known.
    """

    name: str | None = None
    usable_bytes: int | None = None
    card: Card | None = None
    gpus: int = 1
    nodes: int = 1
    is_gpu: bool = True
    torch: str | None = None
    driver: str | None = None

    @classmethod
    def of(cls, settings: MachineConfig, *, torch: str | None = None) -> "Machine":
        """The machine that the settings describe.

        Raises:
            InputError: the card is not known, or has less memory than is to be used.
        """
        card = None if settings.gpu is None else find_card(settings.gpu)
        usable = None if card is None else card.usable_bytes
        name = None if card is None else card.name
        if settings.memory_gb is not None:
            given = int(settings.memory_gb * GB)
            if usable is not None and card is not None and given > usable:
                raise InputError(
                    f"memory_gb {settings.memory_gb:g}: {card.name} has {usable / GB:.2f} GB; give less, or leave it out"
                )
            usable, name = given, name or f"{settings.memory_gb:g} GB card"
        return cls(name=name, usable_bytes=usable, card=card, gpus=settings.gpus, nodes=settings.nodes, torch=torch)

    @property
    def ranks(self) -> int:
        """Data-parallel ranks W: one for each card."""
        return self.gpus * self.nodes


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A configuration, the machine, and the memory that it takes on each card."""

    run: RunConfig
    machine: Machine
    batch: BatchPlan
    prediction: Prediction
    overheads: Overheads

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
        """What the driver will count."""
        return self.overheads.total_bytes(self.peak_bytes)

    @property
    def host_bytes(self) -> int:
        """Host memory of each rank for what is offloaded."""
        return self.prediction.host_bytes

    @property
    def missing_bytes(self) -> int:
        """By how much the total exceeds the card; negative: so much is left; 0 where the card is not known."""
        usable = self.machine.usable_bytes
        return 0 if usable is None else self.total_bytes - usable

    @property
    def fits(self) -> bool | None:
        """Whether the total stays within the card's memory; None where that is not known."""
        return None if self.machine.usable_bytes is None else self.missing_bytes <= 0

    def memory(self) -> dict[str, Any]:
        """The memory as plain values, in bytes."""
        return {
            "peak_bytes": self.peak_bytes,
            "reserved_bytes": self.reserved_bytes,
            "total_bytes": self.total_bytes,
            "host_bytes": self.host_bytes,
            "breakdown": self.prediction.breakdown,
            "overheads": self.overheads.parts(self.peak_bytes),
            "overheads_measured_on_runs": self.overheads.measured,
            "phases": self.prediction.phases,
            "binding_phase": self.prediction.phase,
        }

    def as_choice(self, command: str) -> dict[str, Any]:
        """The plan as ``scalegpt plan --json`` prints it."""
        train, parallel = self.run.train, self.run.parallel
        return {
            "fits": self.fits,
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
            "step_seconds": None,
            "tokens_per_second": None,
            "mfu": None,
            "command": command,
        }


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
    prediction = predict(run, ranks=machine.ranks, grad_accum=batch.grad_accum, card=machine.card)
    overheads = Overheads()
    if machine.is_gpu:
        overheads = Overheads.of(run, machine.card, machine.ranks)
        if calibration is not None:
            overheads = calibration.corrected(
                overheads, run, machine.card, machine.ranks, torch=machine.torch, driver=machine.driver
            )
    return Plan(run=run, machine=machine, batch=batch, prediction=prediction, overheads=overheads)


def gib(count: int) -> str:
    """A size in GiB, or in MiB where that would read as next to nothing."""
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.2f} MiB"


def first_that_fits(plan: Plan, calibration: Calibration | None = None) -> Plan | None:
    """The first configuration that fits, going from what costs nothing to what costs time; None: none of them does.

    Tried are a loss in chunks, smaller micro batches, heavier recompute, higher stages and offload, each with what came
    before it. The tokens of a step stay as they are.
    """
    for run in _lighter(plan.run, plan.machine.ranks):
        for micro in _smaller(plan.batch):
            batch = plan_batches(
                replace(run, train=run.train.changed(micro_batch=micro)), plan.machine.ranks, micro_fixed=False
            )
            tried = make_plan(run, plan.machine, batch, calibration)
            if tried.fits:
                return tried
    return None


def _smaller(batch: BatchPlan) -> Iterator[int]:
    """The micro batch and all smaller ones that divide the step, by falling size."""
    per_rank = batch.micro_batch * batch.grad_accum
    most = min(batch.micro_batch, LARGEST_MICRO_BATCH)
    return (size for size in range(most, 0, -1) if per_rank % size == 0)


def _lighter(run: RunConfig, ranks: int) -> Iterator[RunConfig]:
    """The run, and then ever lighter ones."""
    if run.train.loss == "full":
        run = replace(run, train=run.train.changed(loss="chunked"))
    yield run
    for kind in RECOMPUTE[RECOMPUTE.index(run.train.recompute) + 1 :]:
        run = replace(run, train=run.train.changed(recompute=kind))
        yield run
    parallel = run.parallel
    if ranks > 1:
        for stage in STAGES[parallel.backend]:
            if stage > parallel.stage:
                run = replace(run, parallel=parallel.changed(zero_stage=stage, ds_config=None))
                yield run
    if run.parallel.offload == "none" and run.parallel.backend != "plain":
        kind = "all" if run.parallel.backend == "fsdp" else "optimizer"
        stage = 3 if run.parallel.backend == "fsdp" else max(1, run.parallel.stage)
        yield replace(run, parallel=run.parallel.changed(offload=kind, zero_stage=stage, ds_config=None))
