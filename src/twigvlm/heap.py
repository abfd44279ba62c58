"""Return freed memory, which the C library otherwise keeps, to the system."""

import ctypes
import sys


def give_back_freed_memory() -> None:
    """Return freed memory to the system, if the C library is glibc; otherwise do nothing.

    Buffers of keys and values of all sizes are allocated and freed between states that live longer. glibc does not return the
    free memory between these by itself, so that a busy server would hold more than twice the memory that it uses.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)
