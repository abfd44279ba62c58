"""Drafting with trunk and twig: a chain (Algorithm 1, first half) or a tree (Algorithm 2, first half)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from twigvlm.base.cache import LayeredCache
from twigvlm.base.masks import Masks, TreeMasks
from twigvlm.base.positions import Rope, select_rope, slice_rope
from twigvlm.base.vlm import BaseVLM
from twigvlm.config import SpeculationConfig
from twigvlm.decoding.policy import Policy
from twigvlm.decoding.prefill import Trunk
from twigvlm.decoding.tree import Tree, ancestor_mask
from twigvlm.twig.block import Twig


@dataclass
class Context:
    """One request while it decodes."""

    base: BaseVLM
    twig: Twig
    speculation: SpeculationConfig
    policy: Policy
    """Of trees."""
    ends: frozenset[int]
    """End-of-sequence ids: nothing is drafted after them."""
    masks: Masks
    cache: LayeredCache
    rope: Rope
    """Of all new tokens, computed once: entry i is the i-th generated token's."""
    unseen: Trunk | None = None
    """The prompt, until the twig has seen it."""
    pending: list[Tensor] = field(default_factory=list)
    """Layer-K states of the newest accepted tokens that the twig has not seen yet."""


@dataclass(frozen=True)
class Draft:
    """Drafted tokens after the last accepted one (the root), and what layers K+1..L need to verify all of them."""

    tree: Tree
    hidden: Float[Tensor, "1 nodes width"]
    """Layer-K states of the nodes: the base verifies from these, without the trunk."""
    rope: Rope
    masks: Masks
    in_trunk: Sequence[int]
    """The node of each token that trunk caches got for this draft; -1: of one that was cut from the tree."""
    in_twig: Sequence[int]
    """The same for the twig's cache."""

    def keep(self, context: Context, path: Sequence[int]) -> None:
        """Every cache keeps the accepted path (root included) and drops the rest of the draft."""
        cache, trunk, layers = context.cache, context.twig.config.trunk_layers, context.base.num_layers
        cache.keep(0, trunk, len(self.in_trunk), [self.in_trunk.index(node) for node in path])
        cache.keep(trunk, layers, len(self.tree), path)
        seen = [self.in_twig.index(node) for node in path if node in self.in_twig]
        cache.keep(layers, context.twig.last_slot + 1, len(self.in_twig), seen)
        if context.speculation.active:
            context.pending += [self.hidden[:, node : node + 1] for node in path[len(seen) :]]


def draft_chain(context: Context, token: int, index: int, room: int) -> Draft:
    """Draft up to δ tokens after `token`, the `index`-th generated one (from 0), and at most `room`.

    Ends early after a token whose probability (within the draft vocabulary) is below θ, and after an end token. The
    twig's cache gets all but the last drafted token; trunk caches get all.
    """
    tree = Tree.rooted(token)
    states: list[Tensor] = []
    most = min(context.speculation.draft_length, room)
    more = most > 0
    while True:
        at = index + len(states)
        rope = slice_rope(context.rope, at, at + 1)
        states.append(_trunk(context, torch.tensor([tree.tokens[-1:]], device=rope.cos.device), rope, context.masks))
        if not more:
            break
        logits = _twig_logits(context, states[-1], rope, context.masks, index)[0]
        best, position = logits.max(dim=-1)
        # one transfer for both
        score, drafted = torch.stack((best - logits.logsumexp(dim=-1), _token_ids(context.twig, position))).tolist()
        tree.add(int(drafted), len(tree) - 1, score)
        likely = math.exp(score) >= context.speculation.draft_threshold
        more = len(tree) <= most and likely and tree.tokens[-1] not in context.ends
    hidden = torch.cat(states, dim=1) if len(states) > 1 else states[0]
    rope = slice_rope(context.rope, index, index + len(tree))
    return Draft(tree, hidden, rope, context.masks, range(len(tree)), range(len(tree) - 1))


def draft_tree(context: Context, token: int, index: int, room: int) -> Draft:
    """Draft a tree after `token`, the `index`-th generated one (from 0), no deeper than `room`.

    Nodes that the policy chooses run through trunk and twig in one pass and get E children each (probabilities within the
    draft vocabulary; end tokens get none), until it chooses no more; one transfer from the device a pass. Of the whole the
    policy selects what stays; those nodes that no pass ran then run through the trunk, in one.
    """
    policy = context.policy
    tree = Tree.rooted(token)
    able = [0] if room else []
    ran: list[int] = []
    states: list[Tensor] = []
    while level := policy.expand(tree, able, ran):
        ran += level
        state, rope, masks = _run_nodes(context, tree, ran, len(level), index)
        states.append(state)
        scores = _twig_logits(context, state, rope, masks, index).log_softmax(dim=-1)
        best = scores.topk(min(context.speculation.tree_width, scores.shape[-1]))
        children = range(len(tree), len(tree) + best.values.numel())
        rows = torch.stack((best.values, _token_ids(context.twig, best.indices)), dim=-1).tolist()
        for node, row in zip(level, rows, strict=True):
            for score, drafted in row:
                tree.add(int(drafted), node, score)
        fresh = (node for node in children if tree.depths[node] < room and tree.tokens[node] not in context.ends)
        able = [*(node for node in able if node not in level), *fresh]
    in_twig = list(ran)
    kept = policy.select(tree)
    leaves = [node for node in kept if node not in ran]
    if leaves:
        ran += leaves
        states.append(_run_nodes(context, tree, ran, len(leaves), index)[0])
    hidden = torch.cat(states, dim=1)
    order = torch.tensor([ran.index(node) for node in kept], device=hidden.device)
    places = {node: place for place, node in enumerate(kept)}
    chosen = tree.take(kept)
    return Draft(
        chosen,
        hidden.index_select(1, order),
        select_rope(context.rope, torch.tensor([[index + depth for depth in chosen.depths]], device=hidden.device)),
        TreeMasks(context.base.attention, ancestor_mask(chosen, hidden.device), hidden.dtype),
        [places.get(node, -1) for node in ran],
        [places.get(node, -1) for node in in_twig],
    )


def _run_nodes(context: Context, tree: Tree, ran: Sequence[int], new: int, index: int) -> tuple[Tensor, Rope, Masks]:
    """Run the last `new` of the nodes `ran` through the trunk, whose caches hold those before: states, rope and masks."""
    device = context.rope.cos.device
    nodes = ran[-new:]
    tokens, places = torch.tensor(
        [[tree.tokens[node] for node in nodes], [index + tree.depths[node] for node in nodes]], device=device
    )
    masks = context.masks
    if len(ran) > 1:
        ancestors = ancestor_mask(tree.take(ran), device)[-new:]
        masks = TreeMasks(context.base.attention, ancestors, context.rope.cos.dtype)
    rope = select_rope(context.rope, places[None])
    return _trunk(context, tokens[None], rope, masks), rope, masks


def _trunk(context: Context, tokens: Tensor, rope: Rope, masks: Masks) -> Tensor:
    """States [1, tokens, width] after layer K."""
    embedded = context.base.embed(tokens)
    return context.base.run_layers(embedded, 0, context.twig.config.trunk_layers, rope, masks, context.cache)


def _twig_logits(context: Context, state: Tensor, rope: Rope, masks: Masks, index: int) -> Tensor:
    """The twig's logits [tokens, draft vocabulary] after each of the states."""
    count = state.shape[1]
    if context.unseen is not None:
        context.unseen.grow()
        context.unseen = None
    if context.pending:  # accepted since the twig ran last: they enter in one pass with the root, the index-th
        rope = slice_rope(context.rope, index - len(context.pending), index + 1)
        state = torch.cat((*context.pending, state), dim=1)
        context.pending = []
    hidden = context.twig(state, rope, masks, context.cache)[0, -count:]
    return context.twig.logits(hidden).float()


def _token_ids(twig: Twig, positions: Tensor) -> Tensor:
    """Ids of tokens by their places in the draft vocabulary; floats (exact up to 2^24), to travel with probabilities."""
    ids = twig.draft_token_ids
    return (positions if ids is None else ids[positions]).float()
