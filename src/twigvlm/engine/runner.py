"""What an engine runs on the device: prompts into the cache, drafts, and their verification (Algorithms 1 and 2)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from twigvlm.base.packing import last_token
from twigvlm.base.prompt import Prompt
from twigvlm.base.vlm import BaseVLM
from twigvlm.config import SpeculationConfig
from twigvlm.engine.prefill import Prefill, append_drafts
from twigvlm.engine.row import Row
from twigvlm.engine.sampling import Chooser, check_drawn
from twigvlm.pruning.refocus import Refocus
from twigvlm.pruning.view import Tokens, TrunkOutput
from twigvlm.speculation.batch import NO_TOKEN, Batch, RowState, eos_table
from twigvlm.speculation.build import make_policy
from twigvlm.speculation.costs import StepCosts
from twigvlm.speculation.draft import Committed, Draft, OnHost, Rescore, commit, commit_draft, draft
from twigvlm.speculation.nodes import Nodes
from twigvlm.speculation.policies import DraftPolicy
from twigvlm.speculation.walk import Accepted, walk
from twigvlm.twig.block import Twig


class Step(NamedTuple):
    """What a step added to each row."""

    tokens: list[list[int]]
    """Accepted drafted tokens of each row, and one token that the base chose."""
    drafted: list[int]
    """Number of tokens that were drafted for each row."""


class Runner:
    """The rows of an engine on the device: their prompts, drafts and caches. Row i of every part is row i of the cache.

    Args:
        base: the base.
        twig: its twig.
        speculation: how to draft.
        costs: costs of this machine, which `auto` needs.
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
        self.static = base.device.type != "cpu" if static is None else static
        self.policy = make_policy(speculation, costs, self.static)
        self.batch = Batch(base, twig, reserve + speculation.step_tokens)
        self.rows: list[Row] = []
        self.chooser = Chooser([], base.device)

    def prefill(self, rows: Sequence[Row]) -> Step:
        """Take prompts through trunk and twig, the cut, and the other layers, each with the tokens that are left (§3.3).

        Where the policy drafts behind prompts, and no later cut ranks by a prompt's last token, a chain is drafted from that
        token and verified in the same pass, which saves one of each answer.

        Raises:
            TwigVLMError: the base, a pruner or a processor refuses the prompts. After any error no row has been taken up.
        """
        cache = self.batch.cache
        claimed = cache.claim(len(rows))
        try:
            prefill = Prefill(self.base, self.twig, self.batch.masks, rows, cache.view(claimed))
            trunk = prefill.run_trunk()
            tokens = prefill.cut(trunk)
            # Alone, a row of `auto` shows the prompt to the twig only with the first draft that pays.
            alone = claimed.start == 0 and len(rows) == 1
            defer = self.speculation.speculate == "auto" and alone and not trunk.twig_is_filled
            if self.policy.uses_twig and not defer and not trunk.twig_is_filled:
                trunk.fill_twig()
            prefill.store_refocus_states(trunk)
            part = self._newcomers(rows, trunk, claimed)
            policy = DraftPolicy() if defer else self.policy.behind_prompts(len(rows))
            ends = torch.tensor(trunk.tokens.lengths, device=self.base.device)[:, None] - 1
            if policy.depth and prefill.takes_drafts and not bool(trunk.tokens.visual.gather(1, ends).any()):
                step = self._first_step_with_drafts(prefill, part, trunk, tokens, policy)
            else:
                left = prefill.run_pruned_layers(tokens, trunk, drafts=False)
                first = Chooser(rows, self.base.device).choose(self.base.logits(left.last)[:, None])
                accepted = walk(Nodes.rooted(part.state.newest), 0, first)
                self._advance(part, accepted, rows)
                step = Step(accepted.tokens.tolist(), [0] * len(rows))
                check_drawn(token for (token,) in step.tokens)
            together = [*self.rows, *rows]
            chooser = Chooser(together, self.base.device)
            self.batch.join(part, trunk if defer else None, self._refocus(together))
        except BaseException:
            for index in reversed(range(claimed.start, claimed.stop)):
                cache.release(index)
            raise
        in_twig = trunk.view.held(self.twig.first_layer_idx).longest
        self.policy.join(len(rows), trunk.tokens.lengths[0] - in_twig if defer else 0)
        for row in rows:
            row.drop_states()
        self.rows, self.chooser = together, chooser
        return step

    def _newcomers(self, rows: Sequence[Row], trunk: TrunkOutput, claimed: slice) -> Batch:
        """Rows whose newest tokens are the last ones of their prompts."""
        for row, position in zip(rows, trunk.prompt.next_positions, strict=True):
            row.next_position = position
        roots = last_token(trunk.prompt.input_ids[..., None], trunk.prompt.lengths)[:, 0]
        state = self._state(rows, roots, trunk.prompt)
        return self.batch.newcomers(claimed.start, state, trunk, self._refocus(rows))

    def _refocus(self, rows: Sequence[Row]) -> Refocus | None:
        """What rows can look at again; None: no row does."""
        states = [row.refocus_state for row in rows]
        return None if all(state is None for state in states) else Refocus(self.twig, states)

    def _first_step_with_drafts(
        self, prefill: Prefill, part: Batch, trunk: TrunkOutput, tokens: Tokens, policy: DraftPolicy
    ) -> Step:
        """Draft behind the prompts, and verify the drafts in the pass that takes the prompts through layers K+1..L."""
        base, cache, rows, layers = self.base, self.batch.cache, prefill.rows, self.twig.config.trunk_layers
        chooser = Chooser(rows, base.device)
        # The prompts' last tokens are the roots: trunk and twig see them once more, as they see a newest token.
        again = [(0, layers)] if layers else []
        if policy.uses_twig or part.refocus is not None:
            again.append(self.twig.cache_layers)
        for start, stop in again:
            cache.advance(start, stop, part.rows, -1)
        furthest = max(row.next_position for row in rows) + policy.depth
        drafted = draft(part, policy, self._rescore(chooser), furthest, self.static)
        joined, nodes = append_drafts(tokens, drafted, part.state)
        left = prefill.run_pruned_layers(joined, trunk, drafts=True)
        first = torch.tensor(left.lengths, device=base.device)[:, None] - nodes[:, None]
        index = first + torch.arange(drafted.nodes.tokens.shape[1], device=base.device)
        index = index.clamp(max=left.hidden.shape[1] - 1)
        logits = base.logits(torch.take_along_dim(left.hidden, index[..., None], dim=1))
        committed, on_host = self._walk(part, drafted, chooser, logits)
        dropped = committed.accepted.counts - nodes
        cache.advance(layers, base.num_layers, part.rows, on_host.accepted - on_host.drafted - 1, dropped)
        commit_draft(part, policy, drafted, committed, on_host)
        self._advance(part, committed.accepted, rows)
        return Step(on_host.new_tokens(), on_host.drafted.tolist())

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
        """The drafts of all rows, by the engine's policy: the first halves of Algorithms 1 and 2."""
        furthest = max(row.next_position + len(row.tokens) for row in self.rows) + self.policy.depth
        return draft(self.batch, self.policy, self._rescore(self.chooser), furthest, self.static)

    def _rescore(self, chooser: Chooser) -> Rescore:
        ids = self.twig.draft_token_ids if self.policy.uses_twig else None
        return lambda logits, depths, deepest: chooser.rescore(logits, depths, deepest, ids)

    def verify(self, draft: Draft) -> Step:
        """Run layers K+1..L on all drafts in one pass. Of each row, the longest path that the base agrees with stays in the cache
        (Algorithms 1 and 2, second half).

        Raises:
            TwigVLMError: there is no token to draw, or a processor refuses to choose. The cache holds half a step then.
        """
        base, batch, trunk = self.base, self.batch, self.twig.config.trunk_layers
        self._look_again(draft)
        view = batch.cache.view(batch.rows)
        hidden = base.run_layers(draft.hidden, trunk, base.num_layers, draft.inputs, draft.masks, view)
        committed, on_host = self._walk(batch, draft, self.chooser, base.logits(hidden))
        commit(batch, self.policy, draft, committed, on_host)
        self.policy.learn(on_host.accepted - 1)
        self._advance(batch, committed.accepted, self.rows)
        return Step(on_host.new_tokens(), on_host.drafted.tolist())

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

    def _walk(self, batch: Batch, draft: Draft, chooser: Chooser, logits: Tensor) -> tuple[Committed, OnHost]:
        go_on = chooser.go_on if chooser.stops_early else None
        nodes = draft.nodes
        if batch.refocus is not None and draft.depth:
            assert draft.scores is not None, "rows look again"
            nodes = nodes.without(batch.refocus.asks(draft.scores))  # what follows needs another look first
        committed = Committed.of(draft, walk(nodes, draft.depth, chooser.choose(logits), go_on))
        on_host = committed.to_host()
        check_drawn(tokens[-1] for tokens in on_host.new_tokens())
        return committed, on_host

    def _advance(self, batch: Batch, accepted: Accepted, rows: Sequence[Row]) -> None:
        longest = max(row.length + len(row.tokens) for row in rows) if self.policy.reads_ids else 0
        batch.state.advance(accepted, longest + accepted.tokens.shape[1])

    def leave(self, row: int) -> None:
        """Drop a row; the last one takes its place. Where memory runs out, nothing has changed."""
        rows = list(self.rows)
        rows[row] = rows[-1]
        rows.pop()
        chooser = Chooser(rows, self.base.device)
        self.batch.leave(row, self._refocus(rows))
        self.policy.leave(row)
        self.rows, self.chooser = rows, chooser
