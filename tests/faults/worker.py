"""``launch/train.py`` for the fault tests: the real command, in which faults are laid that cannot be caused from outside.

``FAULTS`` in the environment holds them as JSON. Each rank reads:

``pace``   seconds that every step takes longer, so that there is a middle to hit
``slow``   ``{"place": …, "seconds": …}``: entering it first takes that long, from ``step`` on; leaves ``at_PLACE.RANK``
``stall``  ``{"rank": …, "step": …}``: that rank's loader does not return, once: not after a restart
``oom``    ``{"rank": …, "step": …, "above": …}``: that rank asks for 2^50 bytes if its micro batch is larger than ``above``
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FAULTS: dict[str, Any] = json.loads(os.environ.get("FAULTS", "{}"))
RANK = int(os.environ.get("RANK", "0"))


def slow_down(owner: Any, name: str, now: list[int], *, place: str, seconds: float, step: int = 0) -> None:
    real = getattr(owner, name)
    taken = []

    def slowed(*arguments: Any, **options: Any) -> Any:
        if not taken and now[0] >= step:
            taken.append(True)
            Path(f"at_{place}.{RANK}").touch()
            time.sleep(seconds)
        return real(*arguments, **options)

    setattr(owner, name, slowed)


def lay_faults() -> None:
    import torch

    from scalegpt.training import setup
    from scalegpt.training.loader import TrainingBatches
    from scalegpt.training.saving import Saving
    from scalegpt.training.trainer import Trainer

    now = [0]
    places = {
        "setup": (setup, "build_model"), "compile": (Trainer, "_take_step"), "save": (Saving, "save"),
        "evaluate": (Trainer, "_evaluate"), "write": (os, "fsync"),
    }  # fmt: skip
    if "slow" in FAULTS:
        slow_down(*places[FAULTS["slow"]["place"]], now, **FAULTS["slow"])
    batches = TrainingBatches.step

    def step(self: TrainingBatches, first: int) -> Iterator[Any]:
        now[0] = first // self.plan.sequences + 1  # no windows are left out here
        time.sleep(FAULTS.get("pace", 0.0))
        stall, once = FAULTS.get("stall", {}), Path(f"stalled.{RANK}")
        if (stall.get("rank"), stall.get("step")) == (RANK, now[0]) and not once.exists():
            once.touch()
            time.sleep(3600)
        return batches(self, first)

    TrainingBatches.step = step  # type: ignore[method-assign]
    oom = FAULTS.get("oom", {})
    if oom.get("rank") == RANK:
        from scalegpt.backends.deepspeed import DeepSpeedBackend
        from scalegpt.backends.fsdp import FSDPBackend

        for backend in (DeepSpeedBackend, FSDPBackend):
            backend.micro_step = hungry(backend.micro_step, now, oom, torch)  # type: ignore[method-assign]


def hungry(real: Callable[..., Any], now: list[int], oom: dict[str, int], torch: Any) -> Callable[..., Any]:
    def micro_step(self: Any, tokens: Any, targets: Any, *, last: bool) -> Any:
        if now[0] == oom["step"] and len(tokens) > oom["above"]:
            torch.empty(2**50, dtype=torch.uint8)
        return real(self, tokens, targets, last=last)

    return micro_step


if __name__ == "__main__":
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from scalegpt.cli.main import run_and_exit

    lay_faults()
    run_and_exit(["train", *sys.argv[1:]])
