"""Where activations live on a CPU."""

import ctypes
import platform

# Options of mallopt. Source: glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep() -> None:
    """Lets this process keep memory that it frees, for its next allocations; what it once needed it holds to its end.

    By default glibc gives large arrays back to the kernel and takes them again, cleared page by page, in each answer:
    half the time of a frame's VQ encoding. Does nothing under another C library.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, -1)  # never
        libc.mallopt(_ARENA_MAX, 1)  # a thread's own would be given back whole
