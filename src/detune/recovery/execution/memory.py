"""Memory that a process has freed: kept for the next tensor."""

import ctypes

__all__ = ["keep_freed_memory"]

# glibc's names for what `mallopt` sets (malloc.h), by definition.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8
_NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next allocation; other C libraries do as they like.

    By default every large tensor gets fresh pages and gives them back, and the system fills each page with zeros when
    it is first touched: a tenth of the time of a recovery, which frees and takes the same sizes again and again. One
    arena for all threads, as only that one can grow to any size. For processes of our own: nobody else's are changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER)):
            mallopt(parameter, value)
