"""What ``gpu_suite.py choice`` asks of the planner, presets on emulated cards, and how to train its answers briefly."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from benchmarks.suite.configuration import Configuration
from scalegpt.config.presets import resolve
from scalegpt.hardware.gpus import find_card
from scalegpt.hardware.machine import Machine
from scalegpt.planner.batches import BatchPlan, divisors
from scalegpt.planner.checks import resolve_precision
from scalegpt.planner.plan import Plan, make_plan
from scalegpt.planner.search.advice import alternatives
from scalegpt.planner.search.choose import choose
from scalegpt.planner.search.question import Found, Question, Scheme

EMULATED = ("RTX 3070", "RTX 3080", "RTX 3060", "RTX A4000", "RTX 4090", "A100 40GB", "A100 80GB")
"""A card of each size, of 8, 10, 12, 16, 24, 40 and 80 GB, whose memory is emulated, as torch reports it; nothing else is."""

SAME_SIZE = 0.97
"""A card at hand with so much of an emulated one's memory counts as one of that size, and is used whole."""

PRESETS = ("150M", "150M_1024", "200M_1024", "250M", "250M_1024", "350M_1024", "500M_1024")
"""From the one that takes least memory up, as many as there are sizes."""

STEPS = 20
"""Optimizer steps of a chosen plan; the target speaks of so many."""

SECONDS_OF_STEPS = 6.0
"""What they may take by prediction: accumulation is cut down to that, but to no less than two micro batches."""

NEXT_BEST = 2
"""So many of the next best plans are timed, and the best with another layout where that is not one of them."""


@dataclass(frozen=True)
class Cell:
    """A preset on an emulated card.

    Attributes:
        preset: its name.
        gb: the size in the name of the emulated card.
        question: what the planner is asked.
        found: what it answers.
        order: how early it comes; the cells of 0 hold every size and every preset once.
    """

    preset: str
    gb: int
    question: Question
    found: Found
    order: int

    @property
    def name(self) -> str:
        """Preset and size."""
        return f"{self.preset} on {self.gb} GB"

    @property
    def usable(self) -> int:
        """The emulated card's memory."""
        usable = self.question.machine.usable_bytes
        assert usable is not None
        return usable

    @property
    def sizes(self) -> tuple[int, ...]:
        """The micro batches that divide a step, in rising order."""
        plan = self.found.best
        return () if plan is None else divisors(plan.batch.micro_batch * plan.batch.grad_accum)

    @cached_property
    def alternatives(self) -> list[Plan]:
        """The next best plans that fit, each of another kind, the fastest first; one with another layout among them."""
        chosen = self.found.best
        if chosen is None:
            return []
        plans = [each.plan for each in alternatives(self.question, chosen)]
        fitting = [plan for plan in plans if plan.total_bytes <= self.question.limit and plan.fits_host]
        fitting.sort(key=lambda plan: plan.seconds)
        others = [plan for plan in fitting if plan.run.parallel != chosen.run.parallel]
        return [plan for plan in fitting if plan in fitting[:NEXT_BEST] or plan in others[:1]]


def emulated_sizes(total_bytes: int) -> dict[int, int]:
    """Size in GB → memory that torch would report, of the cards that the one at hand can stand for, the smallest first."""
    cards = map(find_card, EMULATED)
    return {
        card.gb: min(card.usable_bytes, total_bytes) for card in cards if SAME_SIZE * card.usable_bytes <= total_bytes
    }


def cells(machine: Machine, *, compiled: bool) -> list[Cell]:
    """Every preset on every size, in rounds. Each has all sizes and presets; the first pairs the small with the small.

    So whatever time leaves out, what was measured is spread over both.

    Args:
        machine: the one at hand; its rates hold for the emulated cards too.
        compiled: whether the trainer may compile the blocks.
    """
    assert machine.usable_bytes is not None
    sizes = list(emulated_sizes(machine.usable_bytes).items())
    return [
        _cell(PRESETS[(place + order) % len(PRESETS)], gb, replace(machine, usable_bytes=usable), order, compiled)
        for order in range(len(PRESETS))
        for place, (gb, usable) in enumerate(sizes)
    ]


def _cell(preset: str, gb: int, machine: Machine, order: int, compiled: bool) -> Cell:
    run = resolve(preset=preset)
    precision = resolve_precision(run.train.precision, machine.card, machine.capability)
    train = run.train.changed(precision=precision, compile="auto" if compiled else "off")
    question = Question(replace(run, train=train), machine)
    return Cell(preset, gb, question, choose(question), order)


# --- a plan as something to train ------------------------------------------------------------------------------------


def at_micro_batch(plan: Plan, micro: int) -> Plan:
    """The plan with another micro batch; one that does not divide the step accumulates about as many sequences."""
    sequences = plan.batch.micro_batch * plan.batch.grad_accum
    accum = sequences // micro if sequences % micro == 0 else max(2, sequences // micro)
    return _with_batch(plan, BatchPlan(micro, accum, plan.batch.ranks, plan.batch.block_size))


def shortened(plan: Plan, steps: int) -> Plan:
    """The plan with as much accumulation as so many steps have time for, two micro batches at least where it accumulates.

    Memory is the same from two micro batches on: gradients wait while the next one is computed.
    """
    micro_seconds = plan.seconds / plan.batch.grad_accum
    affordable = int(SECONDS_OF_STEPS / steps / micro_seconds)
    return _with_batch(plan, replace(plan.batch, grad_accum=min(plan.batch.grad_accum, max(2, affordable))))


def shortest(plan: Plan) -> Plan:
    """The plan with as little accumulation as shows what it holds."""
    return _with_batch(plan, replace(plan.batch, grad_accum=min(plan.batch.grad_accum, 2)))


def _with_batch(plan: Plan, batch: BatchPlan) -> Plan:
    train = plan.run.train
    return make_plan(
        Scheme(plan.run.parallel, train.recompute, train.loss).applied(plan.run, batch), plan.machine, batch
    )


def key_of(plan: Plan) -> tuple[Any, ...]:
    """All that sets a plan apart in memory, but its micro batch."""
    parallel, train = plan.run.parallel, plan.run.train
    layout = parallel.backend, parallel.stage, parallel.offload, parallel.ds_config
    return (plan.run.preset, *layout, train.recompute, train.loss, plan.batch.grad_accum > 1)


def configuration(plan: Plan) -> Configuration:
    """What a child trains."""
    parallel, train = plan.run.parallel, plan.run.train
    flags: dict[str, Any] = {"recompute": train.recompute, "loss": train.loss, "micro_batch": plan.batch.micro_batch}
    if train.attention != "auto":
        flags["attention"] = train.attention
    if parallel.offload != "none":
        flags["offload"] = parallel.offload
    if parallel.ds_config is not None:
        flags["ds_config"] = parallel.ds_config
    return Configuration(
        preset=str(plan.run.preset),
        backend=parallel.backend,
        zero_stage=parallel.stage,
        grad_accum=plan.batch.grad_accum,
        compiled=train.compile != "off",
        flags=flags,
    )
