"""Where each token of an answer came from: the twig's draft, or the base. Pure functions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Origin:
    """Of one token."""

    step: int
    """0: the prefill, which may verify a draft too; from 1 on: draft and verification."""
    drafted: bool
    """Drafted by the twig and accepted; otherwise chosen by the base: a correction or a bonus token."""


def origins(accepted_lengths: Sequence[int], count: int) -> list[Origin]:
    """The origin of each of an answer's `count` tokens (Algorithms 1 and 2).

    Each step, the prefill first, gives its accepted tokens and one of the base's own, except for a last step that a drafted
    token ended.

    Raises:
        ValueError: the lengths do not make that many tokens.
    """
    found: list[Origin] = []
    for step, accepted in enumerate(accepted_lengths):
        found += [Origin(step, True)] * accepted + [Origin(step, False)]
    if count == len(found) - 1 and accepted_lengths and accepted_lengths[-1]:
        found.pop()
    if count != len(found):
        raise ValueError(f"{count} tokens: accepted lengths {list(accepted_lengths)} make {len(found)}")
    return found


def pieces(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """The text that each token adds; a character of several tokens comes with the last of them.

    Args:
        ids: ids of the tokens.
        decode: ids to text.
    """
    found, shown = [], 0
    for end in range(1, len(ids) + 1):
        text = decode(ids[:end])
        whole = end == len(ids) or not text.endswith("\ufffd")
        found.append(text[shown:] if whole else "")
        shown = len(text) if whole else shown
    return found
