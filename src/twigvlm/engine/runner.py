"""What an engine runs on the device: prompts into the cache, drafts, and their verification (Algorithms 1 and 2)."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from twigvlm.base.packing import last_token
from twigvlm.base.token_inputs import slice_tokens
from twigvlm.base.vlm import BaseVLM
from twigvlm.config import SpeculationConfig
from twigvlm.engine.row import Row
from twigvlm.engine.sampling import Chooser
from twigvlm.errors import TwigVLMError
from twigvlm.kv.cache import CacheView
from twigvlm.pruning.run import run_cuts
from twigvlm.pruning.view import CutView, Tokens, TrunkOutput
from twigvlm.speculation.batch import Batch, RowState, eos_table
from twigvlm.speculation.costs import StepCosts
from twigvlm.speculation.draft import Committed, Draft, commit, draft
from twigvlm.speculation.policies import AdaptiveTree, Chain, FixedTree, NoDraft, Policy
from twigvlm.speculation.walk import walk
from twigvlm.twig.block import Twig


class Step(NamedTuple):
    """What a step brought each row."""

    tokens: list[list[int]]
    """Accepted drafted tokens, and one of the base's own."""
    drafted: list[int]
    """Tokens that were drafted."""


@runtime_checkable
class Runner(Protocol):
    """The rows of an engine on the device. Row i of every part is row i of the cache."""

    batch: Batch

    def prefill(self, rows: Sequence[Row]) -> list[int]:
        """Take up rows whose prompts lie in one batch and are cut at the same layers; their first tokens.

        Raises:
            TwigVLMError: a prompt ends with a visual token that pruning may drop. No row has been taken up then.
        """

    def draft(self) -> Draft:
        """Draft after the newest tokens of all rows."""

    def verify(self, draft: Draft) -> Step:
        """Let the base choose along the drafts, and keep what it agrees with."""

    def leave(self, row: int) -> None:
        """Drop a row; the last one takes its place."""


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
        self.policy = _policy(speculation, costs, self.exact)
        self.rows: list[Row] = []
        self.chooser = Chooser([], base.device)

    @torch.inference_mode()
    def prefill(self, rows: Sequence[Row]) -> list[int]:
        """Trunk with everything, then the layers between the cuts, each with the tokens that are left (§3.3)."""
        cache = self.batch.cache
        claimed = cache.claim(len(rows))
        try:
            trunk, tokens = self._prompts(rows, cache.view(claimed))
            defer = self._defer(trunk, alone=claimed.start == 0 and len(rows) == 1)
            if self.policy.depth and not defer and not trunk.in_twig:
                trunk.fill_twig()
            logits = self.base.logits(tokens.last)
            first = Chooser(rows, self.base.device).choose(logits[:, None])
            zero = torch.zeros(len(rows), dtype=torch.long, device=logits.device)
            chosen = first(0, zero, zero[:, None][:, :0], zero == 0)
        except BaseException:
            for index in reversed(range(claimed.start, claimed.stop)):
                cache.release(index)
            raise
        for row, position in zip(rows, _next_positions(trunk), strict=True):
            row.next_position = position
        self.batch.join(self._state(rows, trunk, chosen), trunk, defer)
        self.policy.join(len(rows), trunk.tokens.lengths[0] if defer else 0)
        self.rows += rows
        self.chooser = Chooser(self.rows, self.base.device)
        return chosen.tolist()

    def _prompts(self, rows: Sequence[Row], view: CacheView) -> tuple[TrunkOutput, Tokens]:
        """The prompts after layer K, and what is left of them after layer L."""
        base, twig, trunk_layers, layers = self.base, self.twig, self.twig.config.trunk_layers, self.base.num_layers
        pruner, prefix = rows[0].pruner, rows[0].prefix
        prompt = rows[0].prompt.rows([row.index for row in rows])
        if pruner is not None and bool(last_token(prompt.visual_mask[..., None], prompt.lengths).any()):
            raise TwigVLMError("the prompt ends with a visual token: put text behind it, or leave pruning out")
        tokens = Tokens(prompt.hidden, base.token_inputs(prompt), prompt.visual_mask, prompt.lengths)
        masks = self.batch.masks
        trunk: TrunkOutput | None = None

        def choose(tokens: Tokens, layer: int, keep: Sequence[int]) -> Bool[Tensor, "batch tokens"]:
            assert pruner is not None, "there are cuts"
            stays = pruner.choose(CutView(base, prompt, layer, tokens, trunk), keep)
            for row, kept in zip(rows, stays, strict=True):
                row.kept = kept if row.kept is None else row.kept
            return stays

        early = [[cut for cut in row.cuts if cut.layer < trunk_layers] for row in rows]
        late = [row.cuts[len(cuts) :] for row, cuts in zip(rows, early, strict=True)]
        if prefix is None or any(early):
            prefix = None
            tokens = run_cuts(base, tokens, 0, trunk_layers, early, choose, masks, view)
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
        return trunk, run_cuts(base, tokens, trunk_layers, layers, late, choose, masks, view)

    def _defer(self, trunk: TrunkOutput, alone: bool) -> bool:
        """Whether only the first draft that pays shall show the prompt to the twig."""
        return self.speculation.speculate == "auto" and alone and not trunk.in_twig

    def _state(self, rows: Sequence[Row], trunk: TrunkOutput, chosen: Int[Tensor, " rows"]) -> RowState:
        device = chosen.device
        numbers = [(min(row.max_new_tokens, 2**40), row.next_position, row.length) for row in rows]
        limit, position, length = torch.tensor(numbers, device=device).unbind(dim=1)
        eos = eos_table([row.eos_token_ids for row in rows], device)
        return RowState(chosen, torch.ones_like(chosen), limit, position, length, eos)

    @torch.inference_mode()
    def draft(self) -> Draft:
        """The drafts of all rows, by the engine's policy."""
        return draft(self.batch, self.policy, self._rescore, self._furthest(), self.exact)

    def _rescore(
        self, logits: Float[Tensor, "rows nodes draft_vocabulary"], depths: Int[Tensor, "rows nodes"], deepest: int
    ) -> Float[Tensor, "rows nodes draft_vocabulary"]:
        return self.chooser.rescore(logits, depths, deepest, self.twig.draft_token_ids)

    def _furthest(self) -> int:
        return max(row.next_position + len(row.tokens) for row in self.rows) + self.policy.depth

    @torch.inference_mode()
    def verify(self, draft: Draft) -> Step:
        """Layers K+1..L on all drafts in one pass; of each row the longest path that the base agrees with stays in the caches."""
        base, batch, trunk = self.base, self.batch, self.twig.config.trunk_layers
        view = batch.cache.view(batch.rows)
        hidden = base.run_layers(draft.hidden, trunk, base.num_layers, draft.inputs, draft.masks, view)
        chooser = self.chooser
        couple = chooser.couple if chooser.coupled else None
        accepted = walk(draft.nodes, draft.depth, chooser.choose(base.logits(hidden)), couple)
        committed = Committed.of(draft, accepted)
        on_host = committed.to_host()
        commit(batch, self.policy, draft, committed, on_host)
        self.policy.learn(draft.nodes, on_host[:, 0] - 1)
        assert batch.state is not None, "there are rows"
        newest = accepted.tokens.gather(1, accepted.counts[:, None] - 1)[:, 0]
        batch.state.newest, batch.state.count = newest, batch.state.count + accepted.counts
        tokens = [numbers[3 : 3 + numbers[0]].tolist() for numbers in on_host]
        return Step(tokens, on_host[:, 2].tolist())

    @torch.inference_mode()
    def leave(self, row: int) -> None:
        """Drop a row; the last one takes its place."""
        self.batch.leave(row)
        self.policy.leave(row)
        self.rows[row] = self.rows[-1]
        self.rows.pop()
        self.chooser = Chooser(self.rows, self.base.device)


def _policy(speculation: SpeculationConfig, costs: StepCosts | None, exact: bool) -> Policy:
    if costs is not None:
        return AdaptiveTree(costs, speculation.tree_width)
    if speculation.speculate == "tree":
        return FixedTree(speculation, exact)
    return Chain(speculation, exact) if speculation.active else NoDraft()


def _next_positions(trunk: TrunkOutput) -> list[int]:
    """Position that each prompt's next token has, for rotary embeddings."""
    positions = trunk.prompt.position_ids
    last = torch.tensor(trunk.prompt.lengths, device=positions.device)[:, None] - 1
    at_end = positions.gather(-1, last.expand(*positions.shape[:-1], 1))[..., 0]
    axes = at_end[-3:] if at_end.ndim == 2 else at_end[None]
    return (axes.amax(dim=0) + 1).tolist()
