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
        self._kept: list[PrefixCache] = []

    @property
    def bytes(self) -> int:
        """Bytes that all of them hold."""
        return sum(kept.bytes() for kept in self._kept)

    def take(self, inputs: Mapping[str, Any]) -> PrefixCache:
        """A prefix cache for a request, which may change it: a copy of the one whose prompt has the longest beginning in common
        with the request's, pictures included; an empty one if none has.

        Args:
            inputs: the processor's outputs for one prompt.
        """
        ids, pictures = inputs["input_ids"], Pictures(inputs)
        lengths = [kept.known(ids) if kept.begins(pictures) else 0 for kept in self._kept]
        longest = max(lengths, default=0)
        if not longest:
            return PrefixCache()
        found = self._kept.pop(lengths.index(longest))
        self._kept.append(found)
        return found.copy()

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
        held = self.bytes
        while held > self.max_bytes:
            held -= self._kept.pop(0).bytes()

    def clear(self) -> None:
        """Drop all of them."""
        self._kept.clear()


def _continues(prefix: PrefixCache, kept: PrefixCache) -> bool:
    """Whether a prompt begins with the whole of another one and its pictures."""
    assert prefix.prompt is not None
    assert kept.prompt is not None, "it has passed the prefill"
    count = kept.prompt.input_ids.shape[1]
    same_text = prefix.prompt.input_ids[:, :count].equal(kept.prompt.input_ids)
    return same_text and kept.pictures.items() <= prefix.pictures.items()
