"""The question that a search answers, and its result."""

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
"""The share of a card's memory that a plan leaves free, because memory outside the step's tensors is predicted less
exactly.
"""


@dataclass(frozen=True)
class Question:
    """The question that a search answers: a run, a machine, and the settings that may be chosen.

    Attributes:
        run: the run. Its own layout and loss count as the simplest, even if others may be chosen.
        machine: the machine that it runs on.
        open: names of the settings that may be chosen.
        margin: share of the card's memory to leave free.
        calibration: measurements that correct the overheads (memory outside the step's tensors).
        fewer: whether fewer cards than the machine has may be used.
        backends: names of the backends to choose from, if ``backend`` is open.
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
        best: the fastest plan that fits; None: no plan fits.
        closest: if no plan fits, the plan on all cards that lacks the least memory.
    """

    best: Plan | None
    closest: Plan | None = None


class Scheme(NamedTuple):
    """The layout (backend, ZeRO stage, offload), recompute policy and kind of loss of a run, without its micro batch."""

    layout: ParallelConfig
    recompute: str
    loss: str

    @classmethod
    def of(cls, run: RunConfig) -> "Scheme":
        """The scheme of a run."""
        return cls(run.parallel, run.train.recompute, run.train.loss)

    def applied(self, run: RunConfig, batch: BatchPlan) -> RunConfig:
        """``run`` with this scheme, and with the micro batch and the tokens per step of ``batch``."""
        train = run.train.changed(
            recompute=self.recompute, loss=self.loss, micro_batch=batch.micro_batch, tokens_per_step=batch.tokens
        )
        return replace(run, train=train, parallel=self.layout)
