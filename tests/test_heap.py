"""Freed memory goes back to the system."""

import ctypes
import sys

import psutil
import pytest

from twigvlm.heap import give_back_freed_memory

GLIBC = sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "malloc_trim")


@pytest.mark.skipif(not GLIBC, reason="another C library")
def test_freed_memory_between_blocks_in_use_is_given_back():
    process = psutil.Process()
    blocks = [bytearray(100_000) for _ in range(2000)]
    blocks = blocks[::4]
    before = process.memory_info().rss
    give_back_freed_memory()
    assert before - process.memory_info().rss > 50_000_000
    assert len(blocks) == 500


def test_elsewhere_nothing_happens(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    give_back_freed_memory()
