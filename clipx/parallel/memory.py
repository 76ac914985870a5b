"""How this process asks the system for memory."""

from __future__ import annotations

import ctypes
import os

# mallopt's parameters, of glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_pages() -> bool:
    """Makes glibc's malloc keep what is freed, so that a step finds the pages of the one before.

    XLA takes the temporaries of a step in blocks of many megabytes, and gives them back at its end.
    malloc maps such blocks anew each time, and the kernel clears every page of them: a quarter of
    the CPU time of small models. Blocks come from one arena then, which threads share, as only the
    first can hold large ones. A process holds on to the most that it has ever used.

    Does nothing, and returns False, where the environment names settings of malloc or another
    allocator, and without glibc. Call it before any thread starts.
    """
    chosen = ("GLIBC_TUNABLES", "LD_PRELOAD")
    if any(name in chosen or name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
        ctypes.CDLL(None).gnu_get_libc_version  # noqa: B018  # another library's has other numbers
    except (AttributeError, OSError, TypeError):
        return False
    settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))  # -1: never
    return all(mallopt(name, value) for name, value in settings)
