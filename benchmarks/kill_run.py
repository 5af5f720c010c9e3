"""Kills a training run again and again, at random, and checks that it ends with the results of an undisturbed run.

python benchmarks/kill_run.py --kills 20                      (from the repository's root; on the CPU)
python benchmarks/kill_run.py --kills 200 --layout zero2 --folder /tmp/kills --pause_after 50

It trains a tiny model on two ranks under ``torchrun --max-restarts 3``, with a checkpoint every two steps. SIGKILL is
sent to a rank, to the launcher, or to all of them: while they start, during steps, or while a checkpoint is written. If
the launcher does not restart the ranks, the identical command is started again. After the last kill the run finishes.
The losses of its steps and its weights must equal those of an undisturbed run bit for bit. No kill may lose a
checkpoint, and no rank may end unless it is killed.

With --folder everything is kept, and the same command resumes after a pause or an interruption. The moments and victims of
the kills are drawn from the seed and the number of the kill; their exact steps also depend on the machine's speed. The last
line of the output is one JSON object. The exit status is 1 if a check fails.
"""

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.arguments import at_least
from benchmarks.steps.two_ranks import LAYOUTS, PATIENCE, TEXT, Run
from scalegpt.checkpoint.store import step_of
from scalegpt.storage import write_atomic

MOST_STEPS = 8
"""The most steps between a start and the next kill. The run is long enough to outlast all kills."""

STARTING, STEPPING, SAVING = "starting", "in steps", "saving"
MOMENTS = {STARTING: 0.2, STEPPING: 0.4, SAVING: 0.4}
VICTIMS = {"rank 0": 0.3, "rank 1": 0.3, "launcher": 0.2, "all": 0.2}
"""Victim of a kill → its probability; :data:`MOMENTS` has the probabilities of the moments."""


@dataclass
class Tally:
    """The counts and results of all kills so far, kept in ``kills.json``.

    Attributes:
        seed: the seed from which moments and victims are drawn.
        layout: a key of :data:`LAYOUTS`.
        steps: the number of steps of the whole run.
        moments: what the run was doing at the moment of the kill → number of kills.
        victims: what was killed → number of kills.
        starts: how often the command was started.
        restarts: how often the launcher restarted the ranks.
        seconds: seconds that all kills took, with the starts and steps between them.
        newest: the step of the newest checkpoint.
        failures: failed checks, in words.
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
        """The number of kills so far."""
        return sum(self.moments.values())


class Killer:
    """Kills a run repeatedly and keeps the tally.

    Args:
        run: the run.
        tally: the tally of earlier kills, to which new ones are added.
        state: the file in which the tally is kept.
    """

    def __init__(self, run: Run, tally: Tally, state: Path) -> None:
        self.run, self.tally, self.state = run, tally, state
        self.dead: set[int] = set()
        self.stale: set[Path] = set()
        self.seen = 0.0

    def kill_until(self, kills: int) -> None:
        """Kill until the tally has ``kills`` kills or the run is finished; then end all processes of the run."""
        try:
            while self.tally.kills < kills and not self.run.is_finished():
                began = time.monotonic()
                self._kill()
                self.tally.seconds += time.monotonic() - began
                write_atomic(self.state, json.dumps(asdict(self.tally)))
        finally:
            self.run.end()

    def _kill(self) -> None:
        tally, run = self.tally, self.run
        chance = random.Random(f"{tally.seed}:{tally.kills}:{tally.starts}")
        ranks = self._next_ranks()
        self.stale, self.seen = run.unfinished(), time.time()
        self._wait_for_moment(_drawn(MOMENTS, chance), chance)
        if run.is_finished():
            return
        self.dead |= {process.pid for process in ranks.values()}
        if not all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in ranks.values()):
            tally.failures.append(f"after kill {tally.kills} a rank ended by itself; see output.txt")
            return
        victim = _drawn(VICTIMS, chance)
        moment = SAVING if self._saves() else STEPPING if run.has_begun(self.seen) else STARTING
        self._strike(victim, ranks)
        for counts, name in ((tally.moments, moment), (tally.victims, victim)):
            counts[name] = counts.get(name, 0) + 1
        newest = run.newest()
        step = step_of(newest) if newest else 0
        if step < tally.newest:
            tally.failures.append(f"kill {tally.kills}: checkpoint {tally.newest} is lost, {step} is the newest")
        tally.newest = step
        print(f"kill {tally.kills}: {victim}, {moment}, at step {run.last_step()}", flush=True)
        if victim in {"launcher", "all"}:
            wait_until(lambda: not any(run.processes()), "the ranks whose launcher was killed have not ended")

    def _next_ranks(self) -> dict[int, psutil.Process]:
        """Wait until both ranks live again, and return them by rank. If the launcher has ended, start the command."""
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
            wait_until(lambda: time.monotonic() > until or run.has_begun(self.seen) or run.is_over, "a moment", 0.02)
            return
        wait_until(lambda: run.has_begun(self.seen) or run.is_over, "the first step", 0.01)
        goal = run.last_step() + chance.randint(1, MOST_STEPS)
        wait_until(lambda: run.last_step() >= goal or run.is_over, "more steps", 0.002)
        if moment == SAVING:
            wait_until(lambda: self._saves() or run.is_over, "a save", 0.0)
        time.sleep(chance.uniform(0, 0.02))

    def _saves(self) -> bool:
        return self.run.has_begun(self.seen) and bool(self.run.unfinished() - self.stale)

    def _strike(self, victim: str, ranks: dict[int, psutil.Process]) -> None:
        assert self.run.launcher is not None
        for rank, process in ranks.items():
            if victim in {"all", f"rank {rank}"}:
                process.kill()
        if victim in {"launcher", "all"}:
            self.run.launcher.send_signal(signal.SIGKILL)


def _drawn(odds: dict[str, float], chance: random.Random) -> str:
    return chance.choices([*odds], [*odds.values()])[0]


def wait_until(holds: Callable[[], bool], what: str, seconds: float = 0.05) -> None:
    """Wait until ``holds()`` is true.

    Args:
        holds: the condition.
        what: a name for the condition, for the error message.
        seconds: the pause between two checks.

    Raises:
        TimeoutError: the condition is still false after :data:`PATIENCE` seconds.
    """
    until = time.monotonic() + PATIENCE
    while not holds():
        if time.monotonic() > until:
            raise TimeoutError(f"not within {PATIENCE:.0f} s: {what}")
        time.sleep(seconds)


def main() -> int:
    """Kill the run repeatedly, let it finish, and compare it with an undisturbed run; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=at_least(1), default=20, help="number of kills [20]")
    parser.add_argument("--seed", type=int, default=1, help="seed of the moments and victims [1]")
    parser.add_argument(
        "--layout", choices=LAYOUTS, default="fsdp2", help="layout, and the model's shape if it is not GPT-2's [fsdp2]"
    )
    parser.add_argument("--folder", type=Path, help="folder for all files [a temporary folder]")
    parser.add_argument("--pause_after", type=at_least(1), help="pause after N more kills; the same command resumes")
    arguments = parser.parse_args()
    if arguments.folder is not None:
        return kill_in(arguments.folder.absolute(), arguments)
    with tempfile.TemporaryDirectory() as folder:
        return kill_in(Path(folder), arguments)


def kill_in(folder: Path, arguments: argparse.Namespace) -> int:
    """Kill the run until the requested pause. Without a pause, make all kills, and compare the run with an undisturbed one.

    Returns:
        The exit status.
    """
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
    Killer(run, tally, state).kill_until(min(until, arguments.kills))
    if until < arguments.kills and not run.is_finished():
        print(f"paused after {tally.kills} of {arguments.kills} kills; the same command resumes")
        return 0
    undisturbed = Run(folder, arguments.layout, steps, "undisturbed")
    run.finish()
    undisturbed.finish()
    return report(run, undisturbed, tally, arguments.kills)


def report(run: Run, undisturbed: Run, tally: Tally, kills: int) -> int:
    """Compare the killed run with the undisturbed run, print the result as JSON, and return the exit status."""
    if "is damaged" in (run.folder / "output.txt").read_text(errors="replace"):
        tally.failures.append("a checkpoint was found damaged; see output.txt")
    if tally.kills < kills:
        tally.failures.append(f"the run was over after {tally.kills} kills")
    weights, same_losses = run.weights_hash(), run.losses() == undisturbed.losses()
    same_weights = weights == undisturbed.weights_hash()
    result = {**asdict(tally), "kills": tally.kills, "seconds": round(tally.seconds)}
    result |= {"same_losses": same_losses, "same_weights": same_weights, "weights_sha256": weights}
    print(json.dumps(result))
    return 0 if same_losses and same_weights and not tally.failures else 1


if __name__ == "__main__":
    sys.exit(main())
