"""``scalegpt plan``: finds the fastest way to train a run that fits a GPU, and prints its memory and its time."""

import argparse
import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from scalegpt.api import traced
from scalegpt.cli.output import note, show, show_json
from scalegpt.cli.parser import (
    Parser,
    add_json,
    add_run_settings,
    add_settings,
    add_source,
    given_settings,
    path_argument,
)
from scalegpt.cli.plan.text import report
from scalegpt.config import ModelConfig
from scalegpt.config.machine import MOST_GPUS, MachineConfig
from scalegpt.errors import InputError
from scalegpt.planner.query import Answer, Asked, answer
from scalegpt.planner.start.launching import LAUNCHERS
from scalegpt.planner.sweep import MOST, sweep
from scalegpt.planner.tables import largest, over_cards, over_presets, presets_as_dict
from scalegpt.planner.target import Target
from scalegpt.text import shown

EXAMPLE = """\
scalegpt plan --preset 500M_1024 --gpu a100-40gb     the fastest way to train it there
scalegpt plan --gpu rtx4090                          every preset on that GPU, and the largest that fits
scalegpt plan --preset 350M_1024 --gpu 4090 --gpus 8 --micro_batch 12 --recompute selective
scalegpt plan --hf models/Llama-3.2-1B --gpu h100      a model that you have, or only its config.json
scalegpt plan --preset 150M_1024 --memory_gb 12 --json
scalegpt plan --preset 500M_2048 --gpu h100 --gpus 8 --nodes 2 --launch slurm > train.sbatch
scalegpt plan --preset 500M_1024 --gpu h100 --sweep_gpus --network 8xinfiniband-400g --price_per_gpu_hour 2.5
scalegpt plan --ui                                   the planner as a page in your browser"""

DOES_NOT_FIT = 3
"""Exit status of a plan that does not fit."""


def main(argv: Sequence[str]) -> int:
    """Print the plan. Return 0 if the plan fits or the machine's memory is not known, and 3 if it does not fit."""
    arguments = _parser().parse(argv)
    flags = given_settings(arguments)
    if arguments.launch:
        _check_launch(arguments)
    if arguments.ui:
        return _serve(arguments, flags)
    if arguments.port is not None:
        raise InputError("--port is the port of the page that --ui serves; give --ui too")
    is_one_run = bool(
        arguments.preset
        or arguments.config_file
        or arguments.hf
        or "init_from" in flags
        or given_settings(arguments, ModelConfig)
    )
    target = Target.of(
        given_settings(arguments, MachineConfig),
        "command line",
        calibrated=not arguments.no_calibration,
        or_processor=not is_one_run,
    )
    if target.calibration.warning:
        note(f"scalegpt plan: warning: calibration {target.calibration.warning}")
    if not is_one_run:
        _refuse_one_run(arguments)
        return _print_presets(arguments, target, flags)
    asked = Asked.of(
        preset=arguments.preset,
        config_file=arguments.config_file,
        hf=arguments.hf,
        flags=flags,
        machine=target.machine,
        calibration=target.calibration,
        margin=target.margin,
    )
    if arguments.sweep_gpus is not None:
        return _print_sweep(arguments, asked)
    given = answer(asked)
    if arguments.launch:
        return _print_launch(arguments.launch, given)
    if arguments.trace:
        given = traced(given)
    if arguments.html:
        _write_page(arguments.html, given, shlex.join(["scalegpt", "plan", *argv]))
    is_known = target.machine.usable_bytes is not None
    return _print_answer(arguments, given) if is_known or arguments.trace else _print_cards(arguments, asked, given)


def _parser() -> Parser:
    parser = Parser("plan", "Find the fastest way to train a model within a GPU's memory.", EXAMPLE)
    run = parser.add_argument_group("what to plan")
    add_source(run, "none: all of them", hf=True)
    add_json(run)
    run.add_argument("--html", type=path_argument, metavar="FILE", help="also write the plan as a page with charts")
    run.add_argument(
        "--trace", action="store_true", help="also trace the same step with torch, and compare (takes seconds)"
    )
    run.add_argument(
        "--launch",
        choices=tuple(LAUNCHERS),
        help="print only the command or the file that starts the run under this launcher",
    )
    run.add_argument(
        "--sweep_gpus", nargs="?", const=str(MOST), metavar="MAX",
        help=f"the same run on 1, 2, 4, ... GPUs up to MAX [{MOST}]: speed, efficiency, cost, and where to stop; --gpus is "
        "the GPUs of each machine [8]",
    )  # fmt: skip
    run.add_argument("--ui", action="store_true", help="serve the planner as a page on this machine, until Ctrl-C")
    run.add_argument("--port", metavar="N", help="the port of --ui; 0: any free one [8765]")
    run.add_argument("--no_calibration", action="store_true", help="ignore measurements of earlier runs")
    add_settings(parser, "machine", MachineConfig)
    add_run_settings(parser)
    return parser


def _refuse_one_run(arguments: argparse.Namespace) -> None:
    """Refuse the flags that need one run, where there is none."""
    if arguments.launch:
        raise InputError("launch starts one run; give --preset NAME, --config_file FILE or --hf MODEL too")
    if arguments.sweep_gpus is not None:
        raise InputError("sweep_gpus plans one run on more and more GPUs; give --preset NAME too")


def _check_launch(arguments: argparse.Namespace) -> None:
    for name in ("json", "html", "trace", "ui", "sweep_gpus"):
        if getattr(arguments, name) not in {None, False}:
            raise InputError(f"{name} does not go with --launch, which prints one command or file")


def _print_launch(launcher: str, given: Answer) -> int:
    """Print the command or file for a launcher, and nothing else on standard output; notes go to standard error.

    Raises:
        InputError: no card is named, and this machine has none.
    """
    if given.question.machine.usable_bytes is None:
        raise InputError("launch starts a run on GPUs that the plan must know; give --gpu NAME or --memory_gb N too")
    for each in given.notes:
        note(f"scalegpt plan: {each}")
    if not given.choice.can_train:
        note("scalegpt plan: nothing is printed, since the plan does not fit; without --launch it says what would")
        return DOES_NOT_FIT
    show(given.launch(launcher))
    return 0


def _serve(arguments: argparse.Namespace, flags: dict[str, Any]) -> int:
    """Serve the page until Ctrl-C, with its form filled from the arguments.

    Raises:
        InputError: the page does not take an argument, or cannot be served.
    """
    from scalegpt.cli.plan.ui import serve

    for name in ("config_file", "hf", "html", "trace", "json", "sweep_gpus"):
        if getattr(arguments, name):
            raise InputError(
                f"{name} does not go with --ui; the page takes --preset, settings, and files that you choose in it"
            )
    values = {**given_settings(arguments, MachineConfig), **flags}
    return serve({**({"preset": arguments.preset} if arguments.preset else {}), **values}, arguments.port)


def _write_page(path: str, given: Answer, command: str) -> None:
    """Write the plan to ``path`` as an HTML page that shows ``command`` as the command that made it.

    Raises:
        InputError: the file cannot be written, or the machine's memory is not known.
    """
    from scalegpt.plan_page.page import page

    if given.question.machine.usable_bytes is None:
        raise InputError("html shows one run on one machine; give --gpu NAME or --memory_gb N too")
    try:
        Path(path).write_text(
            page(given, command, datetime.now().astimezone().date()), encoding="utf-8", errors="replace"
        )
    except OSError as error:
        raise InputError(f"html {path}: {error.strerror}; give a file that can be written") from None
    note(f"scalegpt plan: the page is in {path}")


def _print_answer(arguments: argparse.Namespace, given: Answer) -> int:
    show_json(given.as_dict()) if arguments.json else show(report(given))
    return 0 if given.choice.can_train else DOES_NOT_FIT


def _print_presets(arguments: argparse.Namespace, target: Target, flags: dict[str, Any]) -> int:
    """Print the plan of every preset on the machine. Return 0 if some preset fits, and 3 if none does."""
    if arguments.html or arguments.trace:
        raise InputError("html and trace show one run; give --preset NAME too")
    rows = over_presets(target.machine, flags, target.calibration, target.margin)
    if arguments.json:
        show_json(presets_as_dict(target.machine, rows))
    else:
        from scalegpt.cli.plan.tables import presets_table

        show(presets_table(target.machine, rows))
    return 0 if largest(rows) else DOES_NOT_FIT


def _print_sweep(arguments: argparse.Namespace, asked: Asked) -> int:
    """Print the run's plans on more and more GPUs. Return 0 if it fits on some of them, and 3 if on none.

    Raises:
        InputError: MAX is not a number of GPUs, or another argument does not go with a sweep.
    """
    text = arguments.sweep_gpus
    for name in ("html", "trace"):
        if getattr(arguments, name):
            raise InputError(f"{name} shows one plan; omit it, or --sweep_gpus")
    if "nodes" in given_settings(arguments, MachineConfig):
        raise InputError(
            "sweep_gpus chooses the number of machines; omit --nodes, and give --gpus for the GPUs of each"
        )
    if not (text.isascii() and text.isdigit() and len(text) < 8 and 1 <= int(text) <= MOST_GPUS):
        raise InputError(f"sweep_gpus must be a whole number from 1 to {MOST_GPUS:,}, not {shown(text)}")
    found = sweep(asked, int(text), gpus_given="gpus" in given_settings(arguments, MachineConfig))
    if arguments.json:
        show_json(found.as_dict())
    else:
        from scalegpt.cli.plan.tables import sweep_table

        show(sweep_table(found))
    return DOES_NOT_FIT if found.best is None else 0


def _print_cards(arguments: argparse.Namespace, asked: Asked, given: Answer) -> int:
    """Print the run's plan on every card. In JSON, ``choice`` is the plan of the run's own settings without a card."""
    rows = over_cards(asked)
    if arguments.json:
        show_json({**given.as_dict(), "gpus": [row.as_dict() for row in rows]})
    else:
        from scalegpt.cli.plan.tables import cards_table

        show(cards_table(given, rows))
    return 0
