"""Kills one training run again and again, at random, and sees that it ends as if nothing had happened.

PYTHONPATH=$PWD python benchmarks/kill_run.py --kills 20                      (from the repository's root; on the CPU)
PYTHONPATH=$PWD python benchmarks/kill_run.py --kills 200 --layout zero2 --folder /tmp/kills --pause_after 50

A tiny model on two ranks under ``torchrun --max-restarts 3``, with a checkpoint every two steps. SIGKILL goes to a rank, to
the launcher, or to all of them: while they start, in steps, or while a checkpoint is written. What a launcher does not start
again is started with the identical command. After the last kill the run goes on to its end. Its losses, each step once, and
its weights must be those of the run that nobody disturbed, to the last bit; no kill may take a checkpoint away, and no rank
may end that was not killed.

With --folder everything is kept: the same command then goes on where an earlier one was paused or ended. The moments follow
from the seed and the number of the kill, as far as a machine's times do. The last line is one JSON object; exit status 1
where something was lost.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from scalegpt.checkpoint.reader import Checkpoint
from scalegpt.checkpoint.store import find_checkpoints, step_of
from scalegpt.training.runs.files import write_whole

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "launch" / "train.py"
MARK = "KILL_RUN"
LAYOUTS = {
    "zero2": ["--backend", "deepspeed", "--zero_stage", "2"],
    "fsdp2": ["--backend", "fsdp", "--zero_stage", "2"],
}
FLAGS = [
    "--tokenizer", "byte", "--vocab_size", "auto", "--n_layer", "2", "--n_embd", "32", "--n_head", "2",
    "--block_size", "32", "--device", "cpu", "--seed", "3", "--learning_rate", "1e-2", "--warmup_steps", "10",
    "--micro_batch", "2", "--tokens_per_step", "256", "--eval_every", "50", "--checkpoint_every", "2",
    "--sample_tokens", "0", "--eval_tokens", "512", "--precision", "fp32", "--dropout", "0.1", "--input_file", "text.txt",
]  # fmt: skip
TEXT = "\n".join(f"{i} green bottles hanging on the wall, and if one should fall, {i - 1} are left" for i in range(400))

MOST_STEPS = 8
"""So many steps a start may take at most before the next kill, so that the run is not over before the last."""

STARTING, STEPPING, SAVING = "starting", "in steps", "saving"
MOMENTS = {STARTING: 0.2, STEPPING: 0.4, SAVING: 0.4}
VICTIMS = {"rank 0": 0.3, "rank 1": 0.3, "launcher": 0.2, "all": 0.2}

PATIENCE = 300.0
"""Seconds until anything that is waited for is taken not to come."""


@dataclass
class Tally:
    """What has been done, kept from one piece to the next.

    Attributes:
        moments: where the run was when it was killed → how often.
        victims: who was killed → how often.
        starts: of the command.
        restarts: by the launcher.
        seconds: in all.
        newest: the step of the newest checkpoint.
        failures: what must not have been.
    """

    seed: int
    layout: str
    steps: int
    moments: dict[str, int] = field(default_factory=dict)
    victims: dict[str, int] = field(default_factory=dict)
    starts: int = 0
    restarts: int = 0
    seconds: float = 0.0
    newest: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        """In all."""
        return sum(self.moments.values())

    def count(self, moment: str, victim: str) -> None:
        """One more."""
        self.moments[moment] = self.moments.get(moment, 0) + 1
        self.victims[victim] = self.victims.get(victim, 0) + 1


class Run:
    """The training run: its processes and its files."""

    def __init__(self, folder: Path, layout: str, steps: int, name: str) -> None:
        self.folder, self.path = folder, folder / "runs" / name
        self.command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", "3",
            str(TRAIN), *FLAGS, *LAYOUTS[layout], "--max_iters", str(steps), "--model_name", name,
        ]  # fmt: skip
        self.mark = f"{folder}:{name}"
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

    def processes(self) -> list[psutil.Process]:
        """All that live, by the mark in their environment, whoever their parent is by now."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

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
        while left := self.processes():
            for process in left:
                with suppress(psutil.Error):
                    process.kill()
            time.sleep(0.05)
        if self.launcher is not None:
            self.launcher.wait()

    def wait_for_orphans(self) -> None:
        """Until the ranks have ended whose launcher has gone, by themselves."""
        wait_until(lambda: not self.processes(), "the end of all processes")

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
        """The checkpoints on their way, and those that were when a writer or a deleter was killed."""
        return set((self.path / "checkpoints").glob(".step_*.tmp"))

    def has_begun(self, since: float) -> bool:
        """Whether its loop has begun since then, in seconds of the epoch."""
        with suppress(OSError):
            return (self.path / "run_status.json").stat().st_mtime > since
        return False

    def newest(self) -> int:
        """The step of the newest complete checkpoint; 0: none."""
        found = find_checkpoints(self.path / "checkpoints")
        return step_of(found[-1]) if found else 0

    def is_finished(self) -> bool:
        """Whether the run has taken all its steps."""
        with suppress(OSError, ValueError):
            return bool(json.loads((self.path / "run_status.json").read_text())["state"] == "finished")
        return False

    def losses(self) -> list[tuple[int, float]]:
        """Each step with its loss, in the order in which they stand in ``metrics.jsonl``."""
        lines = [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]
        return [(line["step"], line["loss"]) for line in lines if "loss" in line]

    def weights_hash(self) -> str:
        """SHA-256 over names and values of the newest checkpoint's weights."""
        digest, checkpoint = hashlib.sha256(), Checkpoint.open(find_checkpoints(self.path / "checkpoints")[-1])
        checkpoint.verify()
        for name, weight in sorted(checkpoint.weights()):
            digest.update(name.encode() + weight.numpy().tobytes())
        return digest.hexdigest()

    def finish(self) -> None:
        """Run to the end, undisturbed.

        Raises:
            RuntimeError: it does not come there.
        """
        try:
            while not self.is_finished():
                self.start()
                assert self.launcher is not None
                if self.launcher.wait(20 * PATIENCE):
                    raise RuntimeError(f"the run did not finish; see {self.folder / 'output.txt'}")
        finally:
            self.end()


class Killer:
    """Kills a run so many times.

    Args:
        run: the run.
        tally: what was done before, and what is done now.
        save: keeps the tally.
    """

    def __init__(self, run: Run, tally: Tally, save: Callable[[Tally], None]) -> None:
        self.run, self.tally, self.save = run, tally, save
        self.dead: set[int] = set()
        self.stale: set[Path] = set()
        self.seen = 0.0

    def kill_until(self, kills: int) -> None:
        """Kill until there were so many kills, and leave nothing running."""
        try:
            while self.tally.kills < kills and not self.run.is_finished():
                began = time.monotonic()
                self._kill()
                self.tally.seconds += time.monotonic() - began
                self.save(self.tally)
        finally:
            self.run.end()

    def _kill(self) -> None:
        chance = random.Random(f"{self.tally.seed}:{self.tally.kills}:{self.tally.starts}")
        ranks = self._next_ranks()
        self.stale = self.run.unfinished()
        self.seen = time.time()
        self._wait_for_moment(chance.choices([*MOMENTS], [*MOMENTS.values()])[0], chance)
        if self.run.is_finished():
            return
        if not all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in ranks.values()):
            self.tally.failures.append(f"after kill {self.tally.kills} a rank ended by itself; see output.txt")
            self.dead |= {process.pid for process in ranks.values()}
            return
        victim = chance.choices([*VICTIMS], [*VICTIMS.values()])[0]
        moment = SAVING if self._saves() else STEPPING if self._has_begun() else STARTING
        self._strike(victim, ranks)
        self.tally.count(moment, victim)
        self.dead |= {process.pid for process in ranks.values()}
        self._see_that_nothing_is_lost()
        print(f"kill {self.tally.kills}: {victim}, {moment}, at step {self.run.last_step()}", flush=True)
        if victim in {"launcher", "all"}:
            self.run.wait_for_orphans()

    def _next_ranks(self) -> dict[int, psutil.Process]:
        """The ranks of the next start; the command is started where the launcher has ended."""
        ranks: dict[int, psutil.Process] = {}

        def are_there() -> bool:
            if self.run.is_over:
                self.run.end()
                self.run.start()
                self.tally.starts += 1
                self.dead.clear()
            ranks.clear()
            living = self.run.ranks().items()
            ranks.update({rank: process for rank, process in living if process.pid not in self.dead})
            return len(ranks) == 2

        starts = self.tally.starts
        wait_until(are_there, "two ranks", 0.1)
        self.tally.restarts += starts == self.tally.starts and bool(self.dead)
        return ranks

    def _wait_for_moment(self, moment: str, chance: random.Random) -> None:
        run = self.run
        if moment == STARTING:
            until = time.monotonic() + chance.uniform(0, 10)
            wait_until(lambda: time.monotonic() > until or self._has_begun() or run.is_over, "a moment", 0.02)
            return
        wait_until(lambda: self._has_begun() or run.is_over, "the first step", 0.01)
        goal = run.last_step() + chance.randint(1, MOST_STEPS)
        wait_until(lambda: run.last_step() >= goal or run.is_over, "more steps", 0.002)
        if moment == SAVING:
            wait_until(lambda: self._saves() or run.is_over, "a save", 0.0)
        time.sleep(chance.uniform(0, 0.02))

    def _has_begun(self) -> bool:
        return self.run.has_begun(self.seen)

    def _saves(self) -> bool:
        return self._has_begun() and bool(self.run.unfinished() - self.stale)

    def _strike(self, victim: str, ranks: dict[int, psutil.Process]) -> None:
        assert self.run.launcher is not None
        struck = list(ranks.values()) if victim == "all" else []
        if victim.startswith("rank "):
            struck = [ranks[int(victim.removeprefix("rank "))]]
        for process in struck:
            process.kill()
        if victim in {"launcher", "all"}:
            self.run.launcher.send_signal(signal.SIGKILL)

    def _see_that_nothing_is_lost(self) -> None:
        newest = self.run.newest()
        if newest < self.tally.newest:
            self.tally.failures.append(f"kill {self.tally.kills}: of checkpoint {self.tally.newest} {newest} is left")
        self.tally.newest = newest


def wait_until(holds: Callable[[], bool], what: str, seconds: float = 0.05) -> None:
    """Look every so many seconds.

    Raises:
        TimeoutError: it does not come.
    """
    until = time.monotonic() + PATIENCE
    while not holds():
        if time.monotonic() > until:
            raise TimeoutError(f"not within {PATIENCE:.0f} s: {what}")
        time.sleep(seconds)


def main() -> int:
    """Kill, finish, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="in all [20]")
    parser.add_argument("--seed", type=int, default=1, help="of the moments and victims [1]")
    parser.add_argument("--layout", choices=LAYOUTS, default="fsdp2", help="[fsdp2]")
    parser.add_argument("--folder", type=Path, help="where everything is kept [a temporary folder]")
    parser.add_argument("--pause_after", type=int, help="leave after so many more kills; the same command goes on")
    arguments = parser.parse_args()
    if arguments.folder is not None:
        return kill_in(arguments.folder.absolute(), arguments)
    with tempfile.TemporaryDirectory() as folder:
        return kill_in(Path(folder), arguments)


def kill_in(folder: Path, arguments: argparse.Namespace) -> int:
    """One piece of the kills, and after the last the comparison."""
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / "kills.json"
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    steps = (MOST_STEPS + 4) * arguments.kills
    tally = Tally(arguments.seed, arguments.layout, steps)
    if state.exists():
        tally = Tally(**json.loads(state.read_text()))
        if (tally.seed, tally.layout, tally.steps) != (arguments.seed, arguments.layout, steps):
            raise SystemExit(f"{folder} holds other kills: seed {tally.seed}, {tally.layout}, {tally.steps} steps")
    run = Run(folder, arguments.layout, steps, "killed")
    until = arguments.kills if arguments.pause_after is None else tally.kills + arguments.pause_after
    Killer(run, tally, lambda now: write_whole(state, json.dumps(asdict(now)))).kill_until(min(until, arguments.kills))
    if until < arguments.kills and not run.is_finished():
        print(f"paused after {tally.kills} of {arguments.kills} kills; the same command goes on")
        return 0
    undisturbed = Run(folder, arguments.layout, steps, "undisturbed")
    run.finish()
    undisturbed.finish()
    return report(run, undisturbed, tally, arguments.kills)


def report(run: Run, undisturbed: Run, tally: Tally, kills: int) -> int:
    """Compare, and print the last line."""
    result: dict[str, Any] = {
        **asdict(tally),
        "kills": tally.kills,
        "seconds": round(tally.seconds),
        "same_losses": run.losses() == undisturbed.losses(),
        "same_weights": run.weights_hash() == undisturbed.weights_hash(),
        "weights_sha256": run.weights_hash(),
    }
    if "is damaged" in (run.folder / "output.txt").read_text(errors="replace"):
        result["failures"] = [*tally.failures, "a checkpoint was found damaged; see output.txt"]
    if tally.kills < kills:
        result["failures"] = [*result["failures"], f"the run was over after {tally.kills} kills"]
    print(json.dumps(result))
    return 0 if result["same_losses"] and result["same_weights"] and not result["failures"] else 1


if __name__ == "__main__":
    sys.exit(main())
