"""Acceptance of a draft (Algorithm 1): pure functions."""

from collections.abc import Sequence


def accept(drafted: Sequence[int], choices: Sequence[int]) -> int:
    """Length of the longest prefix of the draft that the base would have chosen itself.

    Args:
        drafted: drafted token ids.
        choices: the base's choice at the token before each drafted one, and after the last; may end after the first
            that differs from the draft.
    """
    for length, (token, choice) in enumerate(zip(drafted, choices, strict=False)):
        if token != choice:
            return length
    return len(drafted)
