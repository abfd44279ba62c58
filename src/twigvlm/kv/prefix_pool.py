"""Prompts of earlier requests, whose trunk and twig states serve requests that begin as they do."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from twigvlm.kv.prefix_cache import Pictures, PrefixCache


class PrefixPool:
    """Prefix caches of requests that have ended or are under way, the most recently used last; for one thread.

    Args:
        max_bytes: largest total size; the least recently used give way. 0: nothing is kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        """Bytes that all of them hold."""
        self._kept: list[PrefixCache] = []

    def take(self, inputs: Mapping[str, Any]) -> PrefixCache:
        """A prefix cache for a request, which may change it: a copy of the one whose prompt has the longest beginning in common
        with the request's, pictures included; an empty one if none has.

        Args:
            inputs: the processor's outputs for one prompt.
        """
        ids, pictures = inputs["input_ids"], Pictures(inputs)
        longest, found = 0, -1
        for index, kept in enumerate(self._kept):
            length = kept.known(ids)
            if length > longest and kept.begins(pictures):  # in this order: ids are compared faster than pictures
                longest, found = length, index
        if not longest:
            return PrefixCache()
        self._kept.append(self._kept.pop(found))
        return self._kept[-1].copy()

    def keep(self, prefix: PrefixCache) -> None:
        """Take in a prompt that has passed the prefill, in place of those that it continues.

        Args:
            prefix: nobody changes it any more, except for adding the twig's states.
        """
        if prefix.prompt is None or not self.max_bytes:
            return
        # What pruners saw of the vision tower is of no use to later prompts, which bring their pictures where it is needed.
        prefix.prompt = replace(prefix.prompt, vision=None)
        self._kept = [kept for kept in self._kept if not _continues(prefix, kept)]
        self._kept.append(prefix)
        sizes = [kept.bytes() for kept in self._kept]
        while sum(sizes) > self.max_bytes:
            del self._kept[0], sizes[0]
        self.bytes = sum(sizes)

    def clear(self) -> None:
        """Drop all of them."""
        self._kept.clear()
        self.bytes = 0


def _continues(prefix: PrefixCache, kept: PrefixCache) -> bool:
    """Whether a prompt begins with the whole of another one and its pictures."""
    assert prefix.prompt is not None
    assert kept.prompt is not None, "it has passed the prefill"
    count = kept.prompt.input_ids.shape[1]
    same_text = prefix.prompt.input_ids[:, :count].equal(kept.prompt.input_ids)
    return same_text and kept.pictures.items() <= prefix.pictures.items()
