"""Drafting of trees with trunk and twig (Algorithm 2, first half), one for each row; chains are in `draft`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from twigvlm.base.masks import Masks, TreeMasks
from twigvlm.base.token_inputs import TokenInputs
from twigvlm.engine.context import Context
from twigvlm.pruning.select import gather_tokens
from twigvlm.speculation.draft import Draft, filled, nodes_of
from twigvlm.speculation.tree import Tree, ancestors


def draft_tree(context: Context, tokens: Sequence[int], indices: Sequence[int], rooms: Sequence[int]) -> Draft:
    """Draft a tree after each row's token, its `indices[row]`-th generated one (from 0), no deeper than `rooms[row]`.

    Nodes that a row's policy chooses run through trunk and twig in one pass and get E children each (probabilities within
    the draft vocabulary; end tokens get none), until no policy chooses more; one transfer from the device a pass. Of the
    whole the policy selects what stays; those nodes that no pass ran then run through the trunk, in one.
    """
    policies, rows = context.policies, range(len(tokens))
    trees = [Tree.rooted(token) for token in tokens]
    able = [[0] if room else [] for room in rooms]
    ran: list[list[int]] = [[] for _ in rows]
    states: list[Tensor] = []
    drafting = set(rows)
    while True:
        levels = [
            policies[row].expand(trees[row], able[row], _real(ran[row])) if row in drafting else [] for row in rows
        ]
        drafting = {row for row in drafting if levels[row]}
        if not drafting:
            break
        state, rope, masks = _run_nodes(context, trees, ran, levels, indices)
        states.append(state)
        logits = context.twig_logits(state, rope, masks, indices)
        count = logits.shape[1]
        places = [
            [indices[row] + trees[row].depths[node] + 1 for node in filled(levels[row], count, with_node=0)]
            for row in rows
        ]
        scores = context.scores(logits, places)
        best = scores.topk(min(context.speculation.tree_width, scores.shape[-1]))
        children = torch.stack((best.values, context.token_ids(best.indices)), dim=-1).tolist()
        for row in drafting:
            tree, first = trees[row], len(trees[row])
            for node, drafts in zip(levels[row], children[row], strict=False):
                for score, drafted in drafts:
                    tree.add(int(drafted), node, score)
            fresh = (
                node
                for node in range(first, len(tree))
                if tree.depths[node] < rooms[row] and tree.tokens[node] not in context.ends
            )
            able[row] = [*(node for node in able[row] if node not in levels[row]), *fresh]
    return _selected(context, trees, ran, states, indices)


def _selected(
    context: Context,
    trees: Sequence[Tree],
    ran: list[list[int]],
    states: list[Tensor],
    indices: Sequence[int],
) -> Draft:
    """What the policies keep of drafted trees, whose nodes `ran` have these layer-K states; the others run through the trunk."""
    policies, rows = context.policies, range(len(trees))
    in_twig = [list(nodes) for nodes in ran]
    kept = [policies[row].select(trees[row]) for row in rows]
    leaves = [[node for node in kept[row] if node not in ran[row]] for row in rows]
    if any(leaves):
        states.append(_run_nodes(context, trees, ran, leaves, indices)[0])
    hidden, most = torch.cat(states, dim=1), max(map(len, kept))
    order = [filled([ran[row].index(node) for node in kept[row]], most, with_node=0) for row in rows]
    chosen = [trees[row].take(kept[row]) for row in rows]
    places = [
        [index + depth for depth in filled(tree.depths, most, 0)] for index, tree in zip(indices, chosen, strict=True)
    ]
    nodes = [nodes_of(len(tree), most) for tree in chosen]
    renumbered = [{node: place for place, node in enumerate(kept[row])} for row in rows]
    return Draft(
        chosen,
        gather_tokens(hidden, torch.tensor(order, device=hidden.device)),
        context.rope_at(places),
        _tree_masks(context, chosen, nodes, most),
        [[renumbered[row].get(node, -1) for node in ran[row]] for row in rows],
        [[renumbered[row].get(node, -1) for node in in_twig[row]] for row in rows],
    )


def _run_nodes(
    context: Context,
    trees: Sequence[Tree],
    ran: list[list[int]],
    new: Sequence[Sequence[int]],
    indices: Sequence[int],
) -> tuple[Tensor, TokenInputs, Masks]:
    """Run nodes through the trunk, whose caches hold those that ran before, and note them: states, rope and masks."""
    count = max(map(len, new))
    whole = [filled(nodes, count, with_node=-1) for nodes in new]
    for row, nodes in enumerate(whole):
        ran[row] += nodes
    tokens = [[tree.tokens[max(node, 0)] for node in nodes] for tree, nodes in zip(trees, whole, strict=True)]
    places = [
        [index + tree.depths[max(node, 0)] for node in nodes]
        for index, tree, nodes in zip(indices, trees, whole, strict=True)
    ]
    masks = context.masks if len(ran[0]) == 1 else _tree_masks(context, trees, ran, count)
    rope = context.rope_at(places)
    return context.trunk(torch.tensor(tokens, device=rope.cos.device), rope, masks), rope, masks


def _tree_masks(context: Context, trees: Sequence[Tree], order: Sequence[Sequence[int]], new: int) -> TreeMasks:
    """Masks of the last `new` of nodes that stand in this order."""
    count = len(order[0])
    seen = [
        (row, place, other)
        for row, (tree, nodes) in enumerate(zip(trees, order, strict=True))
        for place, others in enumerate(ancestors(tree, nodes))
        for other in others
    ]
    mask = torch.zeros(len(order), count, count, dtype=torch.bool)
    mask[tuple(torch.tensor(seen).T)] = True
    mask = mask[:, count - new :].to(context.rope.cos.device)
    return TreeMasks(context.base.attention, mask, context.rope.cos.dtype)


def _real(nodes: Sequence[int]) -> list[int]:
    return [node for node in nodes if node >= 0]
