"""Refocusing: while an answer grows, the kept visual tokens are chosen again where it turns to something else.

Trunk and twig hold all visual tokens for the whole answer, so the twig can rank them at every new token for the price of one
query. Where the kept ones have less than τ of what the best R have, the best of the others take the places of the worst in
layers K+1..K_f, as many as bring the share three quarters of the way from τ to 1: they run from their stored states after
layer K, at their positions in the prompt. The best of them go on into the layers after K_f, if those hold visual tokens. The
rule looks at accepted tokens alone, so that an answer does not depend on how it was drafted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from twigvlm.base.layers import window_of
from twigvlm.base.masks import check_mask_attention, for_attention
from twigvlm.base.token_inputs import TokenInputs, select_rows, select_tokens
from twigvlm.base.vlm import BaseVLM
from twigvlm.config import check_coverage
from twigvlm.errors import TwigVLMError
from twigvlm.kv.cache import KVCache, ReplacingView
from twigvlm.pruning.attention_rows import visual_attention
from twigvlm.pruning.cut import Pruner
from twigvlm.pruning.methods.pruning_head import ranking_keys, ranking_queries
from twigvlm.pruning.methods.twig import TwigPruner
from twigvlm.pruning.select import best_first, gather_tokens
from twigvlm.pruning.view import Tokens, TrunkOutput
from twigvlm.twig.block import Twig

_ROUNDING = 1e-5  # sums of the same scores in another order are no reason to look


class Look(NamedTuple):
    """A later choice of the kept visual tokens."""

    after: int
    """Number of answer tokens before it."""
    kept: Int[Tensor, " keep"]
    """Positions of the kept visual tokens in the prompt, ascending."""
    ran: int
    """How many of them were not kept before and ran through the pruned layers now."""


@dataclass
class HeldTokens:
    """Which tokens of a prompt a range of layers holds in the KV cache; all layers of the range hold the same ones."""

    layers: tuple[int, int]
    """(start, stop): layers start..stop-1, counted from 0."""
    positions: Int[Tensor, " left"]
    """Position in the prompt of each token that is held."""
    slots: Int[Tensor, " visual"]
    """Which of the held tokens each visual token is; -1: none."""

    @property
    def visual(self) -> Bool[Tensor, " visual"]:
        """True at the visual tokens that are held."""
        return self.slots >= 0

    def exchange(
        self,
        base: BaseVLM,
        cache: KVCache,
        row: int,
        gone: Int[Tensor, " new"],
        new: Int[Tensor, " new"],
        states: Float[Tensor, "1 new width"],
        inputs: TokenInputs,
        positions: Int[Tensor, " new"],
    ) -> Float[Tensor, "1 new width"]:
        """Run visual tokens through the layers in the slots of others; returns their states after the layers.

        Args:
            base: the base.
            cache: the cache whose row changes.
            row: row of the cache.
            gone: which visual tokens leave, counted among those of the prompt.
            new: which come in their slots, as many.
            states: states of the new tokens before the layers.
            inputs: inputs of the new tokens.
            positions: positions of the new tokens in the prompt.
        """
        slots = self.slots[gone]
        self.slots[new], self.slots[gone] = slots, -1
        self.positions[slots] = positions
        until = positions if inputs.attends_until is None else inputs.attends_until[0]
        mask = for_attention(base.attention, (self.positions <= until[:, None])[None, None], base.dtype)
        view = ReplacingView(cache, row, slots, len(self.positions))
        return base.run_layers(
            states, *self.layers, inputs._replace(attends_until=None), lambda tokens, held: mask, view
        )


@dataclass
class RefocusState:
    """What one row needs to choose again: all visual tokens of its prompt, of which the pruned layers hold some."""

    threshold: float
    """τ."""
    states: Float[Tensor, "1 visual width"]
    """States of all visual tokens after layer K."""
    inputs: TokenInputs
    """Per-token inputs of all visual tokens."""
    keys: Float[Tensor, "key_heads visual head_dim"]
    """Keys of all visual tokens in the last twig layer, gated where the twig has a P-Head."""
    visual: Int[Tensor, " visual"]
    """Positions of the visual tokens in the prompt."""
    pruned: HeldTokens
    """In layers K+1..K_f."""
    late: HeldTokens | None = None
    """In layers K_f+1..L; None: no visual tokens."""

    @classmethod
    def of(
        cls, trunk: TrunkOutput, row: int, kept: Bool[Tensor, " tokens"], threshold: float, final_wipe: int
    ) -> "RefocusState":
        """The state of a row after the cut that follows layer K.

        Args:
            trunk: the prompts before the cut.
            row: row of the prompt.
            kept: True at the visual tokens that passed the cut.
            threshold: τ.
            final_wipe: K_f.
        """
        twig, tokens = trunk.twig, trunk.tokens
        mask = tokens.visual[row]
        visual = mask.nonzero()[:, 0]
        stays = tokens.text[row] | kept
        pruned = HeldTokens(
            (twig.config.trunk_layers, final_wipe),
            stays.nonzero()[:, 0],
            torch.where(kept, stays.long().cumsum(0) - 1, -1)[visual],
        )
        inputs = select_rows(tokens.inputs, torch.tensor([row], device=mask.device))
        inputs = select_tokens(inputs, visual[None])
        in_twig = gather_tokens(trunk.fill_twig()[row : row + 1], visual[None])
        keys = ranking_keys(twig.layers[-1], twig.pruning_head, in_twig, inputs)
        states = gather_tokens(tokens.hidden[row : row + 1], visual[None])
        return cls(threshold, states, inputs, keys[0], visual, pruned)

    def hold_late(self, left: Tokens, row: int, length: int, layers: int) -> None:
        """Note what layers K_f+1..L hold of the prompt.

        Args:
            left: the tokens that passed all cuts; drafts may follow the prompts.
            row: row of the prompt.
            length: number of tokens of its prompt.
            layers: L.
        """
        assert left.index is not None, "there was a cut"
        positions, visual = left.index[row, : left.lengths[row]], left.visual[row, : left.lengths[row]]
        if bool(visual.any()):
            slots = torch.full_like(self.visual, -1)
            slots[torch.searchsorted(self.visual, positions[visual])] = visual.nonzero()[:, 0]
            self.late = HeldTokens((self.pruned.layers[1], layers), positions[positions < length], slots)

    @property
    def keep(self) -> int:
        """R."""
        return int(self.pruned.visual.sum())


def check_refocus(refocus: float, pruner: Pruner | None, base: BaseVLM, twig: Twig) -> None:
    """Raise TwigVLMError where kept tokens cannot be chosen again.

    Args:
        refocus: τ.
        pruner: the method that chose them; None: nothing is pruned.
        base: the base, whose attention must take a mask.
        twig: the twig that ranks the tokens again.
    """
    check_coverage(refocus)
    if not isinstance(pruner, TwigPruner) or not pruner.ranks_later(twig):
        raise TwigVLMError(
            f"refocus={refocus:g}: this pruning ranks only at the end of the prompt; leave out either it or refocus"
        )
    check_mask_attention(base.attention, f"refocus={refocus:g}")


def exchanged(scores: Float[Tensor, " visual"], held: Bool[Tensor, " visual"], share: float) -> Bool[Tensor, " visual"]:
    """The held tokens after the fewest exchanges that give them this share of what the best ones have.

    Each exchange takes up the best token that is not held for the worst that is, as long as it is better.

    Args:
        scores: scores of all visual tokens.
        held: True at those that are held now.
        share: share, from 0 to 1, of the sum of the highest scores of as many tokens.
    """
    count = int(held.sum())
    best = scores.topk(count).values.sum()
    order = best_first(scores)
    new, old = order[~held[order]][:count], order[held[order]].flip(0)
    gain = (scores[new] - scores[old[: len(new)]]).clamp(min=0)
    short = scores[held].sum() + gain.cumsum(0) < share * best
    number = min(int(short.sum()) + 1, int((gain > 0).sum()))
    after = held.clone()
    after[new[:number]], after[old[:number]] = True, False
    return after


class Refocus:
    """Ranks the visual tokens of all rows of a batch at every step, and exchanges kept ones; row i is row i of the cache.

    Args:
        twig: ranks visual tokens at new tokens, by its P-Head, or without one by its last layer's attention restricted to
            visual tokens. (The ranking of the prompt without a P-Head also weighs how much each head attends to text.)
        rows: the state of each row; None: the row does not look again. At least one row does.
    """

    def __init__(self, twig: Twig, rows: Sequence[RefocusState | None]) -> None:
        self.twig, self.rows = twig, rows
        looking = [row for row in rows if row is not None]
        none = looking[0].visual[:0]
        # Entry i of keys, positions and visible is of row looking[i]: keys are too large to pad the other rows with.
        self.looking = torch.tensor([index for index, row in enumerate(rows) if row is not None], device=none.device)
        self.keys = pad_sequence([row.keys.transpose(0, 1) for row in looking], batch_first=True).transpose(1, 2)
        self.positions = pad_sequence([row.visual for row in looking], batch_first=True)
        counts = torch.tensor([len(row.visual) for row in looking], device=none.device)
        self.visible = torch.arange(self.keys.shape[2], device=none.device) < counts[:, None]
        self.slots = pad_sequence(
            [none if row is None else row.pruned.slots for row in rows], batch_first=True, padding_value=-1
        )
        keep = [0 if row is None else row.keep for row in rows]
        self.max_keep, self.last = max(keep), torch.tensor(keep, device=none.device).sub(1).clamp(min=0)
        thresholds = [0.0 if row is None else row.threshold for row in rows]
        self.threshold = torch.tensor(thresholds, device=none.device)[:, None]

    def scores(self, hidden: Float[Tensor, "rows new width"], inputs: TokenInputs) -> Float[Tensor, "rows new visual"]:
        """Shares of all visual tokens at new tokens; 0 in rows that do not look again.

        Args:
            hidden: the input of the last twig layer.
            inputs: inputs of the new tokens.
        """
        layer, head = self.twig.layers[-1], self.twig.pruning_head
        some = len(self.looking) < len(self.rows)
        if some:
            hidden, inputs = hidden.index_select(0, self.looking), select_rows(inputs, self.looking)
        queries = ranking_queries(layer, head, hidden, inputs)
        visible = self.visible[:, None].expand(-1, hidden.shape[1], -1)
        window = window_of(layer)
        if window is not None and head is None:  # a P-Head looks at all visual tokens
            assert inputs.positions is not None, "the base has windows"
            visible = visible & (self.positions[:, None] > inputs.positions[..., None] - window)
        scaling = cast(Any, layer).self_attn.scaling
        shares = visual_attention(queries, self.keys, scaling, visible).exp()
        if not some:
            return shares
        return shares.new_zeros(len(self.rows), *shares.shape[1:]).index_copy_(0, self.looking, shares)

    def asks(self, scores: Float[Tensor, "rows new visual"]) -> Bool[Tensor, "rows new"]:
        """True at the new tokens at which the kept visual tokens have less than τ of what the best as many have.

        Args:
            scores: from `scores`.
        """
        kept = (scores * (self.slots >= 0)[:, None]).sum(dim=-1)
        best = scores.topk(self.max_keep, dim=-1).values.cumsum(dim=-1)
        best = best.gather(2, self.last[:, None, None].expand(-1, scores.shape[1], 1))[..., 0]
        return kept < self.threshold * best * (1 - _ROUNDING)

    def look(
        self, base: BaseVLM, cache: KVCache, row: int, scores: Float[Tensor, " visual"], after: int
    ) -> Look | None:
        """Let the pruned layers of a row hold better visual tokens in place of some; None if no token is better.

        Args:
            base: the base.
            cache: the cache whose row changes.
            row: row of the cache and of the batch.
            scores: shares of the visual tokens at the newest token.
            after: number of answer tokens so far.
        """
        state = self.rows[row]
        assert state is not None, "it has asked"
        visual, held = state.visual, state.pruned.visual
        kept = exchanged(scores[: len(visual)], held, (3 + state.threshold) / 4)
        new, gone = (kept & ~held).nonzero()[:, 0], (held & ~kept).nonzero()[:, 0]
        if not len(new):
            return None
        inputs, states = select_tokens(state.inputs, new[None]), gather_tokens(state.states, new[None])
        states = state.pruned.exchange(base, cache, row, gone, new, states, inputs, visual[new])
        self.slots[row, : len(visual)] = state.pruned.slots
        if state.late is not None:
            held = state.late.visual
            ranked = scores[: len(visual)].masked_fill(~held.index_fill(0, new, True), float("-inf"))
            stays = torch.zeros_like(held).index_fill(0, ranked.topk(int(held.sum())).indices, True)
            gone, late = (held & ~stays).nonzero()[:, 0], (stays & ~held).nonzero()[:, 0]
            if len(late):
                chosen = torch.searchsorted(new, late)[None]
                states, inputs = gather_tokens(states, chosen), select_tokens(inputs, chosen)
                state.late.exchange(base, cache, row, gone, late, states, inputs, visual[late])
        return Look(after, visual[kept], len(new))
