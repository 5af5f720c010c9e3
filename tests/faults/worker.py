"""``launch/train.py`` for the fault tests: the real command, with injected faults that cannot be caused from outside.

``FAULTS`` in the environment holds them as JSON. Each rank reads:

``pace``    seconds that every step takes longer, so that there is a middle to hit
``slow``    ``{"place": …, "seconds": …}``: entering it first takes that long, from ``step`` on and, where that is given, of
            ``rank`` alone; leaves ``at_PLACE.RANK``, and then ``left_PLACE.RANK`` with the step that has come meanwhile
``stall``   ``{"rank": …, "step": …}``: that rank's loader does not return, once: not after a restart
``crash``   ``{"rank": …, "step": …}``: that rank is killed in that step, once
``signal``  ``{"rank": …, "step": …}``: that rank is sent SIGUSR1 in that step
``oom``     ``{"rank": …, "step": …, "above": …}``: that rank asks for 2^50 bytes if its micro batch is larger than ``above``
``burn``    ``{"rank": …, "seconds": …}``: that rank computes this long more in every micro batch
``eio``     ``{"rank": …, "step": …, "times": …}``: syncing a file fails this many times on that rank
``writer``  ``{"rank": …, "step": …}``: that rank's writing of a checkpoint runs into an error that is not the disk's
``elsewhere`` ``{"rank": …, "folder": …}``: that rank runs in another folder, and so sees no ``runs/``: another machine's disk
``limit``   ``{"step": …, "bytes": …}``: no file may become larger
"""

import errno
import json
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FAULTS: dict[str, Any] = json.loads(os.environ.get("FAULTS", "{}"))
RANK = int(os.environ.get("RANK", "0"))
NOW = [0]
"""The step under way."""


def always(*_arguments: Any, **_options: Any) -> bool:
    return True


def is_commit(source: Path, target: Any) -> bool:
    """Of ``Path.rename``: the one that makes a checkpoint."""
    return source.name.endswith(".tmp") and Path(target).name.startswith("step_")


class SecondOfTree:
    """Of ``os.unlink``: the second file of a tree that is deleted."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, _path: Any, **options: Any) -> bool:
        self.seen += "dir_fd" in options and NOW[0] > 0
        return self.seen == 2


def slow_down(
    owner: Any, name: str, applies: Callable[..., bool], *, place: str, seconds: float, step: int = 0, rank: int = RANK
) -> None:
    real = getattr(owner, name)
    taken = []

    def slowed(*arguments: Any, **options: Any) -> Any:
        if not taken and NOW[0] >= step and rank == RANK and applies(*arguments, **options):
            taken.append(True)
            Path(f"at_{place}.{RANK}").touch()
            time.sleep(seconds)
            Path(f"left_{place}.{RANK}").write_text(str(NOW[0]))
        return real(*arguments, **options)

    setattr(owner, name, slowed)


def fail(owner: Any, name: str, error: Exception, *, step: int, times: int = 2**30, rank: int = RANK) -> None:
    """Let a function raise this many times, from a step on."""
    real, left = getattr(owner, name), [times]

    def failing(*arguments: Any, **options: Any) -> Any:
        if left[0] and NOW[0] >= step and rank == RANK:
            left[0] -= 1
            raise error
        return real(*arguments, **options)

    setattr(owner, name, failing)


def is_here(fault: str) -> bool:
    """Whether a fault is of this rank and step."""
    place = FAULTS.get(fault, {})
    return (place.get("rank"), place.get("step")) == (RANK, NOW[0])


def is_first_time(fault: str) -> bool:
    once = Path(f"{fault}.{RANK}")
    if once.exists():
        return False
    once.touch()
    return True


def install_faults() -> None:
    import torch

    from scalegpt.backends import World
    from scalegpt.checkpoint import writer
    from scalegpt.training.batches import TrainingBatches
    from scalegpt.training.checkpointing import Saving
    from scalegpt.training.setup import prepare
    from scalegpt.training.trainer import Trainer

    places: dict[str, tuple[Any, str, Callable[..., bool]]] = {
        "join": (World, "join", always), "setup": (prepare, "build_model", always),
        "compile": (Trainer, "_take_step", always),
        "save": (Saving, "save", always), "evaluate": (Trainer, "_evaluate", always), "write": (os, "fsync", always),
        "reduce": (Trainer, "_report", always), "part": (writer, "write_part", always),
        "assemble": (writer, "_assemble", always), "commit": (Path, "rename", is_commit),
        "rotate": (os, "unlink", SecondOfTree()),
    }  # fmt: skip
    if FAULTS.get("slow", {}).get("place") in places:
        slow_down(*places[FAULTS["slow"]["place"]], **FAULTS["slow"])
    if "eio" in FAULTS:
        fail(os, "fsync", OSError(errno.EIO, os.strerror(errno.EIO)), **FAULTS["eio"])
    if "writer" in FAULTS:
        fail(writer, "write_part", ValueError("no such luck"), **FAULTS["writer"])
    batches = TrainingBatches.step

    def step(self: TrainingBatches, first: int) -> Iterator[Any]:
        NOW[0] = first // self.plan.sequences + 1  # no windows are skipped here
        time.sleep(FAULTS.get("pace", 0.0))
        inject()
        return batches(self, first)

    TrainingBatches.step = step  # type: ignore[method-assign]
    oom, burn = FAULTS.get("oom", {}), FAULTS.get("burn", {})
    if RANK in (oom.get("rank"), burn.get("rank")):
        from scalegpt.backends.deepspeed.engine import DeepSpeedBackend
        from scalegpt.backends.fsdp import FSDPBackend

        for backend in (DeepSpeedBackend, FSDPBackend):
            real = backend.micro_step
            changed = hungry(real, oom, torch) if oom else burning(real, burn["seconds"])
            backend.micro_step = changed  # type: ignore[method-assign]


def inject() -> None:
    """Inject the faults of a step, before its data are read."""
    if is_here("stall") and is_first_time("stall"):
        time.sleep(3600)
    if is_here("crash") and is_first_time("crash"):
        os.kill(os.getpid(), signal.SIGKILL)
    if is_here("signal"):
        os.kill(os.getpid(), signal.SIGUSR1)
    if NOW[0] == FAULTS.get("limit", {}).get("step"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (FAULTS["limit"]["bytes"], resource.RLIM_INFINITY))


def hungry(real: Callable[..., Any], oom: dict[str, int], torch: Any) -> Callable[..., Any]:
    def micro_step(self: Any, tokens: Any, targets: Any, *, last: bool) -> Any:
        if NOW[0] == oom["step"] and len(tokens) > oom["above"]:
            torch.empty(2**50, dtype=torch.uint8)
        return real(self, tokens, targets, last=last)

    return micro_step


def burning(real: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def micro_step(*arguments: Any, **options: Any) -> Any:
        until = time.thread_time() + seconds
        while time.thread_time() < until:
            pass
        return real(*arguments, **options)

    return micro_step


if __name__ == "__main__":
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    if FAULTS.get("slow", {}).get("place") == "import":  # before torch is imported, and anything of ours
        Path(f"at_import.{RANK}").touch()
        time.sleep(FAULTS["slow"]["seconds"])
    if FAULTS.get("elsewhere", {}).get("rank") == RANK:
        os.chdir(FAULTS["elsewhere"]["folder"])
    from scalegpt.cli.main import run_and_exit

    install_faults()
    run_and_exit(["train", *sys.argv[1:]])
