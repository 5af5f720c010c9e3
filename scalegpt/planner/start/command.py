"""The command line that starts the training of a plan with this installation, ready to be pasted into a shell."""

import shlex
from collections.abc import Collection
from dataclasses import fields
from typing import Any

from scalegpt.config import RunConfig
from scalegpt.config.run import SECTIONS
from scalegpt.config.train import LENGTHS, TrainConfig
from scalegpt.planner.checks import vocabulary_remark
from scalegpt.planner.plan import Plan
from scalegpt.system.invocation import train_command

DECIDED = ("backend", "zero_stage", "micro_batch", "tokens_per_step", "precision", "recompute", "loss")
"""Settings that the command always names, so that it trains the plan even if the preset changes later."""

DATA, PREPARED = "your_text.txt", "your_prepared_folder"
"""Placeholders for ``--input_file`` if none is given. The second is for prepared data, used if the tokenizer has more tokens
than the model's vocabulary."""


def launch_command(plan: Plan, base: RunConfig, source: tuple[str, ...], given: Collection[str] = ()) -> str:
    """The command line that starts the training of a plan; the arguments are those of :func:`run_words`."""
    launcher = plan.run.parallel.spec.launch(plan.machine.gpus, plan.machine.nodes)
    return f"{train_command(*launcher)} {shlex.join(run_words(plan, base, source, given))}"


def run_words(plan: Plan, base: RunConfig, source: tuple[str, ...], given: Collection[str] = ()) -> list[str]:
    """The flags with which the trainer trains a plan.

    Args:
        plan: the plan.
        base: the run as the preset or the file defines it, without flags.
        source: the flag that names the preset or the file, for example ``("--preset", "tiny")``; empty: there is
            neither.
        given: names of the settings that flags gave.
    """
    words = list(source)
    for section, kind in SECTIONS.items():
        ours, theirs = getattr(plan.run, section), getattr(base, section)
        for field in fields(kind):
            value = getattr(ours, field.name)
            if field.name == "zero_stage":
                if not plan.run.parallel.spec.has_stages:
                    continue
                value = plan.run.parallel.stage
            if field.name == "ds_config" and value is None:
                continue  # without a DeepSpeed file, backend and stage say enough
            if field.name in LENGTHS:
                continue
            named = field.name in DECIDED or value != getattr(theirs, field.name)
            if field.name == "vocab_size" and plan.run.data.tokenizer != "gpt2":
                named = "vocab_size" in given  # if not, the trainer takes the tokenizer's size
            if named:
                word = _word(value)
                words += [f"--{field.name}={word}"] if word.startswith("-") else [f"--{field.name}", word]
    return words + _length(plan.run.train, base.train) + _surroundings(plan)


def _surroundings(plan: Plan) -> list[str]:
    """Flags for a placeholder if the run names no data, and for the network that the user has stated."""
    words = []
    if plan.run.data.input_file is None:
        words += ["--input_file", DATA if vocabulary_remark(plan.run) is None else PREPARED]
    if plan.machine.nodes > 1 and plan.machine.network_gbps is not None:
        words += ["--network", f"{plan.machine.network_gbps:g}Gb/s"]
    return words


def _length(ours: TrainConfig, theirs: TrainConfig) -> list[str]:
    """Flags for the settings of :data:`LENGTHS`, the length of the run; empty if none differs from preset or file."""
    lengths = {key: getattr(ours, key) for key in LENGTHS}
    if all(value == getattr(theirs, key) for key, value in lengths.items()):
        return []
    return [word for key, value in lengths.items() if value is not None for word in (f"--{key}", _word(value))]


def _word(value: Any) -> str:
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
