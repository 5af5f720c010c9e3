"""Being asked to stop: real signals, agreement among ranks, launchers that go."""

import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scalegpt.backends import World
from scalegpt.training.resilience import stopping
from scalegpt.training.resilience.stopping import LauncherWatch, Reason, Stopped, StopRequest

ROOT = Path(__file__).resolve().parents[2]
ALONE = World(0, 1, 0, 1, torch.device("cpu"))


def be_rank(monkeypatch: pytest.MonkeyPatch, rank: int | None, size: int = 2) -> None:
    """Set a launcher's variables for one of its ranks; None: for a process without ranks."""
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", size), ("LOCAL_WORLD_SIZE", size)):
        if rank is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, str(value))


def wait_until(holds: Callable[[], Any], seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 128 + signal.SIGUSR1), (signal.SIGHUP, 129)],
)
def test_a_signal_is_recorded_and_stops_nothing(number: signal.Signals, status: int) -> None:
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
    stop.before_leaving = lambda: said.append(stop.reason)
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
    be_rank(monkeypatch, None)
    stop = StopRequest(leave=[].append)
    with stop.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        assert reported(capfd) == "scalegpt train: SIGTERM: ending before the first step\n"
        stop.what_next = lambda: "finishing step 3, then saving"
        os.kill(os.getpid(), signal.SIGINT)
        assert reported(capfd) == (
            "scalegpt train: SIGINT: finishing step 3, then saving; a second SIGINT ends the run now, without a checkpoint\n"
        )
        stop.what_next = lambda: ""
        stop.ask(Reason.TERM)
        wait_until(lambda: not any(thread.name == "report" for thread in threading.enumerate()))
        stop.what_next = lambda: "finishing step 3, then saving"
        stop.ask(Reason.LAUNCHER)
        assert reported(capfd) == "scalegpt train: the launcher has gone: finishing step 3, then saving\n"


def test_of_several_ranks_the_first_answers(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    be_rank(monkeypatch, 1)
    stop = StopRequest()
    stop.ask(Reason.TERM)
    stop.ask(Reason.TIME)
    assert not any(thread.name == "report" for thread in threading.enumerate())
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("stray", ["RANK", "LOCAL_RANK"])
def test_half_set_variables_silence_nobody(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, stray: str
) -> None:
    be_rank(monkeypatch, None)
    monkeypatch.setenv(stray, "1")
    StopRequest().ask(Reason.TERM)
    assert reported(capfd) == "scalegpt train: SIGTERM: ending before the first step\n"
    stop = StopRequest(leave=[].append)
    with stop.alone():
        stop.ask(Reason.TERM)
    assert "stopped before the first step: SIGTERM" in capfd.readouterr().out


def test_last_words_that_hang_keep_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "LEAVE_SECONDS", 0.05)
    left: list[int] = []
    stop, hang = StopRequest(leave=left.append), threading.Event()
    stop.before_leaving = hang.wait
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
        "from scalegpt.training.resilience.stopping import StopRequest\n"
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


def test_requests_are_agreed_whoever_was_asked() -> None:
    ranks = [StopRequest() for _ in range(4)]

    def agreed() -> Reason | None:
        counts = [torch.tensor(Reason.counts(stop.reason)) for stop in ranks]
        return Reason.first(torch.stack(counts).sum(dim=0).tolist())

    assert agreed() is None
    ranks[3].ask(Reason.TIME)
    assert agreed() is Reason.TIME
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


# --- before the ranks have met ---------------------------------------------------------------------------------------


def test_alone_a_request_leaves_at_once_and_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    for number, reason in stopping.SIGNALS.items():
        left: list[int] = []
        stop = StopRequest(leave=left.append)
        with stop.listening(), stop.alone():
            os.kill(os.getpid(), number)
            wait_until(lambda: left)  # noqa: B023 - waited for in the loop
        assert left == [reason.exit_status]
        assert capfd.readouterr().out == (
            f"stopped before the first step: {number.name}; nothing was changed, the same command starts again\n"
        )


def test_a_request_from_before_is_not_forgotten() -> None:
    left: list[int] = []
    stop = StopRequest(leave=left.append)
    stop.ask(Reason.HUP)
    assert left == []
    with stop.alone():
        assert left == [Reason.HUP.exit_status]
    stop.ask(Reason.TERM)
    assert left == [Reason.HUP.exit_status]


@pytest.mark.parametrize(("rank", "speaks"), [(0, True), (1, False)])
def test_of_a_launchers_ranks_the_first_speaks(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], rank: int, speaks: bool
) -> None:
    be_rank(monkeypatch, rank)
    stop = StopRequest(leave=lambda _: None)
    with stop.alone():
        stop.ask(Reason.LAUNCHER)
    assert ("the launcher has gone" in capfd.readouterr().out) == speaks


def test_a_launcher_that_has_gone_is_found_before_torch_is_imported(tmp_path: Path) -> None:
    """The first line of the process comes after the launcher's end: it is an orphan of another session."""
    code = (
        "import os, sys; parent = os.getpid()\n"
        "if os.fork(): os._exit(0)\n"
        "while os.getppid() == parent: pass\n"
        "os.execv(sys.executable, [sys.executable, '-X', 'importtime', *sys.argv[1:]])\n"
    )
    command = [
        sys.executable,
        "-c",
        code,
        str(ROOT / "launch" / "train.py"),
        "--preset",
        "tiny",
        "--input_file",
        "x.txt",
    ]
    environment = {
        **os.environ,
        "CROSS_SIZE": "1",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_SIZE": "2",
    }
    with (tmp_path / "out").open("w") as out:
        subprocess.run(command, env=environment, stdout=out, stderr=out, start_new_session=True, timeout=60, check=True)
    wait_until(lambda: "stopped before" in (tmp_path / "out").read_text(), 60)
    said = (tmp_path / "out").read_text()
    assert "stopped before the first step: the launcher has gone" in said
    assert "| argparse\n" in said  # by Python's own list of imports
    assert not re.search(r"\| +torch", said)


# --- launchers -------------------------------------------------------------------------------------------------------


def test_a_dead_launcher_asks_to_stop_and_after_the_grace_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "launchers", lambda: [alive.is_set])
    alive, left, stop = threading.Event(), [], StopRequest()
    alive.set()
    watch = LauncherWatch(stop, leave=left.append, seconds=0.01, grace=0.05)
    watch.start()
    time.sleep(0.05)
    assert stop.reason is None
    alive.clear()
    wait_until(lambda: left)
    assert (stop.reason, left) == (Reason.LAUNCHER, [143])


def test_who_ends_within_the_grace_is_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "launchers", lambda: [lambda: False])
    left, stop = [], StopRequest()
    watch = LauncherWatch(stop, leave=left.append, seconds=0.01, grace=30)
    watch.start()
    wait_until(lambda: stop.reason)
    watch.stop()
    wait_until(lambda: not any(thread.name == "launcher watch" for thread in threading.enumerate()))
    assert left == []
