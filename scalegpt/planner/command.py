"""The command that trains what was planned, ready to be copied."""

import shlex
from dataclasses import fields
from typing import Any

from scalegpt.config import RunConfig
from scalegpt.config.run import SECTIONS
from scalegpt.config.train import LENGTHS, TrainConfig
from scalegpt.planner.plan import Plan

DECIDED = ("backend", "zero_stage", "micro_batch", "tokens_per_step", "precision", "recompute", "loss")
"""Settings that the command names in any case: what was planned holds whatever the preset becomes."""

DATA = "your_text.txt"
"""Stands for the data, where none is given."""


def launch_command(plan: Plan, base: RunConfig, source: tuple[str, ...]) -> str:
    """The command line of a plan.

    Args:
        plan: what to run.
        base: the run as preset or file have it.
        source: the flag that names them, such as ``("--preset", "tiny")``; empty: none.
    """
    words = [*_launcher(plan), "launch/train.py", *source]
    for section, kind in SECTIONS.items():
        ours, theirs = getattr(plan.run, section), getattr(base, section)
        for field in fields(kind):
            value = getattr(ours, field.name)
            if field.name == "zero_stage":
                if plan.run.parallel.backend == "plain":
                    continue
                value = plan.run.parallel.stage
            if field.name == "ds_config" and value is None:
                continue  # follows from the backend or the stage
            if field.name in LENGTHS:
                continue
            if field.name in DECIDED or value != getattr(theirs, field.name):
                words += [f"--{field.name}", _word(value)]
    words += _length(plan.run.train, base.train)
    if plan.run.data.input_file is None:
        words += ["--input_file", DATA]
    return " ".join(map(shlex.quote, words))


def _length(ours: TrainConfig, theirs: TrainConfig) -> list[str]:
    """The flags of the run's length, where preset or file have another; a length that is given replaces both of theirs."""
    lengths = {key: getattr(ours, key) for key in LENGTHS}
    if all(value == getattr(theirs, key) for key, value in lengths.items()):
        return []
    return [word for key, value in lengths.items() if value is not None for word in (f"--{key}", _word(value))]


def _launcher(plan: Plan) -> list[str]:
    machine = plan.machine
    if machine.nodes > 1:
        place = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "FIRST_MACHINE:29500"]
        return ["torchrun", "--nnodes", str(machine.nodes), "--nproc_per_node", str(machine.gpus), *place]
    if plan.run.parallel.backend == "deepspeed":
        return ["deepspeed", "--num_gpus", str(machine.gpus)]
    return ["torchrun", "--nproc_per_node", str(machine.gpus)] if machine.gpus > 1 else ["python"]


def _word(value: Any) -> str:
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
