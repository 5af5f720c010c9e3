"""Runs a worker script on several ranks of this machine, as a launcher would, and collects what rank 0 reports."""

import json
import multiprocessing
import os
import runpy
import socket
import sys
import time
import traceback
from functools import cache
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
SHARED = {
    "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "DS_ACCELERATOR": "cpu",
}  # fmt: skip
"""What all ranks have in their environment."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_environment(rank: int, size: int, port: int) -> dict[str, str]:
    own = {
        "RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip
    return {**os.environ, **SHARED, **{key: str(value) for key, value in own.items()}}


@cache
def forks() -> ForkServerContext:
    """Makes processes that have imported ``preloaded`` already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    with mock.patch.dict(os.environ, SHARED):
        from multiprocessing.forkserver import ensure_running

        ensure_running()
    return context


def run_ranks(worker: Path, size: int, task: Any, folder: Path, timeout: float = 900) -> Any:
    """Run ``worker TASK.json RESULT.json`` on every rank; return what rank 0 wrote to the result file."""
    (folder / "task.json").write_text(json.dumps(task))
    result, port = folder / "result.json", free_port()
    words = [str(worker), str(folder / "task.json"), str(result)]
    outputs = [folder / f"rank_{rank}.txt" for rank in range(size)]
    processes = [
        forks().Process(target=_run_worker, args=(words, rank_environment(rank, size, port), output))
        for rank, output in enumerate(outputs)
    ]
    for process in processes:
        process.start()
    try:
        end = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
    for rank, process in enumerate(processes):
        process.join()
        assert process.exitcode == 0, f"rank {rank} ended with {process.exitcode}:\n{outputs[rank].read_text()[-4000:]}"
    return json.loads(result.read_text())


def join_cpu() -> Any:
    """Join as a rank on the CPU, though a test may have more ranks than this machine has cores."""
    from scalegpt.backends import World, world

    world.usable_cores = lambda: 64  # type: ignore[attr-defined]
    return World.join("cpu")


def _run_worker(words: list[str], environment: dict[str, str], output: Path) -> None:
    """Become a rank: the script as it would run by itself, with its output in a file."""
    with output.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).parent))
    try:
        runpy.run_path(words[0], run_name="__main__")
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
