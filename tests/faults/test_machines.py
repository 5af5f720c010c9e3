"""Runs on several machines, which are network namespaces of this one: a link is cut, a machine is lost, and comes back."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import namespaces
from faults.jobs import FLAGS, LAYOUTS, MARK, ROOT, Job, assert_same
from namespaces import Machines
from scalegpt.backends.ports import INTERFACE_VARIABLES
from scalegpt.planner.start.launching import NEW_STORE

REASON = namespaces.why_not()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.faults,
    pytest.mark.xdist_group("machines"),
]

BOUND = 120.0
"""Seconds within which the ranks of both sides have ended, and torchrun once the link is back."""


class Spread(Job):
    """A job of one rank on each machine, all started by torchrun; the first machine holds its store."""

    def __init__(self, folder: Path, machines: Machines) -> None:
        super().__init__(folder, "fsdp2")
        self.machines = machines
        self.agents: dict[str, subprocess.Popen[bytes]] = {}

    def start_on(self, name: str, *flags: str, nodes: str = "2", restarts: int = 0, **faults: Any) -> None:
        inherited = {name: value for name, value in os.environ.items() if name not in INTERFACE_VARIABLES}
        environment = {
            **inherited, MARK: self.mark, "FAULTS": json.dumps(faults), "OMP_NUM_THREADS": "1",
            "SCALEGPT_CACHE": str(self.folder / "cache"), **dict([NEW_STORE.split("=")]),
        }  # fmt: skip
        place = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{self.machines.names[0]}:29500"]
        launcher = ["--nnodes", nodes, "--nproc_per_node", "1", "--max-restarts", str(restarts), *place]
        script = [str(ROOT / "tests" / "faults" / "worker.py"), *FLAGS, *LAYOUTS["fsdp2"], *flags]
        command = [sys.executable, "-m", "torch.distributed.run", *launcher, *script]
        with (self.folder / f"output.{name}.txt").open("ab") as output:
            self.agents[name] = subprocess.Popen(
                self.machines.on(name, command), cwd=self.folder, env=environment, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip

    def start_all(self, *flags: str, **options: Any) -> None:
        for name in self.machines.names:
            self.start_on(name, *flags, **options)

    def is_over(self) -> bool:
        return all(agent.poll() is not None for agent in self.agents.values())

    def statuses(self, seconds: float = BOUND) -> list[int]:
        self.wait_until(self.is_over, seconds, "all agents have ended")
        self.wait_until(lambda: not self.processes(), seconds, "no process is left")
        return [agent.returncode for agent in self.agents.values()]

    def end(self) -> None:
        super().end()
        for agent in self.agents.values():
            agent.wait(30)

    def kill_machine(self, name: str) -> None:
        """SIGKILL to all processes of a machine, as when its power fails; their connections are closed."""
        place = Path("/var/run/netns") / f"{name}{self.machines.mark}"
        for process in self.processes():
            if Path(f"/proc/{process.pid}/ns/net").stat().st_ino == place.stat().st_ino:
                process.kill()

    def output(self) -> str:
        return "\n".join(
            f"== {path.name}\n{path.read_text(errors='replace')[-6000:]}"
            for path in sorted(self.folder.glob("output.*"))
        )

    def said_on(self, name: str) -> str:
        return (self.folder / f"output.{name}.txt").read_text(errors="replace")


@pytest.fixture
def spread(tmp_path: Path) -> Iterator[Spread]:
    machines = Machines(2, tmp_path)
    job = Spread(tmp_path, machines)
    yield job
    job.end()
    machines.close()


Undisturbed = Callable[..., Job]


def test_a_cut_link_ends_both_sides_and_the_same_command_resumes(spread: Spread, undisturbed: Undisturbed) -> None:
    limits = ["--step_timeout", "10"]
    spread.start_all(*limits, pace=0.5)
    spread.wait_for_step(7)
    spread.machines.cut("beta")
    spread.wait_until(lambda: not spread.ranks(), BOUND, "the ranks of both machines have ended")
    status = spread.status()
    assert status["state"] == "failed"
    assert "takes more than 10 s" in status["cause"]
    said = spread.said_on("alpha") + spread.said_on("beta")
    quiet = r"(beta \(10\.77\.0\.2|alpha \(10\.77\.0\.1), rank [01]\) does not answer (alpha|beta)"
    assert re.search(quiet, said), said
    spread.machines.mend("beta")  # before that, torchrun on the cut-off machine waits for its store for many minutes
    assert all(status != 0 for status in spread.statuses())
    spread.start_all(*limits)
    assert spread.statuses() == [0, 0], spread.output()
    assert_same(spread, undisturbed("fsdp2"))


def test_a_lost_machine_leaves_the_rest_training_and_may_come_back(spread: Spread, undisturbed: Undisturbed) -> None:
    options: dict[str, Any] = {"nodes": "1:2", "restarts": 3, "pace": 0.5}
    flags = ["--max_iters", "60", "--checkpoint_every", "5", "--dropout", "0"]  # masks depend on the ranks
    spread.start_all(*flags, **options)
    spread.wait_for_step(7)
    spread.kill_machine("beta")
    spread.wait_for_step(20)
    said = spread.said_on("alpha") + spread.said_on("beta")
    assert re.search(r"the connection to beta \(10\.77\.0\.2, rank 1\) broke \(Connection .*10\.77\.0\.2", said), said
    assert "step     512 tokens = 2 ranks × micro batch 4 × accumulation 2 × block 32" in said
    assert "step     512 tokens = 1 rank × micro batch 4 × accumulation 4 × block 32" in said
    spread.start_on("beta", *flags, **options)
    assert spread.statuses()[0] == 0, spread.output()
    said = spread.said_on("alpha") + spread.said_on("beta")
    assert said.count("512 tokens = 2 ranks") == 2, said
    expected, found = undisturbed("fsdp2", *flags).losses(), spread.losses()
    assert found.keys() == expected.keys()
    assert all(abs(found[step] - loss) <= 1e-3 * loss for step, loss in expected.items()), (found, expected)
