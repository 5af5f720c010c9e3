"""The store at which the ranks of a job meet: under torchrun its own, otherwise one that rank 0 opens.

torchrun keeps one store for all restarts, with the addresses of the ranks before the restart (torch's ``rendezvous.py`` says
that each restart has a new store; with the default c10d rendezvous it has not). A rank that starts early reads an old address
and fails with "Connection refused". The count of restarts does not identify a start, since agents on several machines count
separately. So the ranks of a start find each other first, and then use keys of the store under a prefix of their own.

DeepSpeed's launcher names port 29500 where the user names none, and does not check that it is free: rank 0 of a second run on
the machine would fail, and the other ranks would connect to the first run's store. On one machine rank 0 takes a free port
instead, and writes it to a file for the others.
"""

import os
import secrets
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import DistError

from scalegpt.backends.ports import LOOPBACK, TakenError, listening, meeting_place
from scalegpt.errors import InputError, RunError
from scalegpt.storage import write_atomic
from scalegpt.system.launchers import starter, under_launcher
from scalegpt.system.processes import birth_of, has_ended
from scalegpt.system.ranks import Ranks

POLL_SECONDS = 0.05

NOTICE_SECONDS, NOTICE_SECONDS_LAUNCHED = 3.0, 15.0
"""After how long a rank reports which ranks it is waiting for; later under a launcher, which starts the others itself."""


def meeting_store(ranks: Ranks, timeout: timedelta) -> Store:
    """The store of this start, once all ranks are there.

    Args:
        ranks: this process's place.
        timeout: how long to wait for the others.

    Raises:
        InputError: the environment names no address and port, or unusable ones.
        RunError: a rank does not connect in time.
    """
    address, port = meeting_place(ranks, os.environ)
    place = f"{address}:{port}"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        with notice(ranks, f"torchrun's store at {place}"):
            agents = _connected(address, port, ranks, timeout)
        return meet(agents, ranks, timeout, place)
    if os.environ.get("CROSS_SIZE") == "1":  # DeepSpeed's launch.py, on one machine
        return own_store(ranks, port, timeout)
    if ranks.rank == 0:
        store: Store = listening(address, port, ranks.size, timeout, here=ranks.on_one_machine)
    else:
        with notice(ranks, f"rank 0 at {place}"):
            store = _connected(address, port, ranks, timeout)
    gather(store, ranks, timeout, place)
    return store


def _connected(address: str, port: int, ranks: Ranks, timeout: timedelta) -> TCPStore:
    try:
        return TCPStore(address, port, ranks.size, is_master=False, timeout=timeout)
    except DistError as error:
        reason = str(error).splitlines()[0][:160]
        raise RunError(f"rank {ranks.rank} got no answer from {address}:{port} ({reason})") from None


@contextmanager
def notice(ranks: Ranks, awaited: str) -> Iterator[None]:
    """Report after some seconds what this rank is waiting for."""
    timer = threading.Timer(_notice_seconds(), _say_waiting, (ranks, awaited))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _notice_seconds() -> float:
    return NOTICE_SECONDS_LAUNCHED if under_launcher() else NOTICE_SECONDS


def _say_waiting(ranks: Ranks, awaited: str) -> None:
    """One line; of the ranks that a launcher has started on this machine, only the first two print it."""
    if under_launcher() and ranks.local_rank > 1:
        return
    advice = "" if under_launcher() else "; unset WORLD_SIZE and RANK to train in one process"
    print(f"rank {ranks.rank} of {ranks.size} is waiting for {awaited}{advice}", flush=True)


def gather(store: Store, ranks: Ranks, timeout: timedelta, place: str) -> None:
    """Wait until all ranks have connected to a store that only this start uses; all must call it together.

    Raises:
        RunError: a rank does not connect in time.
    """
    if ranks.rank:
        store.set(f"scalegpt/here/{ranks.rank}", "")
        _wait(store, "scalegpt/begin", timeout)
        return
    _await_others(ranks, lambda each: store.check([f"scalegpt/here/{each}"]), timeout, place)
    store.set("scalegpt/begin", "")


def _wait(store: Store, key: str, timeout: timedelta) -> None:
    try:
        store.wait([key], timeout)
    except DistError as error:
        reason = str(error).splitlines()[0][:160]
        raise RunError(f"rank 0 has ended, or other ranks did not connect within {timeout} ({reason})") from None


def _await_others(ranks: Ranks, is_here: Callable[[int], bool], timeout: timedelta, place: str) -> None:
    """Wait on rank 0 for all others.

    Raises:
        RunError: a rank does not connect in time.
    """
    missing, begin, noticed = set(range(1, ranks.size)), time.monotonic(), False
    while missing := {each for each in missing if not is_here(each)}:
        waited = time.monotonic() - begin
        if waited > _notice_seconds() and not noticed:
            _say_waiting(ranks, f"{_named(missing)} at {place}")
            noticed = True
        if waited > timeout.total_seconds():
            raise RunError(f"{_named(missing)} did not connect within {timeout}; see what their processes report")
        time.sleep(POLL_SECONDS)


def _named(ranks: set[int]) -> str:
    """Such as ``rank 1``, or ``ranks 1, 2, 3 and 5 more``."""
    first, more = sorted(ranks)[:8], len(ranks) - 8
    words = ", ".join(map(str, first)) + (f" and {more} more" if more > 0 else "")
    return f"rank {words}" if len(ranks) == 1 else f"ranks {words}"


def meet(store: Store, ranks: Ranks, timeout: timedelta, place: str) -> Store:
    """The store under a prefix that no earlier start has used; all ranks must call it together.

    Each rank writes a random number. Rank 0 answers each number with the prefix, until all ranks of this start have read it.

    Raises:
        RunError: a rank does not connect in time.
    """
    if ranks.rank:
        number = secrets.token_hex(8)
        store.set(f"scalegpt/hello/{ranks.rank}", number)
        _wait(store, f"scalegpt/welcome/{number}", timeout)
        name = store.get(f"scalegpt/welcome/{number}").decode()
        store.set(f"scalegpt/here/{name}/{ranks.rank}", "")
        return PrefixStore(f"scalegpt/{name}", store)
    name = secrets.token_hex(8)

    def is_here(each: int) -> bool:
        if store.check([f"scalegpt/hello/{each}"]):  # perhaps of an earlier start: then nobody reads the answer
            store.set(f"scalegpt/welcome/{store.get(f'scalegpt/hello/{each}').decode()}", name)
        return store.check([f"scalegpt/here/{name}/{each}"])

    _await_others(ranks, is_here, timeout, place)
    return PrefixStore(f"scalegpt/{name}", store)


def own_store(ranks: Ranks, port: int, timeout: timedelta) -> Store:
    """The store of ranks that one process has started on this machine, at this port or, if it is taken, a free one.

    Raises:
        InputError: others can write to the folder of the file that names the port.
        RunError: a rank does not connect in time.
    """
    folder = _private_folder()
    file = folder / f"{_process_name(starter().pid)}.port"
    if ranks.rank:
        with notice(ranks, "rank 0 of this machine"):
            there = _port_in(file, timeout)
            store = _connected(LOOPBACK, there, ranks, timeout)
        gather(store, ranks, timeout, f"{LOOPBACK}:{there}")
        return store
    _clear(folder)
    try:
        store = listening(LOOPBACK, port, ranks.size, timeout, here=True)
    except TakenError:
        store = listening(LOOPBACK, 0, ranks.size, timeout, here=True)
    write_atomic(file, str(store.port))
    try:
        gather(store, ranks, timeout, f"{LOOPBACK}:{store.port}")
    finally:
        file.unlink(missing_ok=True)
    return store


def _clear(folder: Path) -> None:
    """Remove the files of processes that were killed."""
    for file in folder.glob("*@*.port"):
        pid, _, birth = file.stem.partition("@")
        boot, dash, ticks = birth.rpartition("-")
        if pid.isdecimal() and has_ended(int(pid), f"{boot}:{ticks}" if dash else birth):
            file.unlink(missing_ok=True)


def _process_name(pid: int) -> str:
    """A name that only this process has, for a file: process ids are used again, so its start time is added."""
    return f"{pid}@{birth_of(pid) or 'gone'}".replace(":", "-")


def _port_in(file: Path, timeout: timedelta) -> int:
    """The port that rank 0 has written to this file.

    Raises:
        RunError: rank 0 does not write it in time.
    """
    until = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < until:
        with suppress(FileNotFoundError):
            return int(file.read_text(encoding="ascii"))
        time.sleep(POLL_SECONDS)
    raise RunError(f"rank 0 did not connect within {timeout}; see what its process reports")


def _private_folder() -> Path:
    """A folder for short-lived files between processes of this user, which nobody else can write to.

    Raises:
        InputError: another user owns it, or can write there.
    """
    folder = Path(tempfile.gettempdir()) / f"scalegpt-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise InputError(
            f"{folder} is not a folder that only you can write to; remove it, or set TMPDIR to another folder"
        )
    return folder
