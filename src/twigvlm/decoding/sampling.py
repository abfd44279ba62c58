"""The base's choice of a token: greedy, after whatever logits processors the caller asked for."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

Processors = Callable[[Tensor, Tensor], Tensor]
"""(ids so far [1, n], float32 scores [1, vocabulary]) -> scores: a LogitsProcessor or a list of them."""

Choose = Callable[[int, Sequence[int]], int]
"""(node, tokens on the path from the root to it, without the root's) -> the base's choice after it."""


def greedy(
    logits: Float[Tensor, "nodes vocabulary"],
    processors: Processors | None = None,
    ids: Int[Tensor, "1 so_far"] | None = None,
) -> Choose:
    """The base's greedy choice after each node of a verified draft.

    Without processors all choices are made at once. Processors are called when a choice is asked for, on the ids up to
    there: along the accepted path they see what plain generation would show them, so those with a memory work too.

    Args:
        logits: of each node; node 0 is the last accepted token.
        processors: applied to a row before the choice; None: none.
        ids: prompt and accepted tokens; needed with processors.
    """
    if processors is None:
        choices = logits.argmax(dim=-1).tolist()
        return lambda node, _: int(choices[node])
    assert ids is not None, "processors need the ids"

    def choose(node: int, drafted: Sequence[int]) -> int:
        so_far = torch.cat((ids, ids.new_tensor([drafted])), dim=1)
        return int(processors(so_far, logits[node, None].to(torch.float32, copy=True)).argmax(dim=-1))

    return choose
