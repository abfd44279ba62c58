"""What a policy drafts and has verified, where a plain function stands for the twig."""

import random as rng

import torch

from tests.speculation.forests import as_lists, trimmed
from twigvlm.speculation.nodes import INVALID, Nodes


def drafted(policy, children, rows=1, room=50, watch=None):
    """What a policy drafts, and what of it is verified.

    Args:
        policy: of the drafts.
        children: (row, tokens on the path) -> probabilities of the E next tokens.
        rows: number of rows.
        room: of the deepest node.
        watch: called with the nodes, what may be expanded and what the policy chose, before each pass.
    """
    nodes = Nodes.rooted(torch.zeros(rows, dtype=torch.long))
    ran = [set() for _ in range(rows)]
    level = 0
    while True:
        trees = as_lists(nodes)
        fresh = torch.tensor(
            [[node not in ran[row] for node in range(len(tree.tokens))] for row, tree in enumerate(trees)]
        )
        able = policy.grows(nodes) & fresh & (nodes.depths < room)
        chosen = policy.expand(nodes, able, level)
        if watch is not None:
            watch(nodes, able, chosen)
        if chosen is None:
            return nodes, policy.select(nodes)
        for row, indices in enumerate(chosen.tolist()):
            assert trimmed(indices) == sorted(set(indices) - {INVALID})
            ran[row] |= set(indices)
        parents = chosen.masked_fill(~able.gather(1, chosen.clamp(min=0)), INVALID)
        steps = [
            [children(row, tree.path_tokens(max(parent, 0))) for parent in parents[row].tolist()]
            for row, tree in enumerate(trees)
        ]
        tokens = torch.arange(policy.width).expand(rows, parents.shape[1], -1)
        nodes = nodes.add(parents, tokens, torch.tensor(steps).log())
        level += 1


def any_children(seed, width):
    """Probabilities of children that differ from path to path, the best one first, as a twig's are."""

    def children(row, path):
        random = rng.Random(f"{seed} {row} {path}")
        shares = sorted((random.uniform(0.05, 1.0) for _ in range(width)), reverse=True)
        total = sum(shares) + random.uniform(0.0, 0.5)
        return [share / total for share in shares]

    return children
