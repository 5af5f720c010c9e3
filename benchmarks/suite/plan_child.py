"""The child process of ``gpu_suite.py plan``: takes configurations through real optimizer steps and says what they held.

``python -m benchmarks.suite.plan_child cuda|dry``; a job is :meth:`Configuration.as_dict`. What an answer holds beside what
:mod:`benchmarks.suite.station` says:

===================  ==================================================================================================
``outcome``          ``measured``, too
``predicted``        the plan's memory by the tables alone, for the configuration in full size, also in a dry run
``measured``         what the allocator and the driver said
===================  ==================================================================================================
"""

import sys
from dataclasses import replace

import torch

from benchmarks.suite.children import Values
from benchmarks.suite.station import Station, batch_of, serve_from
from benchmarks.suite.steps import Peaks, take_step
from scalegpt.backends import Backend, World
from scalegpt.config import RunConfig
from scalegpt.hardware.machine import Machine
from scalegpt.planner.batches import BatchPlan
from scalegpt.planner.plan import Plan, make_plan
from scalegpt.training.memory import machine_of
from scalegpt.units import gib

ROOM_FOR_ERROR = 1.1
"""What is predicted to fill the card so many times is not tried: it would only show that memory runs out."""

WARM_STEPS, MOST_STEPS = 2, 12
"""Steps before the one that is watched; more where fp16 looks for its loss scale and skips some."""


class PlanStation(Station):
    """Holds what configurations take against what is predicted."""

    def measure(self, job: Values, found: Values) -> None:
        """Watch a step once the optimizer has its state."""
        run = self._resolved(job)
        plan = self._plan(run, job)
        found["predicted"] = {**plan.memory(), "workspace_bytes": plan.overheads.workspaces, "fits": plan.fits}
        usable = plan.machine.usable_bytes
        if usable is not None and plan.total_bytes > ROOM_FOR_ERROR * usable:
            reason = f"{gib(plan.total_bytes)} predicted, the card has {gib(usable)}"
            found |= {"outcome": "left out", "reason": reason}
            return
        run = self._shrunk(run, found["notes"]) if self.dry else run
        world = self._world(job["ranks"])
        with self._group(run, world):
            self._take_steps(run, world, job, found)

    def _plan(self, run: RunConfig, job: Values) -> Plan:
        """The prediction, without earlier measurements. A fake group has no communicator."""
        ranks = job["ranks"]
        machine = Machine(gpus=ranks, torch=torch.__version__) if self.dry else machine_of(self._world(ranks))
        plan = make_plan(run, machine, batch_of(run, job))
        return plan if ranks == 1 else replace(plan, overheads=replace(plan.overheads, nccl=0))

    def _take_steps(self, run: RunConfig, world: World, job: Values, found: Values) -> None:
        before = self._held()
        peaks = Peaks(self.device)
        batch = batch_of(run, job)
        with self._built(run, world, batch, compiled=job["compiled"], notes=found["notes"]) as backend:
            peaks.lap("set-up")
            self._warm_up(backend, batch, peaks)
            skipped = take_step(backend, batch, peaks)
            if skipped:
                raise RuntimeError(f"every one of {MOST_STEPS} steps was skipped for a gradient that is not finite")
            after = self._held()
            found |= (
                {"outcome": "stepped"}
                if self.dry
                else {"outcome": "measured", "measured": peaks.summary(before, after)}
            )

    def _warm_up(self, backend: Backend, batch: BatchPlan, peaks: Peaks) -> None:
        """Steps until the optimizer has its state."""
        taken = 0
        for _ in range(MOST_STEPS):
            taken += not take_step(backend, batch)
            if taken == WARM_STEPS:
                break
        peaks.lap("first steps")


if __name__ == "__main__":
    serve_from(PlanStation, sys.argv[1:])
