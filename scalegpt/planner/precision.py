"""The compute dtype that is fastest on a processor whose rates are measured."""

from dataclasses import replace

from scalegpt.config import RunConfig
from scalegpt.config.backends import Mesh
from scalegpt.hardware.machine import Machine
from scalegpt.hardware.processor import MEASURED
from scalegpt.planner.attention import attention_kernel
from scalegpt.planner.time.rates import Rates
from scalegpt.planner.time.step_time import micro_step_seconds
from scalegpt.planner.time.work import count_work

GAIN = 1.1
"""bf16 is chosen if it is at least this many times as fast as fp32, which computes more exactly."""


def fastest_precision(run: RunConfig, machine: Machine) -> str:
    """``bf16`` if it is at least :data:`GAIN` times as fast by the machine's measured rates, else ``fp32``.

    If the rates are not measured it is ``fp32``. Planner and trainer both call this function, so they agree.

    Args:
        run: the run, with its vocabulary or the one that is expected. Its precision does not matter.
        machine: a machine without GPU.
    """
    if machine.measured is None or machine.card is None:
        return "fp32"
    seconds = {}
    for precision in MEASURED:
        each = replace(run, train=run.train.changed(precision=precision))
        work = count_work(each, Mesh(), kernel=attention_kernel(each, machine.card), compiled=False)
        seconds[precision] = micro_step_seconds(work, Rates.of(machine.card, machine, precision))
    return "bf16" if seconds["fp32"] > GAIN * seconds["bf16"] else "fp32"
