"""Count the memory that requests hold: bodies, fetched images and prepared inputs."""

from collections.abc import Iterator
from contextlib import contextmanager

from twigvlm.serving.errors import RequestError


class Memory:
    """Counts what all requests hold together. Use it from one thread only.

    Args:
        limit: largest total, in bytes. A single request may exceed it.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0

    @contextmanager
    def share(self) -> Iterator["Share"]:
        """Count what one request holds while the block runs, and release it afterwards."""
        share = Share(self)
        try:
            yield share
        finally:
            share.give_back(share.size)


class Share:
    """Counts what one request holds.

    Args:
        memory: the total that it is part of.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory, self.size = memory, 0

    def take(self, size: int) -> None:
        """Count further bytes as held by this request.

        Args:
            size: number of bytes.

        Raises:
            RequestError: other requests hold so much that this would exceed the limit.
        """
        memory = self._memory
        if memory.held > self.size and memory.held + size > memory.limit:
            raise RequestError(
                "other requests hold too much memory; try again later", 429, code="rate_limit_exceeded", retry_after=1
            )
        memory.held += size
        self.size += size

    def give_back(self, size: int) -> None:
        """Count this many bytes as released."""
        self._memory.held -= size
        self.size -= size
