"""What an engine runs on the device: prompts into the cache, drafts, and their verification (Algorithms 1 and 2)."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from twigvlm.base.packing import last_token, valid_mask
from twigvlm.base.prompt import Prompt
from twigvlm.base.token_inputs import join_tokens, slice_tokens
from twigvlm.base.vlm import BaseVLM
from twigvlm.config import SpeculationConfig
from twigvlm.engine.protocol import Step
from twigvlm.engine.row import Row
from twigvlm.engine.sampling import Chooser
from twigvlm.kv.cache import CacheView
from twigvlm.pruning.cut import Choice, Cut, Need
from twigvlm.pruning.refocus import Sight
from twigvlm.pruning.run import Choose, run_cuts
from twigvlm.pruning.view import CutView, Tokens, TrunkOutput
from twigvlm.speculation.batch import NO_TOKEN, Batch, RowState, eos_table
from twigvlm.speculation.costs import StepCosts
from twigvlm.speculation.draft import Committed, Draft, Rescore, commit, commit_draft, draft
from twigvlm.speculation.nodes import Nodes
from twigvlm.speculation.policies import DraftPolicy
from twigvlm.speculation.walk import Accepted, walk
from twigvlm.speculation.ways import make_policy
from twigvlm.twig.block import Twig


class EagerRunner:
    """The reference: runs the base's layers one by one, on views of what the cache holds.

    Args:
        base: the base.
        twig: its twig.
        speculation: how to draft.
        costs: of this machine, which `auto` needs.
        reserve: tokens that the cache has room for beyond what first filled it.
        static: whether passes have shapes that do not depend on what was drafted, so that a step reads from the device only once;
            None: where the base is not on the CPU.
    """

    def __init__(
        self,
        base: BaseVLM,
        twig: Twig,
        speculation: SpeculationConfig,
        costs: StepCosts | None,
        reserve: int,
        static: bool | None = None,
    ) -> None:
        self.base, self.twig, self.speculation = base, twig, speculation
        self.exact = base.device.type == "cpu" if static is None else not static
        self.batch = Batch(base, twig, reserve + speculation.step_tokens)
        self.policy = make_policy(speculation, costs, self.exact)
        self.rows: list[Row] = []
        self.chooser = Chooser([], base.device)

    def prefill(self, rows: Sequence[Row]) -> Step:
        """Trunk with everything, then the layers between the cuts, each with the tokens that are left (§3.3).

        Drafts from the prompts' last tokens, chains in any case, are verified in the same pass, which saves one of each answer.
        """
        cache = self.batch.cache
        claimed = cache.claim(len(rows))
        try:
            trunk, tokens, cuts = self._trunk(rows, cache.view(claimed))
            defer = self._defer(trunk, alone=claimed.start == 0 and len(rows) == 1)
            if self.policy.uses_twig and not defer and not trunk.in_twig:
                trunk.fill_twig()
            policy = DraftPolicy() if defer else self.policy.behind_prompts(len(rows))
            part, step = self._first_step(rows, claimed, trunk, tokens, cuts, policy)
            self.batch.join(part, trunk if defer else None)
        except BaseException:
            for index in reversed(range(claimed.start, claimed.stop)):
                cache.release(index)
            raise
        self.policy.join(len(rows), trunk.tokens.lengths[0] if defer else 0)
        self.rows += rows
        self.chooser = Chooser(self.rows, self.base.device)
        return step

    def _trunk(self, rows: Sequence[Row], view: CacheView) -> tuple[TrunkOutput, Tokens, list[Sequence[Cut]]]:
        """The prompts after layer K, what is left of them after a cut there, and the cuts that follow."""
        base, twig, trunk_layers = self.base, self.twig, self.twig.config.trunk_layers
        pruner, prefix = rows[0].pruner, rows[0].prefix
        prompt = rows[0].prompt.rows([row.index for row in rows])
        tokens = Tokens(prompt.hidden, base.token_inputs(prompt), prompt.visual_mask, prompt.lengths)
        masks = self.batch.masks
        early = [[cut for cut in row.cuts if cut.layer < trunk_layers] for row in rows]
        in_two = pruner is not None and Need.LAST_LAYER in pruner.needs
        if prefix is None or any(early) or in_two:
            prefix = None
            choose = self._choose(rows, prompt, None)
            tokens = run_cuts(base, tokens, 0, trunk_layers, early, choose, masks, view, prompt, in_two)
        else:
            known = prefix.known(prompt.input_ids)
            prefix.load(base, twig, view, known)
            new = slice_tokens(tokens.inputs, known, tokens.hidden.shape[1])
            hidden = tokens.hidden[:, known:]
            if hidden.shape[1]:
                hidden = base.run_layers(hidden, 0, trunk_layers, new, masks, view)
            if prefix.hidden is not None:
                hidden = torch.cat((prefix.hidden[:, :known], hidden), dim=1)
            prefix.store_trunk(view, trunk_layers, prompt, hidden, known)
            tokens = Tokens(hidden, tokens.inputs, tokens.visual, tokens.lengths)
        trunk = TrunkOutput(base, twig, prompt, tokens, masks, view, prefix)
        late = [row.cuts[len(cuts) :] for row, cuts in zip(rows, early, strict=True)]
        here = [[cut for cut in cuts if cut.layer == trunk_layers] for cuts in late]
        choose = self._choose(rows, prompt, trunk)
        left = run_cuts(base, tokens, trunk_layers, trunk_layers, here, choose, masks, view, prompt)
        return trunk, left, [cuts[len(at_trunk) :] for cuts, at_trunk in zip(late, here, strict=True)]

    def _choose(self, rows: Sequence[Row], prompt: Prompt, trunk: TrunkOutput | None) -> Choose:
        """The rows' pruner as `run_cuts` asks it; what passes a prompt's first cut is noted."""

        def choose(tokens: Tokens, layer: int, keep: Sequence[int]) -> Bool[Tensor, "batch tokens"] | Choice:
            pruner = rows[0].pruner
            assert pruner is not None, "there are cuts"
            chosen = pruner.choose(CutView(self.base, prompt, layer, tokens, trunk), keep)
            stays = chosen.stays if isinstance(chosen, Choice) else chosen
            for row, kept in zip(rows, stays, strict=True):
                row.kept = kept if row.kept is None else row.kept
            return chosen

        return choose

    def _first_step(
        self,
        rows: Sequence[Row],
        claimed: slice,
        trunk: TrunkOutput,
        tokens: Tokens,
        cuts: list[Sequence[Cut]],
        policy: DraftPolicy,
    ) -> tuple[Batch, Step]:
        """The layers after the trunk, with drafts behind the prompts where that is possible, and the rows' first tokens."""
        base, batch, trunk_layers = self.base, self.batch, self.twig.config.trunk_layers
        for row, position in zip(rows, trunk.prompt.next_positions, strict=True):
            row.next_position = position
        ends = torch.tensor(trunk.tokens.lengths, device=base.device)[:, None] - 1
        roots = last_token(trunk.prompt.input_ids[..., None], trunk.prompt.lengths)[:, 0]
        sights = [self._sight(row, trunk, index) for index, row in enumerate(rows)]
        part = batch.newcomers(claimed.start, self._state(rows, roots, trunk.prompt), sights, trunk)
        chooser = Chooser(rows, base.device)
        choose = self._choose(rows, trunk.prompt, trunk)
        # A later cut may rank by the last token of the prompt.
        ranks_again = not getattr(rows[0].pruner, "ranks_once", False) and any(cut.keep for row in cuts for cut in row)
        drafts = policy.depth > 0 and not ranks_again
        drafts = drafts and not bool(trunk.tokens.visual.gather(1, ends).any())
        if not drafts:
            in_two = any(row.pruner is not None and Need.LAST_LAYER in row.pruner.needs for row in rows)
            where = (trunk.masks, trunk.view, trunk.prompt, in_two)
            left = run_cuts(base, tokens, trunk_layers, base.num_layers, cuts, choose, *where)
            self._note_late(rows, sights, left)
            first = chooser.choose(base.logits(left.last)[:, None])
            accepted = walk(Nodes.rooted(roots), 0, first)
            self._advance(part, accepted, rows)
            return part, Step(accepted.tokens.tolist(), [0] * len(rows))
        # The prompts' last tokens are the roots: trunk and twig see them once more, as they see a newest token.
        again = [(0, trunk_layers)] if trunk_layers else []
        if policy.uses_twig or part.refocus is not None:
            again.append((self.twig.first_slot, self.twig.last_slot + 1))
        for start, stop in again:
            batch.cache.advance(start, stop, claimed, -1)
        furthest = max(row.next_position for row in rows) + policy.depth
        drafted = draft(part, policy, self._rescore(chooser), furthest, self.exact)
        joined, nodes = _behind(tokens, drafted, part)
        left = run_cuts(base, joined, trunk_layers, base.num_layers, cuts, choose, trunk.masks, trunk.view)
        self._note_late(rows, sights, left)
        last = torch.tensor(left.lengths, device=base.device)[:, None] - nodes[:, None]
        place = (last + torch.arange(drafted.nodes.tokens.shape[1], device=base.device)).clamp(
            max=left.hidden.shape[1] - 1
        )
        logits = base.logits(torch.take_along_dim(left.hidden, place[..., None], dim=1))
        committed, on_host = self._walk(part, drafted, chooser, logits)
        dropped = committed.accepted.counts - nodes
        batch.cache.advance(trunk_layers, base.num_layers, claimed, on_host[:, 0] - on_host[:, 2] - 1, dropped)
        commit_draft(part, policy, drafted, committed, on_host)
        self._advance(part, committed.accepted, rows)
        return part, _step(on_host)

    def _defer(self, trunk: TrunkOutput, alone: bool) -> bool:
        """Whether only the first draft that pays shall show the prompt to the twig."""
        return self.speculation.speculate == "auto" and alone and not trunk.in_twig

    def _sight(self, row: Row, trunk: TrunkOutput, index: int) -> Sight | None:
        """What a row can look at again; None: it does not, or nothing was pruned of its prompt."""
        if row.refocus is None or row.kept is None or bool(row.kept.eq(trunk.tokens.visual[index]).all()):
            return None
        final_wipe = row.cuts[1].layer if len(row.cuts) > 1 else self.base.num_layers
        return Sight.of(trunk, index, row.kept, row.refocus, final_wipe)

    def _note_late(self, rows: Sequence[Row], sights: Sequence[Sight | None], left: Tokens) -> None:
        """What the last layers hold of prompts that may be looked at again."""
        for index, (row, sight) in enumerate(zip(rows, sights, strict=True)):
            if sight is not None and sight.pruned.layers[1] < self.base.num_layers:
                sight.hold_late(left, index, row.length, self.base.num_layers)

    def _state(self, rows: Sequence[Row], newest: Int[Tensor, " rows"], prompt: Prompt) -> RowState:
        """Rows without new tokens, whose newest are the prompts' last."""
        numbers = [(min(row.max_new_tokens, 2**40), row.next_position, row.length) for row in rows]
        limit, position, length = torch.tensor(numbers, device=newest.device).unbind(dim=1)
        eos = eos_table([row.eos_token_ids for row in rows], newest.device)
        ids = prompt.input_ids[:, :0]
        if self.policy.reads_ids:
            ids = prompt.input_ids.long().masked_fill(prompt.visual_mask, NO_TOKEN)
        return RowState(newest, torch.zeros_like(newest), limit, position, length, eos, ids)

    def draft(self) -> Draft:
        """The drafts of all rows, by the engine's policy."""
        furthest = max(row.next_position + len(row.tokens) for row in self.rows) + self.policy.depth
        return draft(self.batch, self.policy, self._rescore(self.chooser), furthest, self.exact)

    def _rescore(self, chooser: Chooser) -> Rescore:
        ids = self.twig.draft_token_ids if self.policy.uses_twig else None
        return lambda logits, depths, deepest: chooser.rescore(logits, depths, deepest, ids)

    def verify(self, draft: Draft) -> Step:
        """Layers K+1..L on all drafts in one pass; of each row the longest path that the base agrees with stays in the caches."""
        base, batch, trunk = self.base, self.batch, self.twig.config.trunk_layers
        self._look_again(draft)
        view = batch.cache.view(batch.rows)
        hidden = base.run_layers(draft.hidden, trunk, base.num_layers, draft.inputs, draft.masks, view)
        committed, on_host = self._walk(batch, draft, self.chooser, base.logits(hidden))
        commit(batch, self.policy, draft, committed, on_host)
        self.policy.learn(on_host[:, 0] - 1)
        self._advance(batch, committed.accepted, self.rows)
        return _step(on_host)

    def _look_again(self, draft: Draft) -> None:
        """Rows whose newest token asks for it choose their visual tokens again."""
        refocus = self.batch.refocus
        if refocus is None:
            return
        assert draft.scores is not None, "rows look again"
        roots = draft.scores[:, 0]
        asks = refocus.asks(roots[:, None])[:, 0].tolist()
        for index, row in enumerate(self.rows):
            if not asks[index]:
                continue
            look = refocus.look(self.base, self.batch.cache, index, roots[index], len(row.tokens))
            if look is not None:
                row.looks.append(look)

    def _walk(
        self, batch: Batch, draft: Draft, chooser: Chooser, logits: Tensor
    ) -> tuple[Committed, Int[np.ndarray, "rows numbers"]]:
        go_on = chooser.go_on if chooser.stops_early else None
        nodes = draft.nodes
        if batch.refocus is not None and draft.depth:
            assert draft.scores is not None, "rows look again"
            nodes = nodes.without(batch.refocus.asks(draft.scores))  # what follows needs another look first
        committed = Committed.of(draft, walk(nodes, draft.depth, chooser.choose(logits), go_on))
        return committed, committed.to_host()

    def _advance(self, batch: Batch, accepted: Accepted, rows: Sequence[Row]) -> None:
        assert batch.state is not None, "there are rows"
        longest = max(row.length + len(row.tokens) for row in rows) if self.policy.reads_ids else 0
        batch.state.advance(accepted, longest + accepted.tokens.shape[1])

    def leave(self, row: int) -> None:
        """Drop a row; the last one takes its place."""
        self.batch.leave(row)
        self.policy.leave(row)
        self.rows[row] = self.rows[-1]
        self.rows.pop()
        self.chooser = Chooser(self.rows, self.base.device)


def _step(on_host: Int[np.ndarray, "rows numbers"]) -> Step:
    return Step([numbers[3 : 3 + numbers[0]].tolist() for numbers in on_host], on_host[:, 2].tolist())


def _behind(tokens: Tokens, draft: Draft, part: Batch) -> tuple[Tokens, Int[Tensor, " rows"]]:
    """Tokens of prompts, the last ones given way to drafts that begin with them; and how many nodes each row has."""
    assert part.state is not None, "there are rows"
    prompt = valid_mask(tuple(length - 1 for length in tokens.lengths), tokens.hidden.shape[1], tokens.hidden.device)
    positions = part.state.prompt_length[:, None] - 1 + draft.nodes.depths
    both = Tokens(
        torch.cat((tokens.hidden, draft.hidden), dim=1),
        join_tokens(tokens.inputs, draft.inputs, positions),
        torch.nn.functional.pad(tokens.visual, (0, draft.hidden.shape[1])),
        tokens.lengths,
        None if tokens.index is None else torch.cat((tokens.index, positions), dim=1),
    )
    return both.keep(torch.cat((prompt, draft.nodes.valid), dim=1)), draft.nodes.valid.sum(dim=1)
