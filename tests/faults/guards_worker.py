"""Runs ``scalegpt`` commands one after another on a rank, each with the data or hardware going bad as its task says."""

import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from poison import garble, spoil
from scalegpt.backends import World
from scalegpt.cli.main import main as scalegpt
from scalegpt.training import run


@contextlib.contextmanager
def restored() -> Iterator[Any]:
    """A ``setattr`` that is undone at the end."""
    changed: list[tuple[Any, str, Any]] = []

    def put(owner: Any, name: str, value: Any) -> None:
        changed.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    yield put
    for owner, name, value in reversed(changed):
        setattr(owner, name, value)


def perform(task: dict[str, Any]) -> dict[str, Any]:
    """One command; its status and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    for path, offset in task.get("flip", []):
        if int(os.environ["RANK"]) == 0:
            content = bytearray(Path(path).read_bytes())
            content[offset] ^= 1
            Path(path).write_bytes(content)
    if task.get("truncate") and int(os.environ["RANK"]) == 0:
        os.truncate(*task["truncate"])
    torch.distributed.barrier()
    with restored() as put, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        if "spoil" in task:
            spoil(task["spoil"], task["windows"], rank=1, put=put)
        elif "garble" in task:
            garble(task["garble"], put=put)
        status = scalegpt(task["words"])
    return {"status": status, "out": out.getvalue(), "err": err.getvalue()}


def main(task_path: str, result_path: str) -> None:
    task = json.loads(Path(task_path).read_text())
    os.chdir(task["folder"])
    torch.set_num_threads(1)
    world = World.join("cpu")
    # The ranks stay together from one command to the next: nothing here is about joining and leaving.
    run.World = type("Joined", (), {"join": staticmethod(lambda *_: world)})  # type: ignore[misc]
    leave, World.leave = World.leave, lambda _: None  # type: ignore[method-assign]
    results = [perform(each) for each in task["commands"]]
    gathered: list[Any] = [None] * world.size
    torch.distributed.all_gather_object(gathered, results)
    if world.is_first:
        Path(result_path).write_text(json.dumps(gathered))
    world.barrier()
    leave(world)


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # without finalization, as `run_and_exit` explains
