"""The plans that the tables show: a preset on one card, with some settings fixed."""

from functools import cache
from typing import Any

from scalegpt.architecture.counting import count_parameters
from scalegpt.config import RunConfig
from scalegpt.config.presets import preset_names, resolve
from scalegpt.hardware.gpus import Card, find_card
from scalegpt.hardware.machine import Machine
from scalegpt.planner.batches import plan_batches
from scalegpt.planner.plan import Plan, make_plan
from scalegpt.planner.query import Asked
from scalegpt.planner.search.choose import choose

HIGH_CONTEXT = 1024
"""The smallest block size of a high-context preset."""


@cache
def by_size() -> tuple[str, ...]:
    """The names of all presets, the smallest model first."""
    return tuple(sorted(preset_names(), key=lambda name: (parameters(name), name)))


@cache
def parameters(preset: str) -> int:
    """A preset's number of parameters."""
    return count_parameters(resolve(preset=preset).model).total


@cache
def block_size(preset: str) -> int:
    """A preset's block size."""
    return resolve(preset=preset).model.block_size


def chosen(preset: str | None, machine: Machine | str, **fixed: Any) -> Plan | None:
    """The plan that ``scalegpt plan`` chooses, with its safety margin; None if no plan fits.

    Args:
        preset: the preset; None: a model that ``fixed`` describes.
        machine: the machine of the plan, or the name of a card for a machine with one such card.
        fixed: settings that must stay as they are.
    """
    built = Machine.with_card(find_card(machine)) if isinstance(machine, str) else machine
    question, _ = Asked.of(preset=preset, config_file=None, flags=fixed, machine=built).question()
    return choose(question).best


def preset_plan(preset: str, card: Card | str, **flags: Any) -> Plan:
    """The plan of a preset on one card with the preset's own settings and ``flags``. Nothing is chosen."""
    machine = Machine.with_card(find_card(card) if isinstance(card, str) else card)
    return predicted(resolve(preset=preset, flags={"precision": "bf16", **flags}), machine)


def predicted(run: RunConfig, machine: Machine) -> Plan:
    """The plan of a run on a machine with the run's own settings."""
    return make_plan(run, machine, plan_batches(run, machine.ranks, micro_fixed=True))


def fits_with_margin(plan: Plan, margin: float) -> bool:
    """Whether a plan leaves at least the share ``margin`` of the card's memory free."""
    usable = plan.machine.usable_bytes
    return usable is not None and plan.total_bytes <= usable * (1 - margin)
