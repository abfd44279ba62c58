"""Where each token of an answer came from: the twig's draft, or the base. Pure functions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Origin:
    """Where one token came from."""

    step: int
    """Step that gave the token. 0: the prefill, which may verify a draft too; from 1 on: draft and verification."""
    drafted: bool
    """Whether it was drafted and accepted. Otherwise the base chose it, as a correction or a bonus token."""


def origins(accepted_lengths: Sequence[int], count: int) -> list[Origin]:
    """The origin of each of an answer's `count` tokens (Algorithms 1 and 2).

    Each step, the prefill first, gives its accepted tokens and one token of the base. Only a last step that ends with an accepted
    end token has no token of the base.

    Args:
        accepted_lengths: number of accepted tokens of each step, as in `TwigOutput.accepted_lengths`.
        count: number of tokens of the answer.

    Raises:
        ValueError: the lengths do not add up to this number of tokens.
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
    """The text that each token adds. A character that takes several tokens belongs to the last of them.

    Args:
        ids: ids of the tokens.
        decode: turns token ids into text.
    """
    found, shown = [], 0
    for end in range(1, len(ids) + 1):
        text = decode(ids[:end])
        whole = end == len(ids) or not text.endswith("\ufffd")
        found.append(text[shown:] if whole else "")
        shown = len(text) if whole else shown
    return found
