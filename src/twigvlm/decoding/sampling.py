"""The base's choice of a token: greedy, after whatever logits processors the caller asked for."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

Processors = Callable[[Tensor, Tensor], Tensor]
"""(ids so far [1, n], float32 scores [1, vocabulary]) -> scores: a LogitsProcessor or a list of them."""


def greedy_choices(
    logits: Float[Tensor, "positions vocabulary"],
    drafted: Sequence[int],
    processors: Processors | None = None,
    ids: Int[Tensor, "1 so_far"] | None = None,
) -> list[int]:
    """The base's greedy choice at each position of a verified draft.

    Processors are called as plain generation would call them: position by position, on the ids up to there, and never
    beyond the first choice that differs from the draft, so that those with a memory see each accepted token once.

    Args:
        logits: row i follows i drafted tokens.
        drafted: drafted ids, one fewer than rows.
        processors: applied to each row; None: none.
        ids: prompt and accepted tokens before the draft; needed with processors.

    Returns:
        Chosen ids; with processors the list ends at the first that differs from the draft.
    """
    if processors is None:
        return [int(token) for token in logits.argmax(dim=-1).tolist()]
    assert ids is not None, "processors need the ids"
    choices: list[int] = []
    for row, expected in zip(logits, [*drafted, None], strict=True):
        scores = processors(ids, row[None].to(torch.float32, copy=True))
        choices.append(int(scores.argmax(dim=-1)))
        if choices[-1] != expected:
            break
        ids = torch.cat((ids, ids.new_tensor([[expected]])), dim=1)
    return choices
