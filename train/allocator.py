"""Memory that a training process keeps instead of giving it back after each step."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h


def keep_memory() -> bool:
    """Has glibc keep freed memory, however large, for the next step of training on a CPU; whether that could be asked.

    Left alone it maps every large tensor anew and gives it back at once, and the kernel clears each page again: a tenth
    of a step's time and more. The process then holds on to its peak until it ends.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return False
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**28))
    return min(mallopt(name, value) for name, value in settings) == 1
