"""Load models in a thread other than the one that computes."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Loaded = TypeVar("Loaded")


def load_aside(load: Callable[[], Loaded]) -> Loaded:
    """Load a model in a thread that ends afterwards, which keeps generation in another thread fast on a CPU.

    OpenMP keeps a pool of threads for each thread that has computed anything. If that makes more of them than cores, the worker's
    pool no longer busy-waits between two matrix products, which nearly doubles the time of a token.
    """
    with ThreadPoolExecutor(1) as loading:
        return loading.submit(load).result()
