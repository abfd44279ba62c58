"""Loading beside the threads that compute."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Loaded = TypeVar("Loaded")


def load_aside(load: Callable[[], Loaded]) -> Loaded:
    """Load a model in a thread that ends, so that a worker is fast on a CPU.

    OpenMP keeps threads for each thread that has computed. Where there are more of them than cores, those of the worker no longer
    spin between two products, which nearly doubles the time of a token.
    """
    with ThreadPoolExecutor(1) as loading:
        return loading.submit(load).result()
