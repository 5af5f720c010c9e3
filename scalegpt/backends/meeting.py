"""Where the ranks of a job meet: under torchrun at its store, under DeepSpeed's launcher at one that rank 0 opens.

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
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import DistNetworkError

from scalegpt.errors import InputError, RunError
from scalegpt.processes import birth_of

POLL_SECONDS = 0.05


def meet(store: Store, rank: int, size: int, timeout: timedelta) -> Store:
    """A corner of the store that no earlier start has used; all ranks must call it together.

    Each rank leaves a number that nobody else has; rank 0 answers to the number with the name of its start, until all that
    are there now have read that.

    Raises:
        RunError: a rank does not come.
    """
    if rank:
        number = secrets.token_hex(8)
        store.set(f"scalegpt/hello/{rank}", number)
        store.wait([f"scalegpt/welcome/{number}"], timeout)
        name = store.get(f"scalegpt/welcome/{number}").decode()
        store.set(f"scalegpt/here/{name}/{rank}", "")
        return PrefixStore(f"scalegpt/{name}", store)
    name, missing = secrets.token_hex(8), set(range(1, size))
    until = time.monotonic() + timeout.total_seconds()
    while missing:
        for each in missing:
            if store.check([f"scalegpt/hello/{each}"]):  # perhaps a dead one's: nobody will read the answer
                store.set(f"scalegpt/welcome/{store.get(f'scalegpt/hello/{each}').decode()}", name)
        missing = {each for each in missing if not store.check([f"scalegpt/here/{name}/{each}"])}
        if time.monotonic() > until:
            raise RunError(f"ranks {sorted(missing)} did not come within {timeout}; see what their processes say")
        time.sleep(POLL_SECONDS)
    return PrefixStore(f"scalegpt/{name}", store)


def own_store(rank: int, size: int, port: int, timeout: timedelta) -> Store:
    """The store of ranks that one process has started on this machine, at that port or, where it is taken, a free one.

    Raises:
        InputError: the folder for the file that names the port is not ours alone.
        RunError: rank 0 does not come.
    """
    file = _private_folder() / f"{_parent()}.port"
    if rank:
        there = _port_in(file, timeout)
        store = TCPStore("127.0.0.1", there, size, is_master=False, timeout=timeout)
        store.set(f"scalegpt/here/{rank}", "")
        return store
    store = _listening(port, size, timeout)
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(str(store.port), encoding="ascii")
    unfinished.replace(file)
    try:
        store.wait([f"scalegpt/here/{each}" for each in range(1, size)], timeout)
    finally:
        file.unlink(missing_ok=True)
    return store


def _listening(port: int, size: int, timeout: timedelta) -> TCPStore:
    def listen(at: int) -> TCPStore:
        return TCPStore("127.0.0.1", at, size, is_master=True, timeout=timeout, wait_for_workers=False)

    try:
        return listen(port)
    except DistNetworkError as error:
        if not is_taken(error):
            raise
        return listen(0)


def is_taken(error: DistNetworkError) -> bool:
    """Whether another program listens at the port."""
    return "EADDRINUSE" in str(error)


def _parent() -> str:
    """The process that started us, as no other one is called; a dead one's number may be another's now, but not its birth."""
    parent = os.getppid()
    return f"{parent}@{birth_of(parent) or 'gone'}".replace(":", "-")


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
    raise RunError(f"rank 0 did not come within {timeout}; see what its process says")


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
