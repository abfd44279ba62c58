"""Prompts of earlier requests, whose trunk and twig states serve requests that begin as they do."""

from jaxtyping import Int
from torch import Tensor

from twigvlm.kv.prefix_cache import Pictures, PrefixCache

MAX_PROMPTS = 256
"""Largest number of prompts that are kept: each request is compared with all of them."""


class PrefixPool:
    """Prefix caches of requests that have ended or are under way, the most recently used last; for one thread.

    Args:
        max_bytes: largest total size; the least recently used give way. 0: nothing is kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._kept: list[PrefixCache] = []

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def bytes(self) -> int:
        """Bytes that all of them hold."""
        return sum(kept.bytes() for kept in self._kept)

    def take(self, input_ids: Int[Tensor, "1 tokens"], pictures: Pictures, shared: bool = False) -> PrefixCache | None:
        """A prefix cache for a request, which may change it: a copy of the one whose prompt shares the longest beginning with the
        request's, pictures included, or an empty one. None: nobody would use it again.

        Args:
            input_ids: ids of the prompt.
            pictures: its pictures.
            shared: whether it is for several answers, of which the later ones use what the first one leaves.
        """
        if not self.max_bytes:
            return PrefixCache() if shared else None
        longest, found = 0, -1
        for index, kept in enumerate(self._kept):
            length = kept.known(input_ids)
            if length > longest and kept.begins(pictures):  # in this order: ids are compared faster than pictures
                longest, found = length, index
        if not longest:
            return PrefixCache()
        self._kept.append(self._kept.pop(found))
        return self._kept[-1].copy()

    def keep(self, prefix: PrefixCache, pictures: Pictures) -> None:
        """Take in a prompt that has passed the prefill, in place of those that it continues.

        Args:
            prefix: nobody changes it any more, except for adding the twig's states.
            pictures: pictures of the prompt.
        """
        if prefix.prompt is None or prefix.bytes() > self.max_bytes:
            return
        self._kept = [kept for kept in self._kept if not _continues(prefix.prompt.input_ids, pictures, kept)]
        self._kept.append(prefix)
        while len(self) > MAX_PROMPTS or self.bytes > self.max_bytes:
            del self._kept[0]

    def clear(self) -> None:
        """Drop all of them."""
        self._kept.clear()


def _continues(input_ids: Int[Tensor, "1 tokens"], pictures: Pictures, kept: PrefixCache) -> bool:
    """Whether a prompt begins with the whole of a kept one and its pictures."""
    if kept.prompt is None:  # emptied when the prefill of a later answer to the same prompt failed
        return True
    beginning = input_ids[:, : kept.prompt.input_ids.shape[1]]
    return beginning.equal(kept.prompt.input_ids) and kept.begins(pictures)
