"""Drafts, one for each row, and drafting of chains with trunk and twig (Algorithm 1, first half).

Rows of a batch draft differently much. What runs for one row only runs for the others too, on tokens that stand for
nothing: their place in a list of nodes is -1, nobody sees them, and caches drop them with the rest of the draft.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from twigvlm.base.masks import Masks
from twigvlm.base.token_inputs import TokenInputs
from twigvlm.engine.context import Context
from twigvlm.speculation.tree import Tree


@dataclass(frozen=True)
class Draft:
    """Drafted tokens after the last accepted one (the root), and what layers K+1..L need to verify all of them."""

    trees: list[Tree]
    """Of each row."""
    hidden: Float[Tensor, "batch nodes width"]
    """Layer-K states of the nodes: the base verifies from these, without the trunk."""
    rope: TokenInputs
    masks: Masks
    in_trunk: list[list[int]]
    """The node of each token that a row of the trunk's caches got for this draft; -1: of none that is in its tree."""
    in_twig: list[list[int]]
    """The same for the twig's cache."""

    def keep(self, context: Context, paths: Sequence[Sequence[int]]) -> None:
        """Every cache keeps each row's accepted path (root included) and drops the rest of the draft."""
        cache, trunk, layers = context.cache, context.twig.config.trunk_layers, context.base.num_layers
        rows = list(zip(paths, self.in_trunk, self.in_twig, strict=True))
        cache.keep(0, trunk, len(self.in_trunk[0]), [[ran.index(node) for node in path] for path, ran, _ in rows])
        cache.keep(trunk, layers, self.hidden.shape[1], paths)
        seen = [[ran.index(node) for node in path if node in ran] for path, _, ran in rows]
        cache.keep(layers, context.twig.last_slot + 1, len(self.in_twig[0]), seen)
        if context.speculation.active:
            for row, (path, known) in enumerate(zip(paths, seen, strict=True)):
                context.pending[row] += [self.hidden[row, node : node + 1] for node in path[len(known) :]]


def draft_chain(context: Context, tokens: Sequence[int], indices: Sequence[int], rooms: Sequence[int]) -> Draft:
    """Draft up to δ tokens after each row's token, its `indices[row]`-th generated one (from 0), and at most `rooms[row]`.

    Ends early after a token whose probability (within the draft vocabulary) is below θ, and after an end token. The
    twig's cache gets all but the last drafted token; trunk caches get all.
    """
    trees = [Tree.rooted(token) for token in tokens]
    most = [min(context.speculation.draft_length, room) for room in rooms]
    going = [room > 0 for room in most]
    states: list[Tensor] = []
    while True:
        rope = context.rope_at([[index + len(states)] for index in indices])
        newest = torch.tensor([tree.tokens[-1:] for tree in trees], device=rope.cos.device)
        states.append(context.trunk(newest, rope, context.masks))
        if not any(going):
            break
        logits = context.twig_logits(states[-1], rope, context.masks, indices)
        scores = context.scores(logits, [[index + len(states)] for index in indices])[:, 0]
        best, position = scores.max(dim=-1)
        # one transfer for both
        for row, (score, drafted) in enumerate(torch.stack((best, context.token_ids(position)), -1).tolist()):
            tree = trees[row]
            if going[row]:
                tree.add(int(drafted), len(tree) - 1, score)
                likely = math.exp(score) >= context.speculation.draft_threshold
                going[row] = len(tree) <= most[row] and likely and tree.tokens[-1] not in context.ends
    passes = len(states)
    return Draft(
        trees,
        torch.cat(states, dim=1) if passes > 1 else states[0],
        context.rope_at([range(index, index + passes) for index in indices]),
        context.masks,
        [nodes_of(len(tree), passes) for tree in trees],
        [nodes_of(len(tree), passes - 1) for tree in trees],
    )


def filled(nodes: Sequence[int], count: int, with_node: int) -> list[int]:
    """So many nodes, with one that stands for the missing ones."""
    return [*nodes, *[with_node] * (count - len(nodes))]


def nodes_of(count: int, places: int) -> list[int]:
    """The nodes of a tree of so many in their order, cut or filled up to so many places."""
    return filled(range(min(count, places)), places, with_node=-1)
