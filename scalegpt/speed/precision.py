"""Chooses the compute dtype of a run on the device that it uses. On a CPU the processor's measured rates decide."""

import torch

from scalegpt.backends.precision import card_precision
from scalegpt.config import RunConfig
from scalegpt.config.machine import MachineConfig
from scalegpt.hardware.detect import cpu_machine
from scalegpt.planner.precision import fastest_precision


def resolve_precision(run: RunConfig, device: torch.device) -> str:
    """The name of the compute dtype of a run; ``auto`` gives the fastest.

    On CUDA that is bf16 from compute capability 8.0 on, else fp16. On a CPU it is what
    :func:`~scalegpt.planner.precision.fastest_precision` gives for the processor's stored rates, which
    :func:`~scalegpt.speed.rates.measure_if_needed` measures. The processor's flags do not decide: of the processors
    with AVX-512 bf16 but without AMX, some are much faster in bf16 and some slower. The time of one large matmul does
    not decide either: with AMX a narrow model is slower in bf16.

    Raises:
        InputError: bf16 is wanted on a GPU without bf16.
    """
    wanted = card_precision(run.train.precision, device)
    if wanted != "auto":
        return wanted
    return fastest_precision(run, cpu_machine(MachineConfig(), torch=torch.__version__))
