"""A tiny training run on two ranks for ``benchmarks/kill_run.py``: starts it, finds its processes, and reads its files."""

import hashlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from benchmarks.arguments import flag_words, python_words
from scalegpt.checkpoint.address import Place
from scalegpt.checkpoint.reader import Checkpoint
from scalegpt.checkpoint.store import find_checkpoints

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "launch" / "train.py"
MARK = "KILL_RUN"
"""The environment variable that marks a run's processes."""

MODERN = {
    "position": "rope", "norm": "rmsnorm", "activation": "swiglu", "n_kv_head": 1, "qk_norm": True, "bias": "qkv",
    "tie_head": False,
}  # fmt: skip
LAYOUTS = {
    "zero2": {"backend": "deepspeed", "zero_stage": 2},
    "fsdp2": {"backend": "fsdp", "zero_stage": 2},
    "zero2-modern": {"backend": "deepspeed", "zero_stage": 2, **MODERN},
    "fsdp2-modern": {"backend": "fsdp", "zero_stage": 2, **MODERN},
}
"""Name → the settings of a layout, with GPT-2's shape or a modern shape."""
FLAGS = {
    "tokenizer": "byte", "vocab_size": "auto", "n_layer": 2, "n_embd": 32, "n_head": 2, "block_size": 32, "device": "cpu",
    "seed": 3, "learning_rate": 1e-2, "warmup_steps": 10, "micro_batch": 2, "tokens_per_step": 256, "eval_every": 50,
    "checkpoint_every": 2, "sample_tokens": 0, "eval_tokens": 512, "precision": "fp32", "dropout": 0.1,
    "input_file": "text.txt",
}  # fmt: skip
TEXT = "\n".join(f"{i} green bottles hanging on the wall, and if one should fall, {i - 1} are left" for i in range(400))

PATIENCE = 300.0
"""Waiting for more than this many seconds is an error."""


class Run:
    """A training run: its command, its processes and its files.

    Args:
        folder: the folder of the text, the output and the runs.
        layout: a key of :data:`LAYOUTS`.
        steps: the number of steps of the run.
        name: the run's name.
    """

    def __init__(self, folder: Path, layout: str, steps: int, name: str) -> None:
        self.folder, self.path, self.mark = folder, folder / "runs" / name, f"{folder}:{name}"
        flags = {**FLAGS, **LAYOUTS[layout], "max_iters": steps, "model_name": name}
        self.command = [*python_words(2), "--max-restarts", "3", str(TRAIN), *flag_words(flags)]
        self.launcher: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the command of the run."""
        environment = {
            **os.environ, MARK: self.mark, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
            "SCALEGPT_CACHE": str(self.folder / "cache"),
        }  # fmt: skip
        with (self.folder / "output.txt").open("ab") as output:
            self.launcher = subprocess.Popen(
                self.command, cwd=self.folder, env=environment, stdout=output, stderr=output, start_new_session=True
            )

    @property
    def is_over(self) -> bool:
        """Whether the launcher has ended."""
        return self.launcher is None or self.launcher.poll() is not None

    def processes(self) -> Iterator[psutil.Process]:
        """All living processes of the run, found by the mark in their environment, even if their parent has ended."""
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    yield process

    def ranks(self) -> dict[int, psutil.Process]:
        """Rank → its living process, without the processes that ranks have started."""
        found = {}
        for process in self.processes():
            with suppress(psutil.Error):
                rank = process.environ().get("RANK")
                if rank is not None and str(TRAIN) in process.cmdline():
                    found[int(rank)] = process
        return found

    def end(self) -> None:
        """Send SIGKILL to all processes of the run until none is left."""
        while left := list(self.processes()):
            for process in left:
                with suppress(psutil.Error):
                    process.kill()
            time.sleep(0.05)
        if self.launcher is not None:
            self.launcher.wait()

    def last_step(self) -> int:
        """The last step in ``metrics.jsonl``; 0 if it has none."""
        with suppress(OSError, IndexError, ValueError):
            with (self.path / "metrics.jsonl").open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - 2000))
                lines = file.read().splitlines(keepends=True)
            return int(json.loads([line for line in lines[size > 2000 :] if line.endswith(b"\n")][-1])["step"])
        return 0

    def unfinished(self) -> set[Path]:
        """Folders of incomplete checkpoints: being written now, or left by a kill during writing or deletion."""
        return set((self.path / "checkpoints").glob(".step_*.tmp"))

    def has_begun(self, since: float) -> bool:
        """Whether the training loop has begun after ``since``, in seconds since the epoch."""
        with suppress(OSError):
            return (self.path / "run_status.json").stat().st_mtime > since
        return False

    def newest(self) -> Place | None:
        """The newest complete checkpoint; None if there is none."""
        return next(reversed(find_checkpoints(self.path / "checkpoints")), None)

    def is_finished(self) -> bool:
        """Whether the run has taken all its steps."""
        with suppress(OSError, ValueError):
            return bool(json.loads((self.path / "run_status.json").read_text())["state"] == "finished")
        return False

    def losses(self) -> list[tuple[int, float]]:
        """(step, loss) of each step, in the order of ``metrics.jsonl``."""
        lines = [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]
        return [(line["step"], line["loss"]) for line in lines if "loss" in line]

    def weights_hash(self) -> str:
        """SHA-256 over the names and values of the weights in the newest checkpoint."""
        newest, digest = self.newest(), hashlib.sha256()
        assert newest is not None
        checkpoint = Checkpoint.open(newest)
        checkpoint.verify()
        for name, weight in sorted(checkpoint.weights()):
            digest.update(name.encode() + weight.numpy().tobytes())
        return digest.hexdigest()

    def finish(self) -> None:
        """Let the run finish, without killing it.

        Raises:
            RuntimeError: the run fails.
        """
        try:
            while not self.is_finished():
                self.start()
                assert self.launcher is not None
                if self.launcher.wait(20 * PATIENCE):
                    raise RuntimeError(f"the run did not finish; see {self.folder / 'output.txt'}")
        finally:
            self.end()
