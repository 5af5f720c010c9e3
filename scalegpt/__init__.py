"""ScaleGPT: plans the memory of a GPT training run, then trains it with FSDP2 or DeepSpeed ZeRO.

>>> import scalegpt
>>> scalegpt.plan("500M_1024", gpu="a100-40gb", gpus=8).choice.fits
True
>>> folder = scalegpt.train("tiny", input_file="my_text.txt")  # doctest: +SKIP
>>> scalegpt.load(folder).generate("Once upon a time")  # doctest: +SKIP

:mod:`scalegpt.api` documents the functions. Each function is imported at its first use, and torch only when needed.
"""

from typing import TYPE_CHECKING, Any

from scalegpt.errors import InputError, RunError

if TYPE_CHECKING:
    from scalegpt.api import load, plan, train

__version__ = "0.1.0"

__all__ = ["InputError", "RunError", "__version__", "load", "plan", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from scalegpt import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
