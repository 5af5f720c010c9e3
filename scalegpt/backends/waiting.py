"""Waiting for work that some ranks do alone and that may take hours, such as tokenising a corpus.

A collective would time out and end the run. So the ranks that work report progress in the store of all ranks, and the others
wait as long as there is progress.
"""

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

from torch._C._distributed_c10d import Store
from torch.distributed import DistError

from scalegpt.errors import RunError

BEAT_SECONDS = 5.0
"""How often a working rank checks whether it has made progress."""

PATIENCE = timedelta(minutes=30)
"""How long the ranks wait without any progress."""

BUSY_SHARE = 0.03
"""The least share of a core that a working process uses, since it reads, converts and hashes. Threads that only keep
connections open use less."""

FIRST_POLL, LAST_POLL = 0.02, 2.0
"""Seconds between two polls of a waiting rank, growing from the first to the last: a thousand ranks poll one server."""

_numbers = itertools.count()


def next_work() -> str:
    """A name for the next piece of work; all ranks count alike."""
    return f"scalegpt/work/{next(_numbers)}"


@contextmanager
def reporting(store: Store, work: str) -> Iterator[None]:
    """Report in the background, until the block ends, whether this rank makes progress."""
    over = threading.Event()
    thread = threading.Thread(target=_report, args=(store, f"{work}/progress", over), name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def finish_together(store: Store, work: str, rank: int, size: int, patience: timedelta | None = None) -> None:
    """Report that this rank has done its part, and wait for all others; all must call it.

    Args:
        store: of all ranks.
        work: its name.
        rank: this one.
        size: the number of ranks.
        patience: how long to wait while no rank makes progress; None: :data:`PATIENCE`.

    Raises:
        RunError: no rank makes progress, or the process that holds the store has ended.
    """
    try:
        store.set(_done(work, rank), "")
        store.add(f"{work}/done", 1)
        _await(store, work, size, (patience or PATIENCE).total_seconds())
    except DistError as error:
        raise RunError(
            f"the connection to rank 0 was lost while the data was prepared ({str(error).splitlines()[0][:160]}); see what "
            "rank 0 reports, and start again: completed work is kept"
        ) from None


def _await(store: Store, work: str, size: int, patience: float) -> None:
    pause, last, since = FIRST_POLL, -1, time.monotonic()
    while (done := store.add(f"{work}/done", 0)) < size:
        progress, now = done + store.add(f"{work}/progress", 0), time.monotonic()
        if progress != last:
            last, since = progress, now
        elif now - since > patience:
            late = next((each for each in range(size) if not store.check([_done(work, each)])), size - 1)
            raise RunError(
                f"rank {late} prepares the data and has made no progress for {patience:,.0f} s; see what its process reports "
                "and whether its disk answers, and start again"
            )
        time.sleep(pause)
        pause = min(LAST_POLL, 1.5 * pause)


def _report(store: Store, key: str, over: threading.Event) -> None:
    since, used = time.monotonic(), _others_seconds()
    while not over.wait(BEAT_SECONDS):
        now, uses = time.monotonic(), _others_seconds()
        if uses - used >= BUSY_SHARE * (now - since):
            with suppress(DistError):  # the main thread gets the same error, and reports it
                store.add(key, 1)
        since, used = now, uses


def _others_seconds() -> float:
    """CPU seconds of this process so far, without those of the calling thread."""
    return time.process_time() - time.thread_time()


def _done(work: str, rank: int) -> str:
    return f"{work}/{rank}/done"
