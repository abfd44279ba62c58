"""Drafting with trunk and twig (Algorithm 1, first half)."""

from collections.abc import Container
from dataclasses import dataclass, field

import torch
from torch import Tensor

from twigvlm.base.cache import LayeredCache
from twigvlm.base.masks import Masks
from twigvlm.base.positions import Rope, slice_rope
from twigvlm.base.vlm import BaseVLM
from twigvlm.twig.block import Twig


@dataclass
class Context:
    """One request while it decodes."""

    base: BaseVLM
    twig: Twig
    masks: Masks
    cache: LayeredCache
    rope: Rope
    """(cos, sin) of all new tokens, computed once: entry i is the i-th generated token's."""
    pending: list[Tensor] = field(default_factory=list)
    """Layer-K states of the newest accepted tokens that the twig has not seen yet."""


@dataclass(frozen=True)
class Draft:
    """Drafted tokens, and the layer-K states of the token before them and of themselves."""

    tokens: list[int]
    hidden: list[Tensor]
    """len(tokens) + 1 states [batch, 1, width]: the base verifies from these, without the trunk."""


def draft_chain(context: Context, token: int, index: int, limit: int, threshold: float, ends: Container[int]) -> Draft:
    """Draft up to `limit` tokens after `token`, the `index`-th generated one (from 0).

    Ends early after a token whose probability (within the draft vocabulary) is below `threshold`, and after an end
    token. The twig's cache gets all but the last drafted token; trunk caches get all.
    """
    base, twig = context.base, context.twig
    tokens: list[int] = []
    states: list[Tensor] = []
    device = context.rope[0].device
    more = limit > 0
    while True:
        at = index + len(tokens)
        embedded = base.embed(torch.tensor([[token]], device=device))
        rope = slice_rope(context.rope, at, at + 1)
        state = base.run_layers(embedded, 0, twig.config.trunk_layers, rope, context.masks, context.cache)
        states.append(state)
        if not more:
            return Draft(tokens, states)
        if context.pending:  # a draft accepted whole left its last token: the twig takes both in one pass
            rope = slice_rope(context.rope, at - len(context.pending), at + 1)
            state = torch.cat((*context.pending, state), dim=1)
            context.pending = []
        logits = twig.logits(twig(state, rope, context.masks, context.cache)[0, -1]).float()
        best, draft_index = logits.max(dim=-1)
        # one transfer for both: the probability of the best token is exp(best - logsumexp)
        probability, position = torch.stack(((best - logits.logsumexp(dim=-1)).exp(), draft_index.float())).tolist()
        ids = twig.draft_token_ids
        token = int(position) if ids is None else int(ids[int(position)])
        tokens.append(token)
        more = len(tokens) < limit and probability >= threshold and token not in ends
