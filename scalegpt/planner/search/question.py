"""What is to be chosen, and what a search found."""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from scalegpt.config import RunConfig
from scalegpt.config.backends import BACKENDS
from scalegpt.config.machine import MachineConfig
from scalegpt.config.run import PLANNED, ParallelConfig
from scalegpt.hardware.machine import Machine
from scalegpt.planner.batches import BatchPlan
from scalegpt.planner.plan import Plan
from scalegpt.planner.time.calibration import Calibration

MARGIN = MachineConfig().margin
"""Share of a card's memory that a chosen plan leaves free: what lies outside the step's tensors is known less exactly."""


@dataclass(frozen=True)
class Question:
    """What is to be chosen.

    Attributes:
        run: the run; of settings that are open it says which value is the simplest, since a preset names it.
        machine: what it runs on.
        open: which settings may be chosen.
        margin: share of the card's memory to leave free.
        calibration: measurements that correct the overheads.
        fewer: whether fewer cards than the machine has may be used.
        backends: the backends to choose from where that is open.
    """

    run: RunConfig
    machine: Machine
    open: frozenset[str] = PLANNED
    margin: float = MARGIN
    calibration: Calibration = field(default_factory=Calibration)
    fewer: bool = True
    backends: tuple[str, ...] = tuple(BACKENDS)

    @property
    def limit(self) -> float:
        """Bytes that a plan may take on each card."""
        usable = self.machine.usable_bytes
        return float("inf") if usable is None else usable * (1 - self.margin)


class Found(NamedTuple):
    """The outcome of a search.

    Attributes:
        best: the fastest plan that fits; None: none does.
        closest: where none fits, the plan on all cards that lacks least.
    """

    best: Plan | None
    closest: Plan | None = None


class Scheme(NamedTuple):
    """How a step is computed, apart from its micro batch."""

    layout: ParallelConfig
    recompute: str
    loss: str

    @classmethod
    def of(cls, run: RunConfig) -> "Scheme":
        """The scheme of a run."""
        return cls(run.parallel, run.train.recompute, run.train.loss)

    def applied(self, run: RunConfig, batch: BatchPlan) -> RunConfig:
        """A run with this scheme and its step divided so."""
        train = run.train.changed(
            recompute=self.recompute, loss=self.loss, micro_batch=batch.micro_batch, tokens_per_step=batch.tokens
        )
        return replace(run, train=train, parallel=self.layout)
