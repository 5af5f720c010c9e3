"""Keeps the memory that a training process on the CPU frees, for its next step.

glibc gives large blocks back to the kernel as soon as they are freed, and the next step gets them anew: page by page, each
zeroed in a fault. A step allocates the same sizes as the one before it. CUDA's caching allocator keeps what it has for the
same reason. ``benchmarks/compare_nanogpt.py`` tells what a loop costs without this, and given ``--keep_memory`` with it.
"""

import ctypes
from collections.abc import Callable

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
"""Parameters of glibc's ``mallopt``, by ``malloc.h``."""

TRIM_BYTES, MMAP_BYTES, MMAPS = 64 * 2**20, 4 * 2**20, 65_536
"""Blocks from 4 MiB on go back to the kernel one by one, and the heap's end where more than 64 MiB of it are free. The number
of blocks is glibc's own (``DEFAULT_MMAP_MAX``)."""

NEVER = -1
"""A trim threshold: none is large enough."""


def keep_freed_memory() -> bool:
    """Serve large blocks from the heap, as small ones are, and never give the heap's end back.

    What a process held at its peak it then holds for good, and somewhat more where blocks of other sizes lie between those
    that are free.

    Returns:
        Whether the C library is one that can be set so; musl and macOS have no ``mallopt``.
    """
    mallopt = _mallopt()
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, NEVER))


def give_back_freed_memory() -> bool:
    """Undo :func:`keep_freed_memory`, and give back what is free now: for runs whose memory is short.

    Returns:
        As for that function.
    """
    mallopt = _mallopt()
    if mallopt is None:
        return False
    settings = {M_MMAP_MAX: MMAPS, M_MMAP_THRESHOLD: MMAP_BYTES, M_TRIM_THRESHOLD: TRIM_BYTES}
    results = [mallopt(key, value) for key, value in settings.items()]
    ctypes.CDLL(None).malloc_trim(0)
    return all(results)


def _mallopt() -> Callable[[int, int], int] | None:
    return getattr(ctypes.CDLL(None), "mallopt", None)
