"""Prompts through the base (§3.3): everything as far as layer K, then from cut to cut what is left of it."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from twigvlm.base.masks import Masks
from twigvlm.base.packing import valid_mask
from twigvlm.base.token_inputs import join_tokens, slice_tokens
from twigvlm.base.vlm import BaseVLM
from twigvlm.engine.row import Row
from twigvlm.kv.cache import CacheView
from twigvlm.pruning.cut import Choice, Cut, Need
from twigvlm.pruning.refocus import RefocusState
from twigvlm.pruning.run import run_cuts
from twigvlm.pruning.view import CutView, Tokens, TrunkOutput
from twigvlm.speculation.batch import RowState
from twigvlm.speculation.draft import Draft
from twigvlm.twig.block import Twig


class Prefill:
    """Runs the prompts of newly admitted rows through the base, cutting visual tokens on the way.

    Args:
        base: the base.
        twig: its twig.
        masks: masks of the prompts.
        rows: rows whose prompts lie in one batch, and are cut at the same layers by one pruner; one row where there is a prefix
            cache.
        view: view of the cache's rows that get keys and values.
    """

    def __init__(self, base: BaseVLM, twig: Twig, masks: Masks, rows: Sequence[Row], view: CacheView) -> None:
        self.base, self.twig, self.masks, self.rows, self.view = base, twig, masks, rows, view
        self.prompt = rows[0].prompt.rows([row.index for row in rows])
        self.pruner, layer = rows[0].pruner, twig.config.trunk_layers
        self.early = [[cut for cut in row.cuts if cut.layer < layer] for row in rows]
        self.at_trunk = [[cut for cut in row.cuts if cut.layer == layer] for row in rows]
        self.late = [[cut for cut in row.cuts if cut.layer > layer] for row in rows]
        self.keep_last_input = self.pruner is not None and Need.LAST_LAYER in self.pruner.needs

    def run_trunk(self) -> TrunkOutput:
        """Run layers 1..K on the prompts, without the beginning that a prefix cache knows."""
        base, twig, prompt, layers = self.base, self.twig, self.prompt, self.twig.config.trunk_layers
        tokens = Tokens(prompt.hidden, base.token_inputs(prompt), prompt.visual_mask, prompt.lengths)
        prefix = self.rows[0].prefix
        if prefix is None or any(self.early) or self.keep_last_input:
            tokens = self._run(tokens, None, 0, layers, self.early, self.keep_last_input)
            return TrunkOutput(base, twig, prompt, tokens, self.masks, self.view, None)
        known = self.rows[0].cached = prefix.known(prompt.input_ids)
        prefix.load(base, twig, self.view, known)
        hidden = tokens.hidden[:, known:]
        if hidden.shape[1]:
            new = slice_tokens(tokens.inputs, known, tokens.hidden.shape[1])
            hidden = base.run_layers(hidden, 0, layers, new, self.masks, self.view)
        if prefix.hidden is not None:
            hidden = torch.cat((prefix.hidden[:, :known], hidden), dim=1)
        prefix.store_trunk(self.view, layers, prompt, hidden, known)
        tokens = Tokens(hidden, tokens.inputs, tokens.visual, tokens.lengths)
        return TrunkOutput(base, twig, prompt, tokens, self.masks, self.view, prefix)

    def cut(self, trunk: TrunkOutput) -> Tokens:
        """The tokens that are left after the cut that follows layer K (Eq. 3 or 8, or another method's ranking).

        Raises:
            TwigVLMError: the pruner cannot choose, or keeps another number of tokens than its schedule says.
        """
        layers = self.twig.config.trunk_layers
        return self._run(trunk.tokens, trunk, layers, layers, self.at_trunk)

    def run_pruned_layers(self, tokens: Tokens, trunk: TrunkOutput, drafts: bool) -> Tokens:
        """Run layers K+1..L with their cuts; stores what refocusing needs of the last layers.

        Args:
            tokens: tokens after layer K and its cut.
            trunk: the prompts before that cut.
            drafts: whether drafts stand behind the prompts, allowed only if no later cut ranks by the last token.

        Raises:
            TwigVLMError: as for `cut`.
        """
        layers = self.twig.config.trunk_layers, self.base.num_layers
        left = self._run(tokens, trunk, *layers, self.late, self.keep_last_input and not drafts)
        for index, row in enumerate(self.rows):
            state = row.refocus_state
            if state is not None and state.pruned.layers[1] < self.base.num_layers:
                state.hold_late(left, index, row.length, self.base.num_layers)
        return left

    @property
    def takes_drafts(self) -> bool:
        """Whether drafts may stand behind the prompts: not if a later cut ranks by the last token of a prompt."""
        ranks_once = getattr(self.pruner, "ranks_once", False)
        return bool(ranks_once) or not any(cut.keep for row in self.late for cut in row)

    def store_refocus_states(self, trunk: TrunkOutput) -> None:
        """Store in each row the visual tokens that it can look at again: none without `refocus`, or if all of them were kept."""
        for index, row in enumerate(self.rows):
            if row.refocus is None or row.kept is None or bool(row.kept.eq(trunk.tokens.visual[index]).all()):
                continue
            final_wipe = row.cuts[1].layer if len(row.cuts) > 1 else self.base.num_layers
            row.refocus_state = RefocusState.of(trunk, index, row.kept, row.refocus, final_wipe)

    def _run(
        self,
        tokens: Tokens,
        trunk: TrunkOutput | None,
        start: int,
        stop: int,
        cuts: Sequence[Sequence[Cut]],
        keep_last_input: bool = False,
    ) -> Tokens:
        def choose(tokens: Tokens, layer: int, keep: Sequence[int]) -> Bool[Tensor, "batch tokens"] | Choice:
            assert self.pruner is not None, "there are cuts"
            chosen = self.pruner.choose(CutView(self.base, self.prompt, layer, tokens, trunk), keep)
            stays = chosen.stays if isinstance(chosen, Choice) else chosen
            for row, kept in zip(self.rows, stays, strict=True):
                row.kept = kept if row.kept is None else row.kept  # what passes a prompt's first cut
            return chosen

        return run_cuts(
            self.base, tokens, start, stop, cuts, choose, self.masks, self.view, self.prompt, keep_last_input
        )


def append_drafts(tokens: Tokens, draft: Draft, state: RowState) -> tuple[Tokens, Int[Tensor, " rows"]]:
    """Append drafts to their prompts, so that one pass takes both through layers K+1..L.

    Args:
        tokens: the prompts, whose last tokens are the roots of the drafts and so are dropped.
        draft: the drafts.
        state: state of the rows.

    Returns:
        The tokens, and the number of nodes of each row, the root included.
    """
    prompt = valid_mask(tuple(length - 1 for length in tokens.lengths), tokens.hidden.shape[1], tokens.hidden.device)
    positions = state.prompt_length[:, None] - 1 + draft.nodes.depths
    both = Tokens(
        torch.cat((tokens.hidden, draft.hidden), dim=1),
        join_tokens(tokens.inputs, draft.inputs, positions),
        torch.nn.functional.pad(tokens.visual, (0, draft.hidden.shape[1])),
        tokens.lengths,
        None if tokens.index is None else torch.cat((tokens.index, positions), dim=1),
    )
    return both.keep(torch.cat((prompt, draft.nodes.valid), dim=1)), draft.nodes.valid.sum(dim=1)
