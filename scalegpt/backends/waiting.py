"""Waiting for work that some ranks do alone and that may take hours, for example tokenising a corpus.

A collective would time out and end the run. Instead, the working ranks report progress in the store that all ranks
share, and the other ranks wait as long as there is progress.
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
"""Seconds between two checks by a working rank of whether it has made progress."""

PATIENCE = timedelta(minutes=30)
"""Seconds that ranks wait while no rank makes progress."""

BUSY_SHARE = 0.03
"""The share of a core that a process must use to count as making progress.

Reading, converting and hashing take more; threads that only keep connections open take less.
"""

FIRST_POLL, LAST_POLL = 0.02, 2.0
"""The first and the longest pause between two polls of a waiting rank, in seconds.

The pauses grow, because a thousand ranks may poll one store.
"""

_numbers = itertools.count()


def next_work() -> str:
    """A name for the next work that some ranks do alone.

    It contains a running number, which is the same on all ranks.
    """
    return f"scalegpt/work/{next(_numbers)}"


@contextmanager
def reporting(store: Store, work: str) -> Iterator[None]:
    """Run a thread during the ``with`` block that increments a counter in the store while this rank makes progress."""
    over = threading.Event()
    thread = threading.Thread(target=_report, args=(store, f"{work}/progress", over), name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def finish_together(store: Store, work: str, rank: int, size: int, patience: timedelta | None = None) -> None:
    """Report that this rank has done its part, and wait for all other ranks; all ranks must call it.

    Args:
        store: the store that all ranks share.
        work: name of the work, from :func:`next_work`.
        rank: this rank.
        size: number of ranks.
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
    """CPU seconds that this process's threads, except the calling one, have used so far."""
    return time.process_time() - time.thread_time()


def _done(work: str, rank: int) -> str:
    return f"{work}/{rank}/done"
