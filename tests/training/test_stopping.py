"""Being asked to stop: real signals, marks among ranks, launchers that go."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from scalegpt.backends import World
from scalegpt.training import stopping
from scalegpt.training.stopping import LauncherWatch, Reason, Stopped, StopRequest

ROOT = Path(__file__).resolve().parents[2]
ALONE = World(0, 1, 0, 1, torch.device("cpu"))


def wait_until(holds: Callable[[], Any], seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 128 + signal.SIGUSR1), (signal.SIGHUP, 129)],
)
def test_a_signal_leaves_a_mark_and_stops_nothing(number: signal.Signals, status: int) -> None:
    before = {each: signal.getsignal(each) for each in stopping.SIGNALS}
    stop = StopRequest()
    with stop.listening():
        os.kill(os.getpid(), number)
        wait_until(lambda: stop.reason)
    assert stop.reason is stopping.SIGNALS[number]
    assert stop.reason.exit_status == status
    assert {each: signal.getsignal(each) for each in stopping.SIGNALS} == before


def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    """As ``nohup`` has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopRequest()
        with stop.listening():
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            wait_until(lambda: stop.reason)
        assert stop.reason is Reason.TERM
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_first_request_counts() -> None:
    stop = StopRequest()
    stop.ask(Reason.USR1)
    stop.ask(Reason.TERM)
    assert stop.reason is Reason.USR1


def test_only_a_second_sigint_leaves_at_once() -> None:
    left, said = [], []
    stop = StopRequest(leave=left.append)
    stop.last_words = lambda: said.append(stop.reason)
    with stop.listening():
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
            time.sleep(0.05)
        assert left == []
        os.kill(os.getpid(), signal.SIGINT)
        wait_until(lambda: left)
    assert (left, said) == ([130], [Reason.TERM])


def reported(capfd: pytest.CaptureFixture[str]) -> str:
    """The line that a request writes at once, from a thread."""
    seen: list[str] = []

    def look() -> bool:
        seen.append(capfd.readouterr().err)
        return "".join(seen).endswith("\n")

    wait_until(look)
    return "".join(seen)


def test_a_signal_is_answered_at_once(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    stop = StopRequest(leave=[].append)
    with stop.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        assert reported(capfd) == "scalegpt train: SIGTERM: ending before the first step\n"
        stop.course = lambda: "finishing step 3, then saving"
        os.kill(os.getpid(), signal.SIGINT)
        assert reported(capfd) == (
            "scalegpt train: SIGINT: finishing step 3, then saving; again: leave now, without a checkpoint\n"
        )
        stop.course = lambda: ""
        stop.ask(Reason.TERM)
        wait_until(lambda: not any(thread.name == "report" for thread in threading.enumerate()))
        stop.course = lambda: "finishing step 3, then saving"
        stop.ask(Reason.LAUNCHER)
        assert reported(capfd) == "scalegpt train: the launcher has gone: finishing step 3, then saving\n"


def test_of_several_ranks_the_first_answers(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    stop = StopRequest()
    stop.ask(Reason.TERM)
    stop.ask(Reason.TIME)
    assert not any(thread.name == "report" for thread in threading.enumerate())
    assert capfd.readouterr().err == ""


def test_last_words_that_hang_keep_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "LAST_WORDS_SECONDS", 0.05)
    left: list[int] = []
    stop, hang = StopRequest(leave=left.append), threading.Event()
    stop.last_words = hang.wait
    with stop.listening():
        os.kill(os.getpid(), signal.SIGINT)
        wait_until(lambda: stop.reason)
        os.kill(os.getpid(), signal.SIGINT)
        wait_until(lambda: left)
    hang.set()
    assert left == [130]


def test_a_process_that_hangs_in_c_still_leaves() -> None:
    """Python's own handlers run only when the main thread returns; a thread reads the signals instead."""
    code = (
        "from scalegpt.training.stopping import StopRequest\n"
        "with StopRequest().listening():\n"
        "    import ctypes; c = ctypes.CDLL(None); mutex = ctypes.create_string_buffer(64); c.pthread_mutex_lock(mutex)\n"
        "    print('ready', flush=True); c.pthread_mutex_lock(mutex)  # for ever, and no signal ends that\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)
        assert process.wait(20) == 130
    finally:
        process.kill()
        process.wait()


def test_outside_of_the_main_thread_nothing_is_taken() -> None:
    seen = []

    def run() -> None:
        with StopRequest().listening() as stop:
            seen.append(stop.reason)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [None]


def test_marks_are_agreed_whoever_was_asked() -> None:
    ranks = [StopRequest() for _ in range(4)]

    def agreed(**late: bool) -> Reason | None:
        marks = [torch.tensor(stop.marks(time_is_up=late.get(f"rank{rank}", False))) for rank, stop in enumerate(ranks)]
        return StopRequest.agreed(torch.stack(marks).sum(dim=0).tolist())

    assert agreed() is None
    assert agreed(rank3=True) is Reason.TIME
    ranks[1].ask(Reason.LAUNCHER)
    assert agreed() is Reason.LAUNCHER
    ranks[0].ask(Reason.TERM)
    assert agreed() is Reason.TERM


def test_a_check_raises_what_survives_the_way_to_other_ranks() -> None:
    stop = StopRequest()
    stop.check(ALONE)
    stop.check_alone()
    stop.ask(Reason.TERM)
    for check in (stop.check_alone, lambda: stop.check(ALONE)):
        with pytest.raises(Stopped, match="before the first step: SIGTERM") as raised:
            check()
        copy = pickle.loads(pickle.dumps(raised.value))
        assert (str(copy), copy.exit_status) == (str(raised.value), 143)


# --- launchers -------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "CROSS_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)  # deepspeed"])
    yield process
    process.kill()
    process.wait()


def test_who_was_started_by_hand_watches_nobody(no_launcher: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stopping.launchers() == []
    monkeypatch.setenv("RANK", "0")  # as srun and a user's own shell do
    assert stopping.launchers() == []


def test_torchruns_worker_watches_its_parent(
    no_launcher: None, monkeypatch: pytest.MonkeyPatch, sleeper: subprocess.Popen[bytes]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(os, "getppid", lambda: sleeper.pid)
    (lives,) = stopping.launchers()
    assert lives()
    sleeper.kill()
    wait_until(lambda: psutil.Process(sleeper.pid).status() == psutil.STATUS_ZOMBIE)
    assert not lives()  # nobody has asked for its status yet
    sleeper.wait()
    assert not lives()


def test_an_orphan_of_deepspeed_knows_it_from_the_start(
    no_launcher: None, monkeypatch: pytest.MonkeyPatch, sleeper: subprocess.Popen[bytes]
) -> None:
    monkeypatch.setenv("CROSS_SIZE", "1")
    monkeypatch.setattr(os, "getppid", lambda: sleeper.pid)
    assert all(lives() for lives in stopping.launchers())
    stranger = subprocess.Popen(["sleep", "600"])
    try:
        monkeypatch.setattr(os, "getppid", lambda: stranger.pid)
        assert not all(lives() for lives in stopping.launchers())
    finally:
        stranger.kill()
        stranger.wait()
    assert [lives() for lives in stopping.launchers()] == [False]  # it has gone between two looks


def test_deepspeeds_worker_watches_the_runner_too(no_launcher: None, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()  # deepspeed.launcher.launch'])"
    runner = subprocess.Popen([sys.executable, "-c", f"{code}  # deepspeed"], stdin=subprocess.PIPE)
    try:
        wait_until(lambda: psutil.Process(runner.pid).children())
        (launch,) = psutil.Process(runner.pid).children()
        wait_until(lambda: any("launcher.launch" in word for word in launch.cmdline()))
        monkeypatch.setenv("CROSS_SIZE", "1")
        monkeypatch.setattr(os, "getppid", lambda: launch.pid)
        below, above = stopping.launchers()
        assert (below(), above()) == (True, True)
        runner.kill()
        runner.wait()
        assert not above()
    finally:
        runner.kill()
        assert runner.stdin is not None
        runner.stdin.close()  # which ends the one below


def test_a_dead_launcher_asks_to_stop_and_after_the_grace_ends_the_process(
    no_launcher: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "launchers", lambda: [alive.is_set])
    alive, left, stop = threading.Event(), [], StopRequest()
    alive.set()
    watch = LauncherWatch(stop, leave=left.append, seconds=0.01, grace=0.05, alone=30)
    watch.have_met()
    watch.start()
    time.sleep(0.05)
    assert stop.reason is None
    alive.clear()
    wait_until(lambda: left)
    assert (stop.reason, left) == (Reason.LAUNCHER, [143])


def test_before_the_ranks_have_met_the_grace_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "launchers", lambda: [lambda: False])
    left: list[int] = []
    LauncherWatch(StopRequest(), leave=left.append, seconds=0.01, grace=30, alone=0.05).start()
    wait_until(lambda: left)
    assert left == [143]


def test_who_ends_within_the_grace_is_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "launchers", lambda: [lambda: False])
    left, stop = [], StopRequest()
    watch = LauncherWatch(stop, leave=left.append, seconds=0.01, grace=30, alone=30)
    watch.start()
    wait_until(lambda: stop.reason)
    watch.stop()
    wait_until(lambda: not any(thread.name == "launcher watch" for thread in threading.enumerate()))
    assert left == []
