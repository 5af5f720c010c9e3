"""``scalegpt plan``: the fastest way to train a run that fits a GPU, with the memory and the time that it takes there."""

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from scalegpt.api import traced
from scalegpt.cli.output import note, show, show_json
from scalegpt.cli.parser import Parser, add_settings, given_settings, path_argument
from scalegpt.cli.plan.text import report
from scalegpt.config import ModelConfig, TrainConfig
from scalegpt.config.machine import CPU, MachineConfig
from scalegpt.config.run import SECTIONS, DataConfig, ParallelConfig
from scalegpt.errors import InputError
from scalegpt.hardware.detect import meant_machine, planned_machine
from scalegpt.hardware.machine import Machine
from scalegpt.planner.query import Answer, Asked, answer, host_notes, machine_as_dict, machine_notes
from scalegpt.planner.tables import largest, over_cards, over_presets
from scalegpt.planner.time import calibration
from scalegpt.planner.time.calibration import Calibration

EXAMPLE = """\
scalegpt plan --preset 500M_1024 --gpu a100-40gb     the fastest way to train it there
scalegpt plan --gpu rtx4090                          every preset on that GPU, and the largest that fits
scalegpt plan --preset 350M_1024 --gpu 4090 --gpus 8 --micro_batch 12 --recompute selective
scalegpt plan --preset 150M_1024 --memory_gb 12 --json"""

DOES_NOT_FIT = 3
"""Exit status of a plan that its card cannot hold."""


def main(argv: Sequence[str]) -> int:
    """Print the plan; 0 where it fits or nothing says what it must fit in, 3 where it does not."""
    arguments = _parser().parse(argv)
    measured = Calibration() if arguments.no_calibration else calibration.load()
    if measured.warning:
        note(f"scalegpt plan: warning: calibration {measured.warning}")
    torch = calibration.installed_torch() if measured.measurements else None
    settings, machine = meant_machine(given_settings(arguments, MachineConfig), torch=torch)
    flags = given_settings(arguments, *SECTIONS.values())
    if not (arguments.preset or arguments.config_file or given_settings(arguments, ModelConfig)):
        machine = machine if machine.usable_bytes is not None else _processor(settings, torch)
        return _print_presets(arguments, machine, flags, measured, settings.margin)
    asked = Asked.of(
        preset=arguments.preset,
        config_file=arguments.config_file,
        flags=flags,
        machine=machine,
        calibration=measured,
        margin=settings.margin,
    )
    given = answer(asked)
    if arguments.trace:
        given = traced(given)
    if arguments.html:
        _write_page(arguments.html, given, shlex.join(["scalegpt", "plan", *argv]))
    cards = machine.usable_bytes is None and not arguments.trace
    return _print_cards(arguments, asked, given) if cards else _print_answer(arguments, given)


def _parser() -> Parser:
    parser = Parser("plan", "Choose the fastest way to train that fits; your own settings are kept.", EXAMPLE)
    run = parser.add_argument_group("what to plan")
    run.add_argument(
        "--preset", metavar="NAME", help="a named configuration, see `scalegpt presets`; none: all of them"
    )
    run.add_argument(
        "--config_file", type=path_argument, metavar="FILE", help="a JSON or YAML file of the same form as a preset"
    )
    run.add_argument("--json", action="store_true", help="print one JSON object")
    run.add_argument("--html", type=path_argument, metavar="FILE", help="also write the plan as a page with pictures")
    run.add_argument(
        "--trace", action="store_true", help="also trace the same step with torch (takes seconds) and compare"
    )
    run.add_argument("--no_calibration", action="store_true", help="ignore measurements of earlier runs")
    add_settings(parser, "machine", MachineConfig)
    add_settings(parser, "data", DataConfig)
    add_settings(parser, "parallel layout", ParallelConfig)
    add_settings(parser, "training", TrainConfig)
    add_settings(parser, "model", ModelConfig)
    return parser


def _processor(settings: MachineConfig, torch: str | None) -> Machine:
    """The processor at hand, where there is no GPU and nothing says what to plan.

    Raises:
        InputError: several GPUs or machines are asked for.
    """
    if settings.gpus is not None or settings.nodes > 1:
        raise InputError(
            "no GPU is here and none is named; give --gpu NAME, --memory_gb N, or --preset NAME for every GPU"
        )
    machine = planned_machine(settings.changed(gpu=CPU), torch=torch)
    remark = (
        "no GPU was found: this is this machine's processor; --gpu NAME plans for a GPU, --preset NAME shows every GPU"
    )
    return replace(machine, notes=(remark, *machine.notes))


def _write_page(path: str, given: Answer, words: str) -> None:
    """Write the page, which names the words that asked for it.

    Raises:
        InputError: it cannot be written, or no machine is known to show the plan on.
    """
    from scalegpt.cli.plan.page import page

    if given.question.machine.usable_bytes is None:
        raise InputError("html shows one run on one machine; give --gpu NAME or --memory_gb N too")
    try:
        Path(path).write_text(
            page(given, words, datetime.now().astimezone().date()), encoding="utf-8", errors="replace"
        )
    except OSError as error:
        raise InputError(f"html {path}: {error.strerror}; give a file that can be written") from None


def _print_answer(arguments: argparse.Namespace, given: Answer) -> int:
    show_json(given.as_dict()) if arguments.json else show(report(given))
    return DOES_NOT_FIT if given.choice.fits is False or not given.choice.fits_host else 0


def _print_presets(
    arguments: argparse.Namespace, machine: Machine, flags: dict[str, Any], measured: Calibration, margin: float
) -> int:
    """Every preset on the machine; the choice in JSON is that of the largest that fits."""
    if arguments.html or arguments.trace:
        raise InputError("html and trace show one run; give --preset NAME too")
    rows = over_presets(machine, flags, measured, margin)
    if not arguments.json:
        from scalegpt.cli.plan.tables import presets_table

        show(presets_table(machine, rows))
        return 0 if largest(rows) else DOES_NOT_FIT
    best = largest(rows) or rows[0]
    notes = [*machine_notes(machine), *host_notes(*(row.plan for row in rows))]
    whole = {**best.as_dict(), "gpu": machine_as_dict(machine), "alternatives": [], "notes": notes}
    show_json({**whole, "largest": best.name if best.fits else None, "presets": [row.as_dict() for row in rows]})
    return 0 if best.fits else DOES_NOT_FIT


def _print_cards(arguments: argparse.Namespace, asked: Asked, given: Answer) -> int:
    """The run on every card; the choice in JSON is the run as it stands, on no card in particular."""
    rows = over_cards(asked)
    if arguments.json:
        show_json({**given.as_dict(), "gpus": [row.as_dict() for row in rows]})
    else:
        from scalegpt.cli.plan.tables import cards_table

        show(cards_table(given, rows))
    return 0
