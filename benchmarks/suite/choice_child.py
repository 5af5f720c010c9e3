"""The child process of ``gpu_suite.py choice``: trains configurations on emulated cards.

``python -m benchmarks.suite.choice_child cuda|dry``; a job is :meth:`Configuration.as_dict` with

=================  ====================================================================================================
``usable_bytes``   the memory that torch would report of the emulated card
``outside_bytes``  what a process with this backend holds outside the allocator; None: find that out first
``steps``          optimizer steps to take
=================  ====================================================================================================

and an answer holds beside what :mod:`benchmarks.suite.station` says

=================  ====================================================================================================
``outcome``        ``ran``, too
``outside_bytes``  as given, or as found
``cap_bytes``      what the allocator was allowed: usable less outside
``measured``       memory as in ``plan``, and seconds
=================  ====================================================================================================

**Emulation.** Of a process a card holds what the allocator reserves, and what lies outside it: the context, loaded kernels,
NCCL's buffers. ``set_per_process_memory_fraction`` caps the allocator's reservation alone. At the cap it does what it does
on a full card: it gives back cached blocks, tries again, and then is out of memory. So the cap is the emulated card's memory
less what lies outside. That is measured, not taken from the planner's tables, which are on trial here: before the first job
with a backend a process takes the same steps without a cap, and what the driver counts beyond the reservation is what a run
of its own would hold. Later jobs with that backend go by this figure: what their process has loaded meanwhile for other
configurations, a run of its own would not hold.
"""

import statistics
import sys

import torch

from benchmarks.suite.children import Values
from benchmarks.suite.station import Station, batch_of, serve_from
from benchmarks.suite.steps import Marks, Peaks, take_step
from scalegpt.backends import Backend, World
from scalegpt.config import RunConfig
from scalegpt.errors import InputError
from scalegpt.planner.batches import BatchPlan
from scalegpt.units import gib

REHEARSED_STEPS = 2
"""After the second step everything is loaded: the first has made the optimizer's state."""

MOST_SKIPPED = 12
"""Steps that fp16 may skip while it looks for its loss scale; they count for nothing."""


class ChoiceStation(Station):
    """Trains on cards of any size up to its own."""

    def measure(self, job: Values, found: Values) -> None:
        """Train under the cap."""
        run = self._resolved(job)
        if self.dry:
            self._train(self._shrunk(run, found["notes"]), job, found)
            found["outcome"] = "stepped"
            return
        outside = job["outside_bytes"]
        found["outside_bytes"] = outside = self._rehearse(run, job) if outside is None else outside
        found["cap_bytes"] = cap = job["usable_bytes"] - outside
        if cap <= 0:
            raise InputError(f"{gib(outside)} lie outside the allocator, the card has {gib(job['usable_bytes'])}")
        _, total = torch.cuda.mem_get_info(self.device)
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total), self.device)
        try:
            self._train(run, job, found)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)
        found["outcome"] = "ran"

    def _rehearse(self, run: RunConfig, job: Values) -> int:
        """What this process holds outside the allocator once it has trained so."""
        rehearsed: Values = {"notes": []}
        self._train(run, {**job, "steps": REHEARSED_STEPS}, rehearsed)
        outside: int = rehearsed["measured"]["outside_bytes"]
        self.release()
        return outside

    def _train(self, run: RunConfig, job: Values, found: Values) -> None:
        world = self._world(1)
        batch = batch_of(run, job)
        before = self._held()
        peaks = Peaks(self.device)
        with (
            self._group(run, world),
            self._built(run, world, batch, compiled=job["compiled"], notes=found["notes"]) as backend,
        ):
            peaks.lap("set-up")
            timed, skipped = self._steps(backend, batch, job["steps"], world)
            peaks.lap("steps")
            found["measured"] = {**seconds_of(timed, batch.grad_accum), "steps": len(timed), "skipped_steps": skipped}
            if self.device.type == "cuda":
                found["measured"] |= peaks.summary(before, self._held())

    def _steps(self, backend: Backend, batch: BatchPlan, count: int, world: World) -> tuple[list[list[float]], int]:
        """Take so many steps.

        Returns:
            Of each the seconds of its micro steps and of the rest; and how many steps were skipped beside these.
        """
        timed: list[list[float]] = []
        skipped = 0
        while len(timed) < count:
            marks = Marks(world.device)
            marks.mark()
            if take_step(backend, batch, after_micro=marks.mark):
                skipped += 1
                if skipped > MOST_SKIPPED:
                    raise RuntimeError(f"{skipped} steps were skipped for a gradient that is not finite")
                continue
            marks.mark()
            timed.append(marks.spans())
        return timed, skipped


def seconds_of(timed: list[list[float]], grad_accum: int) -> Values:
    """The time of a step, and of a micro step that is not the last: medians over the second half of the steps.

    Before each step the card has nothing to do, so that Python's start is felt in the first micro step; where others than the
    first and the last can be had, it is not counted.

    Args:
        timed: of each step the seconds of its micro steps, then those of the rest.
        grad_accum: micro batches of a step.
    """
    later = timed[len(timed) // 2 :]
    first = 1 if grad_accum > 2 else 0
    micro = [span for spans in later for span in spans[first : grad_accum - 1]]
    return {
        "step_seconds": statistics.median(map(sum, later)),
        "micro_seconds": statistics.median(micro) if micro else None,
    }


if __name__ == "__main__":
    serve_from(ChoiceStation, sys.argv[1:])
