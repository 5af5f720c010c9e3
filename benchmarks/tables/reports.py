"""Examples of what ``scalegpt plan`` prints, and the keys of its JSON."""

import re
import shlex
from typing import Any

from benchmarks.tables.markdown import code, fenced
from scalegpt.cli.plan.tables import presets_table, sweep_table
from scalegpt.cli.plan.text import report
from scalegpt.config.machine import MachineConfig
from scalegpt.hardware.machine import Machine
from scalegpt.planner.query import Answer, Asked, answer
from scalegpt.planner.sweep import sweep as sweep_of
from scalegpt.planner.tables import over_presets
from scalegpt.planner.time.calibration import Calibration
from scalegpt.system.invocation import program, train_command


def _answer(preset: str, card: str, **flags: Any) -> Answer:
    machine = Machine.of(MachineConfig(gpu=card))
    return answer(Asked.of(preset=preset, config_file=None, flags=flags, machine=machine))


def _reported(given: Answer) -> str:
    """The report of an answer.

    On any machine, its commands are those of a checkout without an active virtual environment.
    """
    text = report(given)
    target = train_command().removeprefix(shlex.join(program("python"))).strip()
    for launcher in ("python", "torchrun", "deepspeed"):
        start = re.escape(f"  {shlex.join(program(launcher))} ")
        text = re.sub(
            rf"^{start}(.*?){re.escape(target)} ",
            rf"  .venv/bin/{launcher} \1launch/train.py ",
            text,
            flags=re.MULTILINE,
        )
    return text


def whole() -> str:
    """An example of a whole report."""
    return fenced("$ scalegpt plan --gpu a100-40gb --preset 500M_1024\n" + _reported(_answer("500M_1024", "a100-40gb")))


def does_not_fit() -> str:
    """An example of the report on a run that does not fit: the part from the memory bar to the end."""
    flags = {"micro_batch": 8, "recompute": "none", "backend": "plain"}
    text = _reported(_answer("500M_1024", "rtx3060", **flags))
    said = " ".join(f"--{name} {value}" for name, value in flags.items())
    end = text[text.index("\n[") :].strip()
    return fenced(f"$ scalegpt plan --gpu rtx3060 --preset 500M_1024 {said}\n…\n{end}")


def sweep() -> str:
    """An example of a sweep over numbers of GPUs."""
    settings = MachineConfig(gpu="h100 sxm", network="8xinfiniband-400g", price_per_gpu_hour=2.5)
    asked = Asked.of(preset="500M_1024", config_file=None, flags={}, machine=Machine.of(settings))
    words = "--preset 500M_1024 --gpu 'h100 sxm' --sweep_gpus --network 8xinfiniband-400g --price_per_gpu_hour 2.5"
    return fenced(f"$ scalegpt plan {words}\n{sweep_table(sweep_of(asked))}")


def every_preset() -> str:
    """An example of the table of every preset on one card."""
    machine = Machine.of(MachineConfig(gpu="rtx4090"))
    return fenced("$ scalegpt plan --gpu rtx4090\n" + presets_table(machine, over_presets(machine, {}, Calibration())))


def json_keys() -> str:
    """The keys of the JSON object, of its ``choice``, and of its alternatives, as a list in Markdown."""
    whole = _answer("500M_1024", "a100-40gb").as_dict()
    alternative = set(whole["alternatives"][0]) - set(whole["choice"])
    return "\n".join((
        f"- the object: {_codes(whole)}",
        f"- `choice`: {_codes(whole['choice'])}",
        f"- an alternative has the same and {_codes(sorted(alternative))}",
    ))  # fmt: skip


def _codes(names: Any) -> str:
    return ", ".join(map(code, names))
