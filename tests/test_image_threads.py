"""Several threads read pictures at once."""

import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Event

from PIL import Image

from twigvlm.images import load_image


def test_warnings_are_seen_again_after_threads_that_read_pictures():
    """One begins before the other, and ends before it."""
    pictures, there, go_on = [Image.new("RGB", (4, 4)) for _ in range(2)], [Event(), Event()], [Event(), Event()]

    def load(index):
        there[index].set()
        go_on[index].wait()
        return Image.Image.load(pictures[index])

    before = list(warnings.filters)
    with ThreadPoolExecutor(2) as pool:
        read = []
        for index, picture in enumerate(pictures):
            picture.load = partial(load, index)
            read.append(pool.submit(load_image, picture))
            there[index].wait()
        for index, one in enumerate(read):
            go_on[index].set()
            assert one.result().size == (4, 4)
    assert list(warnings.filters) == before
