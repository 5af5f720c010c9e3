"""Rows 5 to 10 of the fault matrix: signals to launchers and ranks, and launchers that die."""

import json
import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from faults.jobs import FLAGS, ROOT, START_SECONDS, STEPS, TEXT, Job, assert_same

PACE = 0.4
"""Seconds a step, so that a signal finds the run in its middle."""

BOUND = 60.0
"""Seconds within which everything must have ended: a step, a save, and ten times that for a busy machine."""

Start = Callable[..., Job]
Undisturbed = Callable[..., Job]


def assert_stopped(job: Job, cause: str, *, after: int) -> None:
    """Stopped for that cause soon after a step, at the step of its newest checkpoint, which no line is past."""
    status = job.status()
    assert (status["state"], status["cause"]) == ("stopped", cause)
    assert after <= status["step"] <= after + 4 < STEPS
    assert job.checkpoints()[-1] == max(job.losses()) == status["step"]


def assert_goes_on(job: Job, reference: Job) -> None:
    job.finish()
    assert_same(job, reference)


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_row_5_a_signal_to_torchrun(
    start_job: Start, undisturbed: Undisturbed, layout: str, number: signal.Signals
) -> None:
    job = start_job(layout)
    job.start(pace=PACE)
    job.wait_for_step(3)
    job.send(number)
    assert job.wait(BOUND) != 0
    assert_stopped(job, number.name, after=3)
    assert_goes_on(job, undisturbed(layout))


@pytest.mark.faults
def test_row_6_sigterm_to_deepspeed(start_job: Start, undisturbed: Undisturbed, layout: str) -> None:
    job = start_job(layout, "deepspeed")
    job.start(pace=PACE)
    job.wait_for_step(3)
    job.send(signal.SIGTERM)
    job.wait(BOUND)
    assert_stopped(job, "the launcher has gone", after=3)
    assert_goes_on(job, undisturbed(layout))


@pytest.mark.faults
def test_row_7_sigterm_to_one_rank(start_job: Start, undisturbed: Undisturbed, layout: str) -> None:
    job = start_job(layout)
    job.start(pace=PACE)
    job.wait_for_step(3)
    job.rank(1).terminate()
    assert job.wait(BOUND) != 0
    assert_stopped(job, "SIGTERM", after=3)
    assert_goes_on(job, undisturbed(layout))


@pytest.mark.faults
@pytest.mark.parametrize(("place", "after"), [("save", 6), ("evaluate", 6), ("compile", 1)])
def test_row_8_sigterm_is_deferred(
    start_job: Start, undisturbed: Undisturbed, layout: str, place: str, after: int
) -> None:
    job = start_job(layout)
    job.start(slow={"place": place, "seconds": 2.0})
    job.wait_for_place(place)
    job.rank(1).send_signal(signal.SIGUSR1)
    job.wait(BOUND)
    assert job.status()["cause"] == "SIGUSR1"
    assert job.status()["step"] == job.checkpoints()[-1] == after
    assert_goes_on(job, undisturbed(layout))


@pytest.mark.faults
def test_row_8_sigterm_before_the_loop_leaves_nothing(start_job: Start, layout: str) -> None:
    job = start_job(layout)
    job.start(slow={"place": "setup", "seconds": 2.0})
    job.wait_for_place("setup")
    job.rank(1).terminate()
    assert job.wait(BOUND) != 0
    assert [path.name for path in job.run.iterdir() if not path.name.startswith(".")] == []
    assert "stopped before the first step: SIGTERM" in job.output()
    job.finish()


@pytest.mark.faults
def test_row_9_a_second_sigint_leaves_at_once(start_job: Start, undisturbed: Undisturbed, layout: str) -> None:
    job = start_job(layout)
    job.start(slow={"place": "write", "seconds": 600.0, "step": 1})  # the first checkpoint's, half written
    job.wait_for_place("write", rank=0)
    first = job.rank(0)
    first.send_signal(signal.SIGINT)
    time.sleep(1)
    assert first.is_running()
    first.send_signal(signal.SIGINT)
    assert job.wait(BOUND) != 0
    assert job.checkpoints() == []
    assert job.status()["state"] == "stopped"
    assert "a second SIGINT" in job.status()["cause"]
    said = r"scalegpt train: ended at once in step \d+; the same command resumes from the start: no checkpoint was complete"
    assert re.search(said, job.output()), job.output()
    assert_goes_on(job, undisturbed(layout))


KILLED = {
    "torchrun": ("torchrun", lambda job: job.send(signal.SIGKILL)),
    "launch.py": ("deepspeed", lambda job: job.deepspeed_launch().kill()),
    "runner": ("deepspeed", lambda job: job.send(signal.SIGKILL)),
}


@pytest.mark.faults
@pytest.mark.parametrize("victim", KILLED)
def test_row_10_the_launcher_is_killed(start_job: Start, undisturbed: Undisturbed, layout: str, victim: str) -> None:
    launcher, kill = KILLED[victim]
    job = start_job(layout, launcher)
    job.start(pace=PACE)
    job.wait_for_step(3)
    kill(job)
    job.wait(BOUND)
    assert_stopped(job, "the launcher has gone", after=3)
    assert_goes_on(job, undisturbed(layout))


@pytest.mark.faults
@pytest.mark.parametrize("victim", KILLED)
def test_row_10_the_launcher_is_killed_before_the_ranks_have_met(start_job: Start, victim: str) -> None:
    """The layout is not known yet."""
    launcher, kill = KILLED[victim]
    job = start_job("fsdp2", launcher)
    job.start(slow={"place": "join", "seconds": 3.0})
    job.wait_for_place("join")
    kill(job)
    job.wait(BOUND)
    assert not job.run.exists()


LAUNCHER_GONE = 128 + signal.SIGTERM

EARLY = {
    "torchrun SIGKILL": ("torchrun", signal.SIGKILL, "stopped before the first step: the launcher has gone"),
    "deepspeed SIGTERM": ("deepspeed", signal.SIGTERM, f"exits with return code = {LAUNCHER_GONE}"),
    "deepspeed SIGKILL": ("deepspeed", signal.SIGKILL, f"exits with return code = {LAUNCHER_GONE}"),
}
"""Launcher, signal, and what is printed in the end. DeepSpeed's ``launch.py`` outlives its runner: it reports the rank
that leaves first, and ends the other, which may not have come as far as to report anything."""


@pytest.mark.faults
@pytest.mark.parametrize("end", EARLY)
def test_row_10_the_launcher_ends_before_the_ranks_have_imported_torch(start_job: Start, end: str) -> None:
    """What the ranks find above them once they have imported it is no launcher."""
    launcher, number, line = EARLY[end]
    job = start_job("zero2" if launcher == "deepspeed" else "fsdp2", launcher)
    job.start("--max_iters", "100000", "--eval_every", "0", slow={"place": "import", "seconds": 3.0})
    job.wait_for_place("import", rank=0)
    job.wait_for_place("import", rank=1)
    job.send(number)
    assert job.wait(BOUND) == -number
    assert line in job.output()
    assert not job.run.exists()


@pytest.mark.slow
def test_a_closed_terminal_stops_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    """One process, under a terminal of its own: it is sent SIGHUP, and whatever it writes there is an error."""
    (tmp_path / "text.txt").write_text(TEXT)
    environment = {**os.environ, "SCALEGPT_CACHE": str(tmp_path / "cache"), "TERM": "xterm"}
    command = [sys.executable, str(ROOT / "launch" / "train.py"), *FLAGS, "--max_iters", "100000", "--eval_every", "0"]
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execve(command[0], command, environment)
    metrics, until, ended = tmp_path / "runs" / "run" / "metrics.jsonl", time.monotonic() + START_SECONDS, (0, 0)
    try:
        while not (metrics.exists() and len(metrics.read_text().splitlines()) > 3):
            assert time.monotonic() < until
            if select.select([terminal], [], [], 0.1)[0]:
                os.read(terminal, 4096)
    finally:
        os.close(terminal)
    while ended[0] == 0 and time.monotonic() < until:
        ended = os.waitpid(pid, os.WNOHANG)
        time.sleep(0.05)
    if ended[0] == 0:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(ended[1]) == 128 + signal.SIGHUP
    status = json.loads(metrics.with_name("run_status.json").read_text())
    assert (status["state"], status["cause"]) == ("stopped", "SIGHUP")
    assert status["checkpoint_step"] == status["step"] >= 3
