"""How far the base agrees with drafts: the walk along the accepted path, for all rows at once. Pure functions."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from twigvlm.speculation.nodes import Nodes

Choose = Callable[[int, Int[Tensor, " rows"], Int[Tensor, "rows walked"], Bool[Tensor, " rows"]], Tensor]
"""(step, node, tokens chosen so far in this walk, rows that still walk) -> the base's choice after the node, [rows]."""

GoOn = Callable[[Int[Tensor, "rows walked"], Bool[Tensor, " rows"]], Bool[Tensor, " rows"]]
"""(tokens chosen so far in this walk, rows that could go on) -> those that do: not after the end of an answer, and rows that
advance together stop together."""


class Accepted(NamedTuple):
    """What a walk found."""

    path: Int[Tensor, "rows steps"]
    """The accepted nodes, root included; then repetitions of the last one."""
    tokens: Int[Tensor, "rows steps"]
    """The base's choices along the path: the accepted tokens and one of its own; what follows is of no meaning."""
    counts: Int[Tensor, " rows"]
    """Length of the path, and of the tokens."""


def walk(nodes: Nodes, depth: int, choose: Choose, go_on: GoOn | None = None) -> Accepted:
    """Go down from the roots while the base's choice is among the children (Algorithms 1 and 2, second half).

    So the longest path that the base agrees with is found for each row.

    Args:
        nodes: siblings have different tokens.
        depth: depth of the deepest node.
        choose: asked once for each step of the walk, from the root on.
        go_on: which of the rows that could go on do; None: all.
    """
    rows, count = nodes.tokens.shape
    node = torch.zeros(rows, dtype=torch.long, device=nodes.tokens.device)
    walking = torch.ones_like(node, dtype=torch.bool)
    is_child = nodes.valid & (torch.arange(count, device=node.device) > 0)
    path, tokens = [node], node.new_zeros(rows, 0)
    counts = torch.ones_like(node)
    for step in range(depth + 1):
        chosen = choose(step, node, tokens, walking)
        tokens = torch.cat((tokens, chosen[:, None]), dim=1)
        if step == depth:
            break
        agrees = is_child & (nodes.parents == node[:, None]) & (nodes.tokens == chosen[:, None])
        walking = walking & agrees.any(dim=1)
        if go_on is not None:
            walking = go_on(tokens, walking)
        node = torch.where(walking, agrees.int().argmax(dim=1), node)
        path.append(node)
        counts = counts + walking
    return Accepted(torch.stack(path, dim=1), tokens, counts)
