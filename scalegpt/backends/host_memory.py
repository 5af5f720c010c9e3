"""Keeps the memory that a training process on the CPU frees, for its next step.

glibc gives large blocks back to the kernel as soon as they are freed, and the next step gets them anew: page by page, each
zeroed in a fault. A step allocates the same sizes as the one before it. CUDA's caching allocator keeps what it has for the
same reason. ``benchmarks/compare_nanogpt.py`` tells what a loop costs without this, and given ``--keep_memory`` with it.
"""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's ``mallopt``, by ``malloc.h``."""

NEVER = -1
"""A trim threshold: none is large enough."""


def keep_freed_memory() -> bool:
    """Serve large blocks from the heap, as small ones are, and never give the heap's end back.

    What a process held at its peak it then holds for good, and somewhat more where blocks of other sizes lie between those
    that are free.

    Returns:
        Whether the C library is one that can be told so; musl and macOS have no ``mallopt``.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, NEVER))
