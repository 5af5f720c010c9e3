"""The compute dtype of a run on a card."""

import torch

from scalegpt.backends.capabilities import device_name
from scalegpt.errors import InputError


def card_precision(wanted: str, device: torch.device) -> str:
    """The name of the compute dtype for the setting ``precision`` on a card: ``auto`` gives bf16 from 8.0 on, else fp16.

    On a CPU the result is ``wanted``; :mod:`scalegpt.speed.precision` resolves ``auto`` there.

    Raises:
        InputError: bf16 is wanted on a GPU without bf16.
    """
    if device.type != "cuda":
        return wanted
    native = torch.cuda.get_device_capability(device) >= (8, 0)
    if wanted == "bf16" and not native:
        raise InputError(f"precision bf16: {device_name(device)} has no bf16; use --precision fp16")
    return wanted if wanted != "auto" else "bf16" if native else "fp16"
