"""Freed memory, which the C library keeps between blocks that are in use."""

import ctypes
import sys


def give_back_freed_memory() -> None:
    """Give freed memory back to the system, where the C library is glibc.

    Buffers of keys and values come and go in all sizes between states that stay. glibc does not return what is free between
    those by itself, so that a busy server would hold more than twice the memory that it uses.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)
