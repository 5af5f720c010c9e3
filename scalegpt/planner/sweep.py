"""The same run on more and more GPUs, with the same tokens per step: its speed, efficiency and cost, and where to stop.

This is strong scaling: each GPU has fewer sequences of a step on more GPUs, so its gradient accumulation shrinks.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from scalegpt.errors import InputError
from scalegpt.planner.cost import Cost
from scalegpt.planner.query import Asked, machine_as_dict, model_as_dict
from scalegpt.planner.tables import MOST_IN_A_MACHINE, Row, doublings, row_of

MOST = 1024
"""The largest number of GPUs, unless another is given."""

PAYS = 0.75
"""More GPUs pay while they keep at least this share of each GPU's speed: twice the GPUs then give at least 1.5 times the
speed."""


@dataclass(frozen=True)
class Point:
    """One number of GPUs of a sweep.

    Attributes:
        row: the plan on these GPUs, all of which it uses.
        efficiency: tokens/s of each GPU, divided by those on the fewest GPUs on which the run fits; None: it does not fit.
        kept: the same, divided by those of the point before; None: there is none, or one of both does not fit.
        cost: what the run takes there; None: it does not fit.
    """

    row: Row
    efficiency: float | None = None
    kept: float | None = None
    cost: Cost | None = None

    @property
    def gpus(self) -> int:
        """The number of GPUs over all machines."""
        return self.row.asked.machine.ranks

    def as_dict(self) -> dict[str, Any]:
        """The point in the form that ``--json`` prints."""
        plan, cost = self.row.plan, self.cost
        shown = plan if plan is not None and self.row.fits else None
        return {
            **self.row.as_dict(),
            "gpus": self.gpus,
            "tokens_per_second": None if shown is None else shown.tokens_per_second,
            "efficiency": self.efficiency,
            "efficiency_of_step": self.kept,
            "run_hours": None if cost is None else cost.hours,
            "gpu_hours": None if cost is None else cost.gpu_hours,
            "gpu_hours_per_million_tokens": None if cost is None else cost.gpu_hours_per_million,
            "cost": None if cost is None else cost.money,
            "cost_per_million_tokens": None if cost is None else cost.money_per_million,
        }


@dataclass(frozen=True)
class Sweep:
    """The points of a sweep, the fewest GPUs first, and two sentences on them.

    Attributes:
        asked: the question; its tokens per step are set.
        points: one for each number of GPUs.
        ended: why the curve has no further points; empty if it reaches the largest number that was asked for.
    """

    asked: Asked
    points: tuple[Point, ...]
    ended: str = ""

    @property
    def tokens(self) -> int:
        """Tokens of a step, which are the same on all numbers of GPUs."""
        return self.asked.run.train.tokens_per_step or 0

    @property
    def best(self) -> Point | None:
        """The point with the most GPUs up to which adding GPUs pays; None: the run fits nowhere."""
        best: Point | None = None
        for point in self.points:
            if point.efficiency is None:
                continue
            if best is not None and (point.kept is None or point.kept < PAYS):
                break
            best = point
        return best

    @property
    def stops(self) -> str:
        """A sentence that says where adding GPUs stops paying."""
        best = self.best
        if best is None:
            return "the run fits on none of these numbers of GPUs"
        more = next((point for point in self.points if point.gpus > best.gpus and point.efficiency is not None), None)
        if more is None:
            cannot = self.points[-1].gpus > best.gpus
            return f"adding GPUs pays up to {best.gpus}, the most here{' that have a plan' if cannot else ''}"
        kept = (more.efficiency or 0.0) / (best.efficiency or 1.0)
        return (
            f"adding GPUs stops paying at {best.gpus}: on {more.gpus} each GPU keeps {kept:.0%} of its speed, less than the "
            f"{PAYS:.0%} that count as worth it"
        )

    def as_dict(self) -> dict[str, Any]:
        """The sweep in the form that ``--json`` prints."""
        best = self.best
        return {
            "model": model_as_dict(self.asked.run),
            "gpu": machine_as_dict(self.asked.machine),
            "tokens_per_step": self.tokens,
            "least_efficiency_of_step": PAYS,
            "sweep": [point.as_dict() for point in self.points],
            "pays_up_to": None if best is None else best.gpus,
            "stops": self.stops,
            "ended": self.ended or None,
        }


def sweep(asked: Asked, most: int = MOST, *, gpus_given: bool = False) -> Sweep:
    """Plan a run on 1, 2, 4, … GPUs: first in one machine, then in full machines.

    The tokens of a step stay the same: those of the run, or if it does not say them, those of its micro batch on each GPU
    of one machine.

    Args:
        asked: the question.
        most: the largest number of GPUs.
        gpus_given: whether a machine has no more GPUs than that of the question; if not, and the question is about one GPU,
            a machine has up to :data:`~scalegpt.planner.tables.MOST_IN_A_MACHINE`.

    Raises:
        InputError: the card is not known, or the question is about several machines or about a processor.
    """
    machine = asked.machine
    if machine.card is None or not machine.is_gpu:
        raise InputError("sweep_gpus needs a GPU whose speed is known; give --gpu NAME")
    if machine.nodes > 1:
        raise InputError("sweep_gpus chooses the number of machines; omit nodes, and give --gpus for the GPUs of each")
    if machine.gpus == 1 and not gpus_given:
        machine = machine.with_cards(gpus=MOST_IN_A_MACHINE, nodes=1)
    run, width = asked.run, machine.gpus
    if run.train.tokens_per_step is None:
        tokens = run.train.micro_batch * width * run.model.block_size
        run = replace(run, train=run.train.changed(tokens_per_step=tokens))
    sequences = (run.train.tokens_per_step or 0) // run.model.block_size
    sizes = [(gpus, 1) for gpus in doublings(min(width, most))]
    sizes += [(width, nodes) for nodes in doublings(most // width) if nodes > 1]
    within = [(gpus, nodes) for gpus, nodes in sizes if gpus * nodes <= sequences]
    ended = (
        f"a step of {run.train.tokens_per_step:,} tokens has {sequences:,} sequences, so at most {sequences:,} GPUs have one "
        "each; a larger --tokens_per_step allows more"
        if len(within) < len(sizes)
        else ""
    )
    asked = replace(asked, run=run, machine=machine, all_cards=True)
    return Sweep(asked, tuple(_points(asked, within)), ended)


def _points(asked: Asked, sizes: list[tuple[int, int]]) -> Iterator[Point]:
    first = before = 0.0
    for gpus, nodes in sizes:
        other = asked.machine.with_cards(gpus=gpus, nodes=nodes)
        row = row_of(str(other.ranks), replace(asked, machine=other))
        if row.plan is None or not row.fits:
            before = 0.0
            yield Point(row)
            continue
        each = row.plan.tokens_per_second / other.ranks
        first = first or each
        yield Point(row, each / first, each / before if before else None, Cost.of(row.plan))
        before = each
