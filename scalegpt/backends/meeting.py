"""The store through which the ranks of a job connect: torchrun's own store, or else one that rank 0 opens.

torchrun keeps one store for all restarts, and it still holds the addresses of the ranks before the restart. (Torch's
``rendezvous.py`` says that each restart has a new store, but that is not so with the default c10d rendezvous.) A rank
that starts early would read an old address and fail with "Connection refused". The count of restarts does not identify
a start, since agents on several machines count separately. The ranks of each start therefore first agree on a random
prefix, and then use only keys with this prefix.

DeepSpeed's launcher uses port 29500 by default and does not check that it is free. Rank 0 of a second run on the
machine would fail, and its other ranks would connect to the first run's store. To avoid this, under DeepSpeed on one
machine rank 0 takes a free port if the given one is taken, and writes the port to a file for the other ranks.
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
"""Seconds after which a rank reports that it is waiting for other ranks: without and with a launcher.

A launcher starts all ranks itself, so a missing rank is probably slow. Without one, the user may have forgotten it.
"""


def meeting_store(ranks: Ranks, timeout: timedelta) -> Store:
    """Connect to the store that the ranks of this start of the job share, and wait until all ranks are connected.

    Args:
        ranks: this process's rank and the number of ranks, in the job and on this machine.
        timeout: how long to wait for the other ranks.

    Raises:
        InputError: the environment's address or port is missing or unusable.
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
    """Report once that this rank is waiting for ``awaited``, if the ``with`` block takes more than a few seconds."""
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
    """Print that this rank is waiting for ``awaited``; under a launcher, only the first two ranks of a machine print."""
    if under_launcher() and ranks.local_rank > 1:
        return
    advice = "" if under_launcher() else "; unset WORLD_SIZE and RANK to train in one process"
    print(f"rank {ranks.rank} of {ranks.size} is waiting for {awaited}{advice}", flush=True)


def gather(store: Store, ranks: Ranks, timeout: timedelta, place: str) -> None:
    """Wait until all ranks are connected to a store of this start of the job; all ranks must call it together.

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
    """Wait for all other ranks; called on rank 0 alone.

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
    """The ranks in words: ``rank 1``, or ``ranks 1, 2, 3, 4, 5, 6, 7, 8 and 5 more``."""
    first, more = sorted(ranks)[:8], len(ranks) - 8
    words = ", ".join(map(str, first)) + (f" and {more} more" if more > 0 else "")
    return f"rank {words}" if len(ranks) == 1 else f"ranks {words}"


def meet(store: Store, ranks: Ranks, timeout: timedelta, place: str) -> Store:
    """Agree on a key prefix that no earlier start used, and return the store under it; all ranks must call it together.

    Each rank writes a random number into the store. Rank 0 writes the prefix as the answer to each number, until all ranks of
    this start have read it.

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
        if store.check([f"scalegpt/hello/{each}"]):  # if it is from an earlier start, no rank reads the answer
            store.set(f"scalegpt/welcome/{store.get(f'scalegpt/hello/{each}').decode()}", name)
        return store.check([f"scalegpt/here/{name}/{each}"])

    _await_others(ranks, is_here, timeout, place)
    return PrefixStore(f"scalegpt/{name}", store)


def own_store(ranks: Ranks, port: int, timeout: timedelta) -> Store:
    """The store of ranks that one process started on this machine.

    It listens at ``port``, or at a free port if that is taken.

    Raises:
        InputError: other users can write to the folder of the file that names the port.
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
    """Remove the port files of jobs whose starting process has ended, for example after a kill."""
    for file in folder.glob("*@*.port"):
        pid, _, birth = file.stem.partition("@")
        boot, dash, ticks = birth.rpartition("-")
        if pid.isdecimal() and has_ended(int(pid), f"{boot}:{ticks}" if dash else birth):
            file.unlink(missing_ok=True)


def _process_name(pid: int) -> str:
    """A file name that identifies a process: its id with its start time, since ids are reused."""
    return f"{pid}@{birth_of(pid) or 'gone'}".replace(":", "-")


def _port_in(file: Path, timeout: timedelta) -> int:
    """Wait until rank 0 has written its port to this file, and return the port.

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
    """Make or find the folder for short-lived files between this user's processes; no other user can write to it.

    Raises:
        InputError: another user owns the folder, or can write to it.
    """
    folder = Path(tempfile.gettempdir()) / f"scalegpt-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise InputError(
            f"{folder} is not a folder that only you can write to; remove it, or set TMPDIR to another folder"
        )
    return folder
