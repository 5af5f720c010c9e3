"""A tiny training run on two ranks, its processes and its files, for ``kill_run.py``."""

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
from scalegpt.checkpoint.reader import Checkpoint
from scalegpt.checkpoint.store import find_checkpoints

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "launch" / "train.py"
MARK = "KILL_RUN"
"""The environment variable that marks a run's processes."""

LAYOUTS = {
    "zero2": {"backend": "deepspeed", "zero_stage": 2},
    "fsdp2": {"backend": "fsdp", "zero_stage": 2},
}
FLAGS = {
    "tokenizer": "byte", "vocab_size": "auto", "n_layer": 2, "n_embd": 32, "n_head": 2, "block_size": 32, "device": "cpu",
    "seed": 3, "learning_rate": 1e-2, "warmup_steps": 10, "micro_batch": 2, "tokens_per_step": 256, "eval_every": 50,
    "checkpoint_every": 2, "sample_tokens": 0, "eval_tokens": 512, "precision": "fp32", "dropout": 0.1,
    "input_file": "text.txt",
}  # fmt: skip
TEXT = "\n".join(f"{i} green bottles hanging on the wall, and if one should fall, {i - 1} are left" for i in range(400))

PATIENCE = 300.0
"""Seconds after which what is waited for is taken not to come."""


class Run:
    """The training run: its processes and its files."""

    def __init__(self, folder: Path, layout: str, steps: int, name: str) -> None:
        self.folder, self.path, self.mark = folder, folder / "runs" / name, f"{folder}:{name}"
        flags = {**FLAGS, **LAYOUTS[layout], "max_iters": steps, "model_name": name}
        self.command = [*python_words(2), "--max-restarts", "3", str(TRAIN), *flag_words(flags)]
        self.launcher: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the command."""
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
        """All that live, by the mark in their environment, whatever their parent is by now."""
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    yield process

    def ranks(self) -> dict[int, psutil.Process]:
        """The ranks that live, without what they have started."""
        found = {}
        for process in self.processes():
            with suppress(psutil.Error):
                rank = process.environ().get("RANK")
                if rank is not None and str(TRAIN) in process.cmdline():
                    found[int(rank)] = process
        return found

    def end(self) -> None:
        """SIGKILL to all, until none is left."""
        while left := list(self.processes()):
            for process in left:
                with suppress(psutil.Error):
                    process.kill()
            time.sleep(0.05)
        if self.launcher is not None:
            self.launcher.wait()

    def last_step(self) -> int:
        """The last step in ``metrics.jsonl``; 0: none."""
        with suppress(OSError, IndexError, ValueError):
            with (self.path / "metrics.jsonl").open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - 2000))
                lines = file.read().splitlines(keepends=True)
            return int(json.loads([line for line in lines[size > 2000 :] if line.endswith(b"\n")][-1])["step"])
        return 0

    def unfinished(self) -> set[Path]:
        """Checkpoints that are being written, and those whose writer or deleter was killed."""
        return set((self.path / "checkpoints").glob(".step_*.tmp"))

    def has_begun(self, since: float) -> bool:
        """Whether its loop has begun since then, in seconds of the epoch."""
        with suppress(OSError):
            return (self.path / "run_status.json").stat().st_mtime > since
        return False

    def newest(self) -> Path | None:
        """The newest complete checkpoint."""
        return next(reversed(find_checkpoints(self.path / "checkpoints")), None)

    def is_finished(self) -> bool:
        """Whether the run has taken all its steps."""
        with suppress(OSError, ValueError):
            return bool(json.loads((self.path / "run_status.json").read_text())["state"] == "finished")
        return False

    def losses(self) -> list[tuple[int, float]]:
        """Each step with its loss, in the order of ``metrics.jsonl``."""
        lines = [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]
        return [(line["step"], line["loss"]) for line in lines if "loss" in line]

    def weights_hash(self) -> str:
        """SHA-256 over names and values of the newest checkpoint's weights."""
        newest, digest = self.newest(), hashlib.sha256()
        assert newest is not None
        checkpoint = Checkpoint.open(newest)
        checkpoint.verify()
        for name, weight in sorted(checkpoint.weights()):
            digest.update(name.encode() + weight.numpy().tobytes())
        return digest.hexdigest()

    def finish(self) -> None:
        """Run to the end, undisturbed.

        Raises:
            RuntimeError: it fails.
        """
        try:
            while not self.is_finished():
                self.start()
                assert self.launcher is not None
                if self.launcher.wait(20 * PATIENCE):
                    raise RuntimeError(f"the run did not finish; see {self.folder / 'output.txt'}")
        finally:
            self.end()
