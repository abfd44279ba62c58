"""What drafting and verifying share: the answers that are being decoded, and what trunk and twig say of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from twigvlm.base.masks import Masks
from twigvlm.base.token_inputs import TokenInputs, select_rows, select_tokens
from twigvlm.base.vlm import BaseVLM
from twigvlm.config import SpeculationConfig
from twigvlm.engine.prefill import TrunkOutput
from twigvlm.engine.sampling import Noise, draft_scores
from twigvlm.kv.cache import KVCache
from twigvlm.pruning.select import gather_tokens
from twigvlm.speculation.policies import Policy
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
    cache: KVCache
    rope: TokenInputs
    """Of all new tokens, computed once: entry i is the i-th generated token's."""
    noises: list[Noise | None]
    """That the base chooses with; None: greedy."""
    unseen: TrunkOutput | None = None
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

    def rope_at(self, places: Sequence[Sequence[int]]) -> TokenInputs:
        """Of each row's new tokens at these places."""
        # what stands for nothing may be behind the last place
        last = self.rope.cos.shape[1] - 1
        indices = [[min(place, last) for place in row] for row in places]
        return select_tokens(self.rope, torch.tensor(indices, device=self.rope.cos.device))

    def trunk(
        self, tokens: Int[Tensor, "batch nodes"], rope: TokenInputs, masks: Masks
    ) -> Float[Tensor, "batch nodes width"]:
        """States after layer K."""
        return self.base.run_layers(self.base.embed(tokens), 0, self.twig.config.trunk_layers, rope, masks, self.cache)

    def twig_logits(
        self, state: Float[Tensor, "batch nodes width"], rope: TokenInputs, masks: Masks, indices: Sequence[int]
    ) -> Float[Tensor, "batch nodes draft_vocabulary"]:
        """The twig's logits after states of layer K; a draft's first are those of its roots, the `indices[row]`-th tokens."""
        if self.unseen is not None:
            self.unseen.grow()
            self.unseen = None
        if any(self.pending):
            return self.twig.logits(self._catch_up(state, indices)).float()
        return self.twig.logits(self.twig(state, rope, masks, self.cache)).float()

    def _catch_up(self, roots: Tensor, indices: Sequence[int]) -> Tensor:
        """Run the twig on what it has not seen yet, and on the root of a draft after it, in one pass; its states of the roots."""
        late = [len(states) for states in self.pending]
        most = max(late) + 1
        rows = [
            torch.cat((*states, *[root] * (most - len(states))))
            for states, root in zip(self.pending, roots, strict=True)
        ]
        rope = self.rope_at(
            [range(index - count, index - count + most) for index, count in zip(indices, late, strict=True)]
        )
        hidden = self.twig(torch.stack(rows), rope, self.masks, self.cache)
        seen = [list(range(count + 1)) for count in late]
        self.cache.keep(self.twig.first_slot, self.twig.last_slot + 1, most, seen)
        self.pending = [[] for _ in late]
        return gather_tokens(hidden, torch.tensor(late, device=hidden.device)[:, None])

    def scores(
        self, logits: Float[Tensor, "batch nodes draft_vocabulary"], places: Sequence[Sequence[int]]
    ) -> Float[Tensor, "batch nodes draft_vocabulary"]:
        """Log-probabilities to draft by, of tokens at these places of each row."""
        ids = self.twig.draft_token_ids
        return torch.stack([draft_scores(*row, ids) for row in zip(logits, places, self.noises, strict=True)])

    def token_ids(self, positions: Int[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """Ids of tokens by their places in the draft vocabulary; floats (exact up to 2^24), to travel with probabilities."""
        ids = self.twig.draft_token_ids
        return (positions if ids is None else ids[positions]).float()
