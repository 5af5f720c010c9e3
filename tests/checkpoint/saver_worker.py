"""Lets the writer of one rank of several fail, and reports what every rank raises."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from backends.parity_worker import make
from checkpoint.samples import at
from scalegpt.backends import World
from scalegpt.checkpoint import tensorfile, writer
from scalegpt.checkpoint.saver import Keeping, Saver
from scalegpt.config.presets import resolve
from scalegpt.errors import RunError


def failing(path: Path, *_: Any) -> Any:
    path.write_bytes(b"half")
    raise OSError(28, "No space left on device")


def attempt(saver: Saver, world: World, rank: int, how: str) -> str:
    """Save once while the disk of that rank is full."""
    writer.write_tensors = failing if world.rank == rank else tensorfile.write_tensors
    try:
        saver.save(at(1), wait=how == "waiting")
        while how == "loop" and not world.any(saver.failed):  # as the training loop does with every step
            time.sleep(0.01)
        if how == "loop":
            saver.raise_failure()
        else:
            saver.save(at(2))
    except RunError as error:
        return str(error)
    finally:
        writer.write_tensors = tensorfile.write_tensors
    return "no error"


def main(task_path: str, result_path: str) -> None:
    task = json.loads(Path(task_path).read_text())
    world, folder = World.join("cpu"), Path(task["folder"])
    run = resolve(flags={**task["shape"], "backend": "fsdp", "zero_stage": 3})
    backend = make(run, world, 1)
    backend.load_weights(backend.model.initial_weights(1))
    saver = Saver(backend, folder, Keeping(2, False), asynchronous=True)
    results: dict[str, Any] = {}
    for rank in (0, 1):
        for how in ("loop", "next save", "waiting"):
            start = time.monotonic()
            lines = world.gather(attempt(saver, world, rank, how))
            left = world.on_first(lambda: sorted(path.name for path in folder.iterdir()))
            results[f"rank {rank}, {how}"] = (lines, left, time.monotonic() - start)
    saver.save(at(2))
    saver.finish()
    results["after"] = sorted(path.name for path in folder.iterdir())
    if world.is_first:
        Path(result_path).write_text(json.dumps(results))
    world.barrier()
    world.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # without finalization, as `run_and_exit` explains
