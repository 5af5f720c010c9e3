"""``scalegpt plan``: the memory that a configuration takes on a GPU, part by part, and whether it fits."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from scalegpt.cli.parser import Parser, add_settings, given_settings
from scalegpt.cli.plan_report import report
from scalegpt.config import ModelConfig, RunConfig, TrainConfig
from scalegpt.config.machine import MachineConfig
from scalegpt.config.presets import resolve
from scalegpt.config.run import SECTIONS, DataConfig, ParallelConfig
from scalegpt.planner import calibration
from scalegpt.planner.batches import plan_batches
from scalegpt.planner.checks import check_attention, check_ranks, resolve_precision
from scalegpt.planner.command import launch_command
from scalegpt.planner.detect import planned_machine
from scalegpt.planner.machine import Machine
from scalegpt.planner.parameters import count_parameters
from scalegpt.planner.plan import Plan, first_that_fits, make_plan

EXAMPLE = """\
scalegpt plan --preset 500M_1024 --gpu a100-40gb
scalegpt plan --preset 350M_1024 --gpu rtx4090 --gpus 8 --micro_batch 12 --recompute selective
scalegpt plan --preset 150M_1024 --memory_gb 12 --json"""

DOES_NOT_FIT = 3
"""Exit status of a plan that its card cannot hold."""

OPEN = ("backend", "zero_stage", "offload", "micro_batch", "recompute", "loss")
"""Settings for which ``auto`` leaves the word to the preset."""


@dataclass(frozen=True)
class Answer:
    """What was asked, as a plan, and what is to be said about it.

    Attributes:
        base: the run as the preset or file has it.
        source: the flag that names preset or file.
        notes: remarks, a line each.
        lighter: the nearest plan that fits, where this one does not.
        trace: phase → bytes by the trace, where one was asked for.
    """

    plan: Plan
    base: RunConfig
    source: tuple[str, ...]
    notes: tuple[str, ...]
    lighter: Plan | None = None
    trace: dict[str, int] | None = None

    def command(self, plan: Plan | None = None) -> str:
        """The command that trains by the plan, or by another of the same run."""
        return launch_command(plan or self.plan, self.base, self.source)

    def as_dict(self) -> dict[str, Any]:
        """The answer as ``--json`` prints it."""
        run, machine = self.plan.run, self.plan.machine
        choice = self.plan.as_choice(self.command())
        if self.trace is not None:
            choice["trace"] = {"peak_bytes": max(self.trace.values()), "phases": self.trace}
        lighter = None if self.lighter is None else self.lighter.as_choice(self.command(self.lighter))
        return {
            "model": {
                "name": run.name,
                "parameters": count_parameters(run.model).total,
                **{key: getattr(run.model, key) for key in ModelConfig.settings()},
            },
            "gpu": {
                "name": machine.name,
                "usable_bytes": machine.usable_bytes,
                "count": machine.gpus,
                "nodes": machine.nodes,
            },
            "choice": choice,
            "alternatives": [],
            "would_fit": lighter,
            "notes": list(self.notes),
        }


def main(argv: Sequence[str]) -> int:
    """Print the plan; 0 where it fits or nothing says what it must fit in, 3 where it does not."""
    arguments = _parser().parse(argv)
    answer = _answer(arguments)
    if answer.plan.fits is False:
        answer = replace(answer, lighter=first_that_fits(answer.plan, _calibration(arguments)))
    if arguments.trace:
        answer = replace(answer, trace=_trace(answer.plan))
    if arguments.json:
        print(json.dumps(answer.as_dict(), indent=2, ensure_ascii=False))
    else:
        advice = None if answer.lighter is None else answer.command(answer.lighter)
        print(report(answer.plan, answer.command(), answer.notes, answer.lighter, advice, answer.trace))
    return DOES_NOT_FIT if answer.plan.fits is False else 0


def _parser() -> Parser:
    parser = Parser("plan", "Predict the memory that a training run takes on each GPU, part by part.", EXAMPLE)
    run = parser.add_argument_group("what to plan")
    run.add_argument("--preset", metavar="NAME", help="a named configuration, see `scalegpt presets`")
    run.add_argument("--config_file", metavar="FILE", help="a JSON or YAML file of the same form as a preset")
    run.add_argument("--json", action="store_true", help="print one JSON object")
    run.add_argument("--trace", action="store_true", help="trace the same step with torch too (seconds) and compare")
    run.add_argument("--no_calibration", action="store_true", help="leave measurements of earlier runs out")
    add_settings(parser, "machine", MachineConfig)
    add_settings(parser, "data", DataConfig)
    add_settings(parser, "parallel layout", ParallelConfig)
    add_settings(parser, "training", TrainConfig)
    add_settings(parser, "model", ModelConfig)
    return parser


def _answer(arguments: argparse.Namespace) -> Answer:
    flags = given_settings(arguments, *SECTIONS.values())
    flags = {key: value for key, value in flags.items() if key not in OPEN or value != "auto"}
    settings = MachineConfig.from_mapping(given_settings(arguments, MachineConfig), "command line")
    base = resolve(preset=arguments.preset, config_file=arguments.config_file)
    run = resolve(preset=arguments.preset, config_file=arguments.config_file, flags=flags)
    measured = _calibration(arguments)
    torch = calibration.installed_torch() if measured.measurements else None
    machine = _machine(settings, torch)
    precision = resolve_precision(run.train.precision, machine.card, machine.capability)
    check_attention(run, precision, machine.card)
    remark = check_ranks(run, machine.ranks, stage_fixed="zero_stage" in flags)
    run = replace(run, train=run.train.changed(precision=precision))
    batch = plan_batches(run, machine.ranks, micro_fixed="micro_batch" in flags)
    plan = make_plan(run, machine, batch, measured)
    named = {"--preset": arguments.preset, "--config_file": arguments.config_file}
    source = next(((flag, value) for flag, value in named.items() if value is not None), ())
    return Answer(plan, base, source, _notes(run, plan, remark, measured))


def _machine(settings: MachineConfig, torch: str | None) -> Machine:
    """The machine that is meant; of one without a GPU, its processor only where that was asked for."""
    machine = planned_machine(settings, torch=torch)
    if machine.is_gpu or settings.gpu is not None:
        return machine
    return replace(Machine.of(settings, torch=torch), notes=machine.notes)


def _calibration(arguments: argparse.Namespace) -> calibration.Calibration:
    return calibration.Calibration() if arguments.no_calibration else calibration.load()


def _notes(run: RunConfig, plan: Plan, remark: str | None, measured: calibration.Calibration) -> tuple[str, ...]:
    notes = []
    if plan.batch.micro_batch < run.train.micro_batch:
        notes.append(
            f"micro batch {plan.batch.micro_batch} rather than {run.train.micro_batch}: it divides the tokens of a step"
        )
    if remark:
        notes.append(remark)
    notes += plan.machine.notes
    card = plan.machine.card
    if card is not None and card.is_estimated:
        notes.append(f"the usable memory of {card.name} is estimated")
    if measured.warning:
        notes.append(f"warning: calibration {measured.warning}")
        print(f"scalegpt plan: warning: calibration {measured.warning}", file=sys.stderr)
    return tuple(notes)


def _trace(plan: Plan) -> dict[str, int]:
    """The same step, traced with the trainer's own code.

    Raises:
        InputError: a backend or an offload that cannot be traced.
    """
    from scalegpt.training.trace import trace_step

    return trace_step(plan.run, ranks=plan.machine.ranks, grad_accum=plan.batch.grad_accum).phases
