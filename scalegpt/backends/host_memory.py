"""Lets a training process on the CPU keep freed memory for its next step.

glibc returns large blocks to the kernel when they are freed. The next step allocates the same sizes again, and each
page costs a page fault and is zeroed. CUDA's caching allocator keeps memory for the same reason.
``benchmarks/compare_peers.py`` times a plain training loop that returns freed memory or, with ``--keep_memory``, one
that keeps it.
"""

import ctypes
from collections.abc import Callable

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
"""Numbers of the parameters of glibc's ``mallopt``, from ``malloc.h``."""

TRIM_BYTES, MMAP_BYTES, MMAPS = 64 * 2**20, 4 * 2**20, 65_536
"""The settings of :func:`give_back_freed_memory`.

A block of 4 MiB or more is returned to the kernel when it is freed. The end of the heap is returned when more than 64
MiB there are free. The largest number of such blocks is glibc's default (``DEFAULT_MMAP_MAX``).
"""

NEVER = -1
"""The trim threshold with which the end of the heap is never returned."""


def keep_freed_memory() -> bool:
    """Allocate large blocks on the heap, like small ones, and never return the end of the heap to the kernel.

    The process then keeps the memory of its peak, and a little more, because free blocks may not fit later sizes.

    Returns:
        Whether the C library has these settings; musl and macOS have no ``mallopt``.
    """
    mallopt = _mallopt()
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, NEVER))


def give_back_freed_memory() -> bool:
    """Undo :func:`keep_freed_memory` and return free memory to the kernel, for runs with little memory.

    Returns:
        Whether the C library has these settings.
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
