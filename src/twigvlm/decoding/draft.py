"""Drafting with trunk and twig: chains (Algorithm 1, first half) or trees (Algorithm 2, first half), one for each row.

Rows of a batch draft differently much. What runs for one row only runs for the others too, on tokens that stand for
nothing: their place in a list of nodes is -1, nobody sees them, and caches drop them with the rest of the draft.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from twigvlm.base.cache import LayeredCache
from twigvlm.base.masks import Masks, TreeMasks
from twigvlm.base.positions import Rope, select_rope, select_rows
from twigvlm.base.vlm import BaseVLM
from twigvlm.config import SpeculationConfig
from twigvlm.decoding.policy import Policy
from twigvlm.decoding.prefill import Trunk
from twigvlm.decoding.sampling import Noise, draft_scores
from twigvlm.decoding.tree import Tree, ancestors
from twigvlm.pruning.select import gather_tokens
from twigvlm.twig.block import Twig


@dataclass
class Context:
    """The answers that are being decoded, one a row."""

    base: BaseVLM
    twig: Twig
    speculation: SpeculationConfig
    policies: list[Policy]
    """Of trees."""
    ends: frozenset[int]
    """End-of-sequence ids: nothing is drafted after them."""
    masks: Masks
    cache: LayeredCache
    rope: Rope
    """Of all new tokens, computed once: entry i is the i-th generated token's."""
    noises: list[Noise | None]
    """That the base chooses with; None: greedy."""
    unseen: Trunk | None = None
    """The prompt, until the twig has seen it."""
    pending: list[list[Tensor]] = field(default_factory=list)
    """Layer-K states [1, width] of each row's newest accepted tokens that the twig has not seen yet."""

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        self.cache.select(rows)
        self.rope = select_rows(self.rope, rows)
        self.policies = [self.policies[row] for row in rows]
        self.noises = [self.noises[row] for row in rows]
        self.pending = [self.pending[row] for row in rows]
        for policy in self.policies:
            policy.share(len(rows))

    def rope_at(self, places: Sequence[Sequence[int]]) -> Rope:
        """Of each row's new tokens at these places."""
        # what stands for nothing may be behind the last place
        last = self.rope.cos.shape[1] - 1
        indices = [[min(place, last) for place in row] for row in places]
        return select_rope(self.rope, torch.tensor(indices, device=self.rope.cos.device))


@dataclass(frozen=True)
class Draft:
    """Drafted tokens after the last accepted one (the root), and what layers K+1..L need to verify all of them."""

    trees: list[Tree]
    """Of each row."""
    hidden: Float[Tensor, "batch nodes width"]
    """Layer-K states of the nodes: the base verifies from these, without the trunk."""
    rope: Rope
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
        states.append(_trunk(context, newest, rope, context.masks))
        if not any(going):
            break
        logits = _twig_logits(context, states[-1], rope, context.masks, indices)
        scores = _scores(context, logits, [[index + len(states)] for index in indices])[:, 0]
        best, position = scores.max(dim=-1)
        # one transfer for both
        for row, (score, drafted) in enumerate(torch.stack((best, _token_ids(context.twig, position)), -1).tolist()):
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
        [_nodes(len(tree), passes) for tree in trees],
        [_nodes(len(tree), passes - 1) for tree in trees],
    )


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
        logits = _twig_logits(context, state, rope, masks, indices)
        count = logits.shape[1]
        places = [
            [indices[row] + trees[row].depths[node] + 1 for node in _filled(levels[row], count, with_node=0)]
            for row in rows
        ]
        scores = _scores(context, logits, places)
        best = scores.topk(min(context.speculation.tree_width, scores.shape[-1]))
        children = torch.stack((best.values, _token_ids(context.twig, best.indices)), dim=-1).tolist()
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
    order = [_filled([ran[row].index(node) for node in kept[row]], most, with_node=0) for row in rows]
    chosen = [trees[row].take(kept[row]) for row in rows]
    places = [
        [index + depth for depth in _filled(tree.depths, most, 0)] for index, tree in zip(indices, chosen, strict=True)
    ]
    nodes = [_nodes(len(tree), most) for tree in chosen]
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
) -> tuple[Tensor, Rope, Masks]:
    """Run nodes through the trunk, whose caches hold those that ran before, and note them: states, rope and masks."""
    count = max(map(len, new))
    filled = [_filled(nodes, count, with_node=-1) for nodes in new]
    for row, nodes in enumerate(filled):
        ran[row] += nodes
    tokens = [[tree.tokens[max(node, 0)] for node in nodes] for tree, nodes in zip(trees, filled, strict=True)]
    places = [
        [index + tree.depths[max(node, 0)] for node in nodes]
        for index, tree, nodes in zip(indices, trees, filled, strict=True)
    ]
    masks = context.masks if len(ran[0]) == 1 else _tree_masks(context, trees, ran, count)
    rope = context.rope_at(places)
    return _trunk(context, torch.tensor(tokens, device=rope.cos.device), rope, masks), rope, masks


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


def _trunk(context: Context, tokens: Tensor, rope: Rope, masks: Masks) -> Tensor:
    """States [batch, tokens, width] after layer K."""
    embedded = context.base.embed(tokens)
    return context.base.run_layers(embedded, 0, context.twig.config.trunk_layers, rope, masks, context.cache)


def _twig_logits(context: Context, state: Tensor, rope: Rope, masks: Masks, indices: Sequence[int]) -> Tensor:
    """The twig's logits [batch, tokens, draft vocabulary] after each of the states."""
    if context.unseen is not None:
        context.unseen.grow()
        context.unseen = None
    if any(context.pending):
        return context.twig.logits(_catch_up(context, state, indices)).float()
    return context.twig.logits(context.twig(state, rope, masks, context.cache)).float()


def _catch_up(context: Context, roots: Tensor, indices: Sequence[int]) -> Tensor:
    """Run the twig on what it has not seen yet, and on the root of a draft after it, in one pass; its states of the roots."""
    late = [len(states) for states in context.pending]
    most = max(late) + 1
    rows = [
        torch.cat((*states, *[root] * (most - len(states))))
        for states, root in zip(context.pending, roots, strict=True)
    ]
    rope = context.rope_at(
        [range(index - count, index - count + most) for index, count in zip(indices, late, strict=True)]
    )
    hidden = context.twig(torch.stack(rows), rope, context.masks, context.cache)
    seen = [list(range(count + 1)) for count in late]
    context.cache.keep(context.twig.first_slot, context.twig.last_slot + 1, most, seen)
    context.pending = [[] for _ in late]
    return gather_tokens(hidden, torch.tensor(late, device=hidden.device)[:, None])


def _scores(context: Context, logits: Tensor, places: Sequence[Sequence[int]]) -> Tensor:
    ids = context.twig.draft_token_ids
    return torch.stack([draft_scores(*row, ids) for row in zip(logits, places, context.noises, strict=True)])


def _token_ids(twig: Twig, positions: Tensor) -> Tensor:
    """Ids of tokens by their places in the draft vocabulary; floats (exact up to 2^24), to travel with probabilities."""
    ids = twig.draft_token_ids
    return (positions if ids is None else ids[positions]).float()


def _filled(nodes: Sequence[int], count: int, with_node: int) -> list[int]:
    return [*nodes, *[with_node] * (count - len(nodes))]


def _nodes(count: int, places: int) -> list[int]:
    """The nodes of a tree of so many in their order, cut or filled up to so many places."""
    return _filled(range(min(count, places)), places, with_node=-1)


def _real(nodes: Sequence[int]) -> list[int]:
    return [node for node in nodes if node >= 0]
