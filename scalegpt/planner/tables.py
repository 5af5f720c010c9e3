"""Tables of answers: every preset on one machine, one run on every card, or one run on other numbers of cards."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from scalegpt.architecture.counting import count_parameters
from scalegpt.config import RunConfig
from scalegpt.config.presets import preset_names
from scalegpt.errors import InputError
from scalegpt.hardware.gpus import catalogue
from scalegpt.hardware.machine import Machine
from scalegpt.planner.plan import Plan
from scalegpt.planner.query import Answer, Asked, answer, host_notes, machine_as_dict, machine_notes, model_as_dict
from scalegpt.planner.search.question import MARGIN
from scalegpt.planner.time.calibration import Calibration

Values = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One row of a table: a run on a machine.

    Attributes:
        name: the name of the preset or of the card.
        asked: the question.
        given: the planner's answer; None if the settings do not work on the machine.
        why_not: the error message if there is no answer; else None.
        fits_without_offload: whether a plan without offload fits too; False if the chosen plan does not offload.
    """

    name: str
    asked: Asked
    given: Answer | None
    why_not: str | None = None
    fits_without_offload: bool = False

    @property
    def plan(self) -> Plan | None:
        """The chosen plan; None without an answer."""
        return None if self.given is None else self.given.choice

    @property
    def run(self) -> RunConfig:
        """The run with the chosen settings; without an answer, the run as asked."""
        return self.asked.run if self.given is None else self.given.choice.run

    @property
    def fits(self) -> bool:
        """Whether the chosen plan fits the card and the host memory."""
        return self.plan is not None and self.plan.fits is True and self.plan.fits_host

    @property
    def offloads(self) -> bool:
        """Whether the chosen plan offloads."""
        return self.plan is not None and self.plan.run.parallel.offload != "none"

    def as_dict(self) -> Values:
        """The row in the form that ``--json`` prints."""
        return {
            "name": self.name,
            "model": model_as_dict(self.run),
            "gpu": machine_as_dict(self.asked.machine),
            "choice": None if self.given is None else self.given.plan_as_dict(self.given.choice),
            "why_not": self.why_not,
        }


def over_presets(
    machine: Machine,
    flags: Values,
    calibration: Calibration,
    margin: float = MARGIN,
    names: Iterable[str] | None = None,
) -> list[Row]:
    """A row for each of the presets ``names`` (None: all of ScaleGPT's own) on one machine, the smallest model first."""

    def row_with(name: str, flags: Values) -> Row:
        return row_of(
            name,
            Asked.of(
                preset=name, config_file=None, flags=flags, machine=machine, calibration=calibration, margin=margin
            ),
        )

    rows = []
    for name in preset_names() if names is None else names:
        row = row_with(name, flags)
        if row.fits and row.offloads and "offload" not in flags:
            row = replace(row, fits_without_offload=row_with(name, {**flags, "offload": "none"}).fits)
        rows.append(row)
    return sorted(rows, key=lambda row: (count_parameters(row.run.model).total, row.run.model.block_size))


def over_cards(asked: Asked) -> list[Row]:
    """A row for every card of the catalogue, with the number of cards in ``asked``. The smallest memory comes first."""
    machine = asked.machine
    cards = sorted(catalogue(), key=lambda card: (card.usable_bytes, card.tflops))
    return [row_of(card.name, replace(asked, machine=machine.with_other_card(card))) for card in cards]


MOST_IN_A_MACHINE, MOST_MACHINES = 8, 8
"""The largest numbers of cards in a machine, and of machines, in :func:`over_counts`, unless more are asked for."""


def over_counts(asked: Asked) -> Iterator[Row]:
    """A row for each of several numbers of cards, the fewest first. The name of a row is its number of cards.

    The numbers are powers of two up to twice the number that is asked for, in one machine and then in full machines. If the
    run does not say its tokens per step, they grow with the number of cards.
    """
    machine = asked.machine
    width = machine.gpus if machine.nodes > 1 else max(machine.gpus, MOST_IN_A_MACHINE)
    sizes = {(gpus, 1) for gpus in doublings(width)}
    most = max(2 * machine.ranks, MOST_IN_A_MACHINE * MOST_MACHINES)
    sizes |= {(width, nodes) for nodes in doublings(max(1, most // width))}
    sizes.add((machine.gpus, machine.nodes))
    for gpus, nodes in sorted(sizes, key=lambda size: (size[0] * size[1], size[1])):
        other = machine.with_cards(gpus=gpus, nodes=nodes)
        yield row_of(str(other.ranks), replace(asked, machine=other))


def doublings(most: int) -> Iterator[int]:
    """1, 2, 4, … up to ``most``, and ``most`` itself."""
    yield from sorted({most, *(2**power for power in range(most.bit_length()))} - {0})


def row_of(name: str, asked: Asked) -> Row:
    """A row with the answer to a question, without alternatives and remedies."""
    try:
        return Row(name, asked, answer(asked, explain=False))
    except InputError as error:
        return Row(name, asked, None, str(error))


def largest(rows: list[Row], *, without_offload: bool = False) -> Row | None:
    """The row with the largest model that fits; None if none fits. ``without_offload``: only plans without offload count."""
    fitting = [row for row in rows if row.fits]
    if without_offload:
        fitting = [row for row in fitting if not row.offloads or row.fits_without_offload]
    return max(fitting, key=lambda row: count_parameters(row.run.model).total, default=None)


def presets_as_dict(machine: Machine, rows: list[Row]) -> Values:
    """The table of presets in the form that ``--json`` prints.

    Its top level describes the largest preset that fits, else the first.
    """
    best = largest(rows)
    return {
        **(best or rows[0]).as_dict(),
        "gpu": machine_as_dict(machine),
        "alternatives": [],
        "notes": [*machine_notes(machine), *host_notes(*(row.plan for row in rows))],
        "largest": None if best is None else best.name,
        "presets": [row.as_dict() for row in rows],
    }
