"""The compute dtype of a run on the device at hand: on a CPU, by the processor's measured rates."""

import torch

from scalegpt.backends.precision import card_precision
from scalegpt.config import RunConfig
from scalegpt.config.machine import MachineConfig
from scalegpt.hardware.detect import cpu_machine
from scalegpt.planner.precision import fastest_precision


def resolve_precision(run: RunConfig, device: torch.device) -> str:
    """The name of the compute dtype of a run; ``auto`` gives the fastest.

    On CUDA that is bf16 from compute capability 8.0 on, else fp16. On a CPU it is what
    :func:`~scalegpt.planner.precision.fastest_precision` gives for the processor's kept rates, which
    :func:`~scalegpt.speed.rates.measure_if_needed` measures. Neither the processor's flags nor one large matmul tell: with
    AVX-512 bf16 but without AMX some processors are much faster in bf16 and some slower, and with AMX a narrow model is
    slower in bf16.

    Raises:
        InputError: bf16 is wanted on a GPU without bf16.
    """
    wanted = card_precision(run.train.precision, device)
    if wanted != "auto":
        return wanted
    return fastest_precision(run, cpu_machine(MachineConfig(), torch=torch.__version__))
