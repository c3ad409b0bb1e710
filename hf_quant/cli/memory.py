"""Memory that a long run frees goes back to the system at once."""

from __future__ import annotations

import ctypes
import sys

_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_THRESHOLD = 1 << 20


def give_memory_back() -> None:
    """Tell glibc to map every block of a megabyte or more by itself, and to unmap it when it is freed.

    Left alone, it keeps freed activations in its heap, where blocks of other sizes do not fit: a calibrated run then
    peaks a fifth higher. For the process of a command, not for a library: it holds for the whole process.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # another C library
    mallopt(_M_MMAP_THRESHOLD, _THRESHOLD)
