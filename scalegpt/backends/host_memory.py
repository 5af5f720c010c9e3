"""Keeps the memory that a training process on the CPU frees, for its next step.

glibc gives large blocks back to the kernel as soon as they are freed, and the next step gets them anew: page by page, each
zeroed in a fault. A step allocates the same sizes as the one before it; on a processor whose matmuls are fast, these faults
are a quarter of it. CUDA's caching allocator keeps what it has for the same reason.
"""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's ``mallopt``, by ``malloc.h``."""

NEVER = -1
"""A trim threshold: none is large enough."""

DEFAULT_MMAPS = 65_536
DEFAULT_TRIM = 128 * 1024
"""What glibc has without ``mallopt``."""


def keep_freed_memory() -> bool:
    """Serve large blocks from the heap, as small ones are, and never give the heap's end back.

    What a process held at its peak it then holds for good, and somewhat more where blocks of other sizes lie between those
    that are free.

    Returns:
        Whether the C library is one that can be told so; musl and macOS have no ``mallopt``.
    """
    return _tell(maps=0, trim=NEVER)


def return_freed_memory() -> bool:
    """Take :func:`keep_freed_memory` back, and give the kernel what is free now; the same result."""
    if not _tell(maps=DEFAULT_MMAPS, trim=DEFAULT_TRIM):
        return False
    ctypes.CDLL(None).malloc_trim(0)
    return True


def _tell(*, maps: int, trim: int) -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_MAX, maps)) and bool(mallopt(M_TRIM_THRESHOLD, trim))
