"""Where the ranks of a job meet: under torchrun at its store, otherwise at one that rank 0 opens.

In torchrun's store the dead of the last start have left their addresses: torchrun keeps one store for all restarts (torch's
``rendezvous.py`` says that there is a new one for each; with the c10d rendezvous, which is the default, there is not). A rank
that comes early reads where its neighbour was before the restart, and fails with "Connection refused". The count of restarts
does not tell the starts apart, since agents on several machines count for themselves. So the ranks that are there now find
each other first, and then use a corner of the store of their own.

DeepSpeed's launcher names port 29500 where the user names none, and does not look whether it is free: of a second run on the
machine rank 0 would fail, and the other ranks ask the first run's store. On one machine rank 0 takes a free port instead, and
tells the others by a file.
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
"""After how long a rank reports whom it is waiting for; one of a launcher's later, whose others start by themselves."""


def meeting_store(ranks: Ranks, timeout: timedelta) -> Store:
    """The store of this start, once all ranks are there.

    Args:
        ranks: this process's place.
        timeout: how long to wait for the others.

    Raises:
        InputError: the environment names no place to meet, or one that cannot be used.
        RunError: a rank does not come.
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
        raise RunError(f"nobody answered rank {ranks.rank} at {address}:{port} ({reason})") from None


@contextmanager
def notice(ranks: Ranks, awaited: str) -> Iterator[None]:
    """Report after some seconds whom this rank is waiting for, and where."""
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
    """One line; of the ranks that a launcher has started on this machine, the first two speak."""
    if under_launcher() and ranks.local_rank > 1:
        return
    advice = "" if under_launcher() else "; unset WORLD_SIZE and RANK to train in one process"
    print(f"rank {ranks.rank} of {ranks.size} is waiting for {awaited}{advice}", flush=True)


def gather(store: Store, ranks: Ranks, timeout: timedelta, place: str) -> None:
    """Wait at a store that only this start uses until all ranks are there; all must call it together.

    Raises:
        RunError: a rank does not come.
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
        raise RunError(f"rank 0 has ended, or other ranks did not come within {timeout} ({reason})") from None


def _await_others(ranks: Ranks, is_here: Callable[[int], bool], timeout: timedelta, place: str) -> None:
    """Rank 0's wait for all others.

    Raises:
        RunError: a rank does not come.
    """
    missing, begin, noticed = set(range(1, ranks.size)), time.monotonic(), False
    while missing := {each for each in missing if not is_here(each)}:
        waited = time.monotonic() - begin
        if waited > _notice_seconds() and not noticed:
            _say_waiting(ranks, f"{_named(missing)} at {place}")
            noticed = True
        if waited > timeout.total_seconds():
            raise RunError(f"{_named(missing)} did not come within {timeout}; see what their processes report")
        time.sleep(POLL_SECONDS)


def _named(ranks: set[int]) -> str:
    """Such as ``rank 1``, or ``ranks 1, 2, 3 and 5 more``."""
    first, more = sorted(ranks)[:8], len(ranks) - 8
    words = ", ".join(map(str, first)) + (f" and {more} more" if more > 0 else "")
    return f"rank {words}" if len(ranks) == 1 else f"ranks {words}"


def meet(store: Store, ranks: Ranks, timeout: timedelta, place: str) -> Store:
    """A corner of the store that no earlier start has used; all ranks must call it together.

    Each rank leaves a number that nobody else has; rank 0 answers to the number with the name of its start, until all that
    are there now have read that.

    Raises:
        RunError: a rank does not come.
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
        if store.check([f"scalegpt/hello/{each}"]):  # perhaps a dead one's: nobody will read the answer
            store.set(f"scalegpt/welcome/{store.get(f'scalegpt/hello/{each}').decode()}", name)
        return store.check([f"scalegpt/here/{name}/{each}"])

    _await_others(ranks, is_here, timeout, place)
    return PrefixStore(f"scalegpt/{name}", store)


def own_store(ranks: Ranks, port: int, timeout: timedelta) -> Store:
    """The store of ranks that one process has started on this machine, at that port or, where it is taken, a free one.

    Raises:
        InputError: the folder for the file that names the port is not ours alone.
        RunError: a rank does not come.
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
    """Remove what killed processes have left there."""
    for file in folder.glob("*@*.port"):
        pid, _, birth = file.stem.partition("@")
        boot, dash, ticks = birth.rpartition("-")
        if pid.isdecimal() and has_ended(int(pid), f"{boot}:{ticks}" if dash else birth):
            file.unlink(missing_ok=True)


def _process_name(pid: int) -> str:
    """A process as no other one is called, for a file's name: a dead one's number may be another's now, not its birth."""
    return f"{pid}@{birth_of(pid) or 'gone'}".replace(":", "-")


def _port_in(file: Path, timeout: timedelta) -> int:
    """The port that rank 0 of the same parent names in this file.

    Raises:
        RunError: rank 0 does not come.
    """
    until = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < until:
        with suppress(FileNotFoundError):
            return int(file.read_text(encoding="ascii"))
        time.sleep(POLL_SECONDS)
    raise RunError(f"rank 0 did not come within {timeout}; see what its process reports")


def _private_folder() -> Path:
    """A folder for short-lived files between processes of this user, which nobody else can write to.

    Raises:
        InputError: somebody else has made it, or can write there.
    """
    folder = Path(tempfile.gettempdir()) / f"scalegpt-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise InputError(f"{folder} is not a folder of yours alone; remove it, or name another place in TMPDIR")
    return folder
