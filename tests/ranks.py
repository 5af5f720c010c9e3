"""Starts a worker script on several ranks of this machine, as a launcher would, and collects what rank 0 reports."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_environment(rank: int, size: int, port: int) -> dict[str, str]:
    own = {
        "RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    return {**os.environ, **{key: str(value) for key, value in own.items()}}


def run_ranks(worker: Path, size: int, task: Any, folder: Path, timeout: float = 300) -> Any:
    """Run ``worker TASK.json RESULT.json`` on every rank; return what rank 0 wrote to the result file."""
    (folder / "task.json").write_text(json.dumps(task))
    result = folder / "result.json"
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), str(folder / "task.json"), str(result)],
            env=rank_environment(rank, size, port), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(size)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, process in enumerate(processes):
        assert process.returncode == 0, f"rank {rank} ended with {process.returncode}:\n{outputs[rank][-4000:]}"
    return json.loads(result.read_text())
