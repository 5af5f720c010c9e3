"""A training job of two ranks as a user starts it: watch it, injure it, and check that nothing of it is left.

Its processes are found by a variable in their environment, which they keep when their parent changes.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from ranks import free_port

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
MARK = "FAULT_JOB"
TEXT = "\n".join(f"{i} green bottles hanging on the wall, and if one should fall, {i - 1} are left" for i in range(400))
LAYOUTS = {
    "zero2": ["--backend", "deepspeed", "--zero_stage", "2"],
    "fsdp2": ["--backend", "fsdp", "--zero_stage", "2"],
}
STEPS = 14
FLAGS = [
    "--tokenizer", "byte", "--vocab_size", "auto", "--n_layer", "2", "--n_embd", "32", "--n_head", "2",
    "--block_size", "32", "--device", "cpu", "--seed", "3", "--learning_rate", "1e-2", "--warmup_steps", "2",
    "--micro_batch", "4", "--tokens_per_step", "512", "--max_iters", str(STEPS), "--eval_every", "5",
    "--checkpoint_every", "5", "--sample_tokens", "0", "--eval_tokens", "512", "--precision", "fp32",
    "--dropout", "0.1", "--log_every", "1", "--input_file", "text.txt", "--model_name", "run",
]  # fmt: skip
LAUNCHERS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node"],
    "deepspeed": [str(BIN / "deepspeed"), "--num_accelerators"],
}
PORTS = {"torchrun": lambda: ["--standalone"], "deepspeed": lambda: ["--master_port", str(free_port())]}
START_SECONDS = 180.0
"""Until the first steps: on a busy machine imports alone take most of a minute."""


class Job:
    """One run in a folder, started as often as need be.

    Args:
        folder: where it runs; ``text.txt`` is put there.
        layout: a key of LAYOUTS.
        launcher: a key of LAUNCHERS.
    """

    def __init__(self, folder: Path, layout: str, launcher: str = "torchrun") -> None:
        self.folder, self.layout, self.launcher = folder, layout, launcher
        self.run = folder / "runs" / "run"
        self.saved: Any = self.run / "checkpoints"  # a test may keep them at an address
        self.mark = uuid.uuid4().hex
        self.process: subprocess.Popen[bytes] | None = None
        (folder / "text.txt").write_text(TEXT, encoding="utf-8")

    # --- start and end -----------------------------------------------------------------------------------------------

    def start(
        self,
        *flags: str,
        restarts: int = 0,
        ranks: int = 2,
        layout: str | None = None,
        bare: bool = False,
        **faults: Any,
    ) -> None:
        """Start the command, with faults as ``worker.py`` knows them.

        Args:
            flags: more of them; what is given twice counts as given last.
            restarts: how often torchrun starts the ranks again.
            ranks: how many.
            layout: another than the job's.
            bare: leave the port to the launcher.
        """
        environment = {
            **os.environ, MARK: self.mark, "FAULTS": json.dumps(faults), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
            "SCALEGPT_CACHE": str(self.folder / "cache"),
        }  # fmt: skip
        port = [] if bare else PORTS[self.launcher]()
        again = ["--max-restarts", str(restarts)] if restarts else []
        launcher = [*LAUNCHERS[self.launcher], str(ranks), *port, *again]
        settings = [*FLAGS, *LAYOUTS[layout or self.layout], *flags]
        command = [*launcher, str(ROOT / "tests" / "faults" / "worker.py"), *settings]
        with (self.folder / "output.txt").open("ab") as output:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=output, stderr=output, start_new_session=True
            )

    def finish(self, *flags: str, **options: Any) -> None:
        """Run the same command, undisturbed, to its end."""
        self.start(*flags, **options)
        assert self.wait() == 0, self.output()
        assert self.status()["state"] == "finished"

    def copy_to(self, folder: Path) -> "Job":
        """The same run in another folder, as if it had been left there."""
        copy = Job(folder, self.layout, self.launcher)
        shutil.copytree(self.run, copy.run)
        return copy

    def wait(self, seconds: float = START_SECONDS) -> int:
        """The launcher's exit status, once no process of the job is left."""
        assert self.process is not None
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the launcher still runs after {seconds} s\n{self.output()}") from None
        self.wait_until(lambda: not self.processes(), seconds, "no process is left")
        return status

    def kill(self) -> None:
        """SIGKILL to all of its processes at once, as when the machine fails."""
        self.end()
        self.wait_until(lambda: not self.processes(), 30, "all are dead")

    def end(self) -> None:
        """Kill what is left of the job, process by process."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if self.process is not None:
            self.process.wait(30)

    # --- processes ---------------------------------------------------------------------------------------------------

    def processes(self) -> list[psutil.Process]:
        """The living processes of the job, orphans too."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def rank(self, rank: int) -> psutil.Process:
        """The process of a rank."""
        found = self.ranks()
        assert str(rank) in found, f"no process of rank {rank}\n{self.output()}"
        return found[str(rank)]

    def ranks(self) -> dict[str, psutil.Process]:
        """The processes of all ranks that there are now, by ``RANK``."""
        found = {}
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                rank = process.environ().get("RANK")
                if rank is not None and any("worker.py" in word for word in process.cmdline()):
                    found[rank] = process
        return found

    def deepspeed_launch(self) -> psutil.Process:
        """DeepSpeed's ``launch.py``, between its runner and the ranks."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if "deepspeed.launcher.launch" in process.cmdline():
                    return process
        raise AssertionError(f"no launch.py\n{self.output()}")

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the launcher."""
        assert self.process is not None
        self.process.send_signal(number)

    # --- waiting -----------------------------------------------------------------------------------------------------

    def wait_until(self, holds: Callable[[], bool], seconds: float, what: str) -> None:
        until = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < until, f"not within {seconds} s: {what}\n{self.output()}"
            time.sleep(0.05)

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: max(self.losses(), default=0) >= step or self.is_over(), START_SECONDS, f"step {step}")
        assert not self.is_over(), self.output()

    def wait_for_place(self, place: str, rank: int = 1) -> None:
        """Until a rank is at a place that a fault has slowed down."""
        there = self.folder / f"at_{place}.{rank}"
        self.wait_until(lambda: there.exists() or self.is_over(), START_SECONDS, place)
        assert not self.is_over(), self.output()

    def is_over(self) -> bool:
        return self.process is None or self.process.poll() is not None

    # --- what it leaves ----------------------------------------------------------------------------------------------

    def output(self) -> str:
        return (self.folder / "output.txt").read_text(encoding="utf-8", errors="replace")[-8000:]

    def status(self) -> Any:
        return json.loads((self.run / "run_status.json").read_text())

    def config(self) -> str:
        return (self.run / "config.yaml").read_text()

    def lines(self, key: str) -> dict[int, float]:
        """Step → value of the lines of ``metrics.jsonl`` that have it."""
        try:
            lines = (self.run / "metrics.jsonl").read_text().splitlines(keepends=True)
        except FileNotFoundError:
            return {}
        entries = [json.loads(line) for line in lines if line.endswith("\n")]
        steps = [entry["step"] for entry in entries if key in entry]
        assert len(steps) == len(set(steps)), f"a step twice: {steps}"
        return {entry["step"]: entry[key] for entry in entries if key in entry}

    def leftovers(self) -> list[Path]:
        """What interrupted saves and deletions have left."""
        return sorted((self.run / "checkpoints").glob(".step_*.tmp"))

    def losses(self) -> dict[int, float]:
        return self.lines("loss")

    def checkpoints(self) -> list[int]:
        """The steps of the complete checkpoints."""
        from scalegpt.checkpoint.store import find_checkpoints

        return [int(path.name.removeprefix("step_")) for path in find_checkpoints(self.saved)]

    def checkpoint(self, step: int) -> Any:
        return self.saved / f"step_{step:08d}"

    def weights_hash(self) -> str:
        """SHA-256 over names and values of the newest checkpoint's weights."""
        from scalegpt.checkpoint.reader import Checkpoint

        digest, checkpoint = hashlib.sha256(), Checkpoint.open(self.checkpoint(self.checkpoints()[-1]))
        checkpoint.verify()
        for name, weight in sorted(checkpoint.weights()):
            digest.update(name.encode())
            digest.update(weight.numpy().tobytes())
        return digest.hexdigest()


def assert_same(job: Job, reference: Job) -> None:
    """Losses of every step and evaluation, each once, and the weights, to the last bit."""
    assert job.losses() == reference.losses()
    assert job.lines("val_loss") == reference.lines("val_loss")
    assert job.weights_hash() == reference.weights_hash()
