"""The C library's memory allocator, set up for repeated work with large tensors on a CPU."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # from glibc's malloc.h


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory of any size for the next step; return whether that was possible.

    By default large tensors are mapped anew and unmapped each time, and the kernel zeroes their pages each time: a tenth of
    a step's time and more. The process then keeps its peak memory until it ends.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return False
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**28))
    return min(mallopt(name, value) for name, value in settings) == 1
