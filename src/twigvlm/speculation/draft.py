"""Drafting with trunk and twig, chains and trees alike (Algorithms 1 and 2, first half), or with less than that."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from twigvlm.base.masks import Masks
from twigvlm.base.token_inputs import TokenInputs
from twigvlm.speculation.batch import Batch
from twigvlm.speculation.nodes import INVALID, Nodes, ancestor_mask
from twigvlm.speculation.policies import DraftPolicy
from twigvlm.speculation.walk import Accepted

Rescore = Callable[[Float[Tensor, "rows nodes draft_vocabulary"], Int[Tensor, "rows nodes"], int], Tensor]
"""(logits to draft by, depths of the nodes, upper bound of the depths) -> log-probabilities to draft by."""


class Draft(NamedTuple):
    """Drafted tokens, and what layers K+1..L need to verify all of them in one pass."""

    nodes: Nodes
    """To be verified; node i is the i-th of the pass."""
    depth: int
    """Depth of the deepest node."""
    hidden: Float[Tensor, "rows nodes width"]
    """Layer-K states: the base verifies from these, without the trunk."""
    inputs: TokenInputs
    masks: Masks
    cache_index: Int[Tensor, "rows nodes"] | None
    """Which of the tokens that the trunk's cache got each node is; None: the i-th."""
    num_in_trunk: int
    """Tokens that the trunk's cache got."""
    num_in_twig: int
    """Tokens that the twig's cache got: the first ones of the trunk's."""
    scores: Float[Tensor, "rows nodes visual"] | None
    """Shares of the visual tokens at each node; None where no row looks again."""


def draft(batch: Batch, policy: DraftPolicy, rescore: Rescore, furthest: int, static: bool) -> Draft:
    """Draft after each row's newest token.

    Nodes that the policy chooses run through the trunk, and the twig if it drafts, in one pass and get E children each, until
    it chooses no more. Of the whole it selects what is verified; those of them that no pass ran then run through the trunk, in
    one.

    Args:
        batch: the rows.
        policy: policy of their drafts.
        rescore: turns logits into log-probabilities.
        furthest: upper bound of the positions of the drafted tokens.
        static: whether to pad to the most nodes that there can be, instead of reading how many have not run.
    """
    growing = _Growing(batch, policy, furthest)
    while True:
        expandable = growing.expandable()
        chosen = policy.expand(growing.nodes, expandable, growing.level)
        if chosen is None:
            return growing.selected(static)
        known = chosen.clamp(min=0)
        logits = growing.logits_after(chosen)
        log_probabilities = rescore(logits.float(), growing.nodes.depths.gather(1, known), growing.level)
        best = log_probabilities.topk(min(policy.width, log_probabilities.shape[-1]))
        growing.add(chosen.masked_fill(~expandable.gather(1, known), INVALID), best.indices, best.values)


class _Growing:
    """A draft while it grows: its nodes, and what the passes made of those that ran.

    Args:
        batch: the rows.
        policy: policy of their drafts.
        furthest: upper bound of the positions of the drafted tokens.
    """

    def __init__(self, batch: Batch, policy: DraftPolicy, furthest: int) -> None:
        self.batch, self.policy, self.furthest, self.rows = batch, policy, furthest, batch.state
        self.nodes = policy.start(batch.state)
        self.level = 0
        """Passes that have run."""
        self.ran: Int[Tensor, "rows ran"] = self.nodes.tokens[:, :0]
        """Nodes that have run, in the order in which the caches hold them."""
        self.hidden: list[Tensor] = []
        """Their states after layer K, by passes."""
        self.scores: list[Tensor] = []
        """Their shares of the visual tokens, where rows look again."""

    def expandable(self) -> Bool[Tensor, "rows nodes"]:
        """Nodes that may get children and have none yet."""
        nodes, index = self.nodes, torch.arange(self.nodes.tokens.shape[1], device=self.ran.device)
        open_ended = ~(nodes.tokens[..., None] == self.rows.eos_token_ids[:, None]).any(dim=-1)
        unexpanded = ~(self.ran[:, None, :] == index[:, None]).any(dim=-1)
        # One token more than the deepest draft comes from the base.
        room = (self.rows.limit - self.rows.count)[:, None]
        return self.policy.grows(nodes) & open_ended & unexpanded & (nodes.depths + 1 < room)

    def logits_after(self, chosen: Int[Tensor, "rows chosen"]) -> Float[Tensor, "rows chosen draft_vocabulary"]:
        """Run nodes, and predict the next tokens by the twig, or by the base's own head."""
        hidden, inputs, masks = self._run_trunk(chosen)
        if not self.policy.uses_twig and self.batch.refocus is None:
            return self.batch.base.logits(hidden)
        states = self._run_twig(hidden, inputs, masks)
        return self.batch.twig.logits(states) if self.policy.uses_twig else self.batch.base.logits(hidden)

    def add(self, parents: Int[Tensor, "rows chosen"], best: Int[Tensor, "rows chosen width"], scores: Tensor) -> None:
        """Add children of the nodes that the last pass ran, which the draft vocabulary numbers."""
        ids = self.batch.twig.draft_token_ids if self.policy.uses_twig else None
        self.nodes = self.nodes.add(parents, best if ids is None else ids[best], scores)
        self.level += 1

    def selected(self, static: bool) -> Draft:
        """What the policy selects of the nodes; those of them that have not run do so now.

        Where rows look again, they run through the twig too: whether to look is asked of each node.
        """
        batch, policy = self.batch, self.policy
        num_in_twig = self.ran.shape[1] if policy.uses_twig else 0
        selected = policy.select(self.nodes)
        late = _not_yet_run(policy, selected, self.ran, static)
        if late.shape[1]:
            hidden, inputs, masks = self._run_trunk(late)
            if batch.refocus is not None:
                num_in_twig = self.ran.shape[1]
                self._run_twig(hidden, inputs, masks)
        hidden = self.hidden[0] if len(self.hidden) == 1 else torch.cat(self.hidden, dim=1)
        scores = torch.cat(self.scores, dim=1) if self.scores else None
        num_in_trunk, chosen = self.ran.shape[1], self.nodes.take(selected)
        inputs = batch.inputs(chosen.depths, self.furthest)
        if policy.linear:
            deepest = chosen.tokens.shape[1] - 1
            return Draft(chosen, deepest, hidden, inputs, batch.masks, None, num_in_trunk, num_in_twig, scores)
        cache_index = (selected[:, :, None] == self.ran[:, None, :]).int().argmax(dim=2)
        masks = batch.masks
        if selected.shape[1] > 1:
            order = torch.arange(selected.shape[1], device=selected.device).expand_as(selected)
            order = order.masked_fill(selected == INVALID, INVALID)
            seen = ancestor_mask(chosen.parents, order, order, self.level)
            masks = batch.base.tree_masks(seen)
        hidden = torch.take_along_dim(hidden, cache_index[..., None], dim=1)
        scores = None if scores is None else torch.take_along_dim(scores, cache_index[..., None], dim=1)
        return Draft(chosen, self.level, hidden, inputs, masks, cache_index, num_in_trunk, num_in_twig, scores)

    def _run_trunk(self, new: Int[Tensor, "rows new"]) -> tuple[Float[Tensor, "rows new width"], TokenInputs, Masks]:
        """Run nodes through layers 1..K after those that ran before: states, inputs and masks."""
        batch, nodes, known = self.batch, self.nodes, new.clamp(min=0)
        self.ran = torch.cat((self.ran, new), dim=1)
        masks: Masks = batch.masks
        if not self.policy.linear and self.ran.shape[1] > 1:
            seen = ancestor_mask(nodes.parents, new, self.ran, self.level)
            masks = batch.base.tree_masks(seen)
        inputs = batch.inputs(nodes.depths.gather(1, known), self.furthest)
        hidden = batch.run_trunk(nodes.tokens.gather(1, known), inputs, masks)
        self.hidden.append(hidden)
        return hidden, inputs, masks

    def _run_twig(
        self, hidden: Float[Tensor, "rows new width"], inputs: TokenInputs, masks: Masks
    ) -> Float[Tensor, "rows new width"]:
        """Run nodes through the twig; where it drafts, it first sees with the roots what it has not seen yet."""
        if self.level == 0 and self.policy.uses_twig:
            found = self.batch.run_twig_on_roots(hidden, inputs, self.furthest)
        else:
            found = self.batch.run_twig(hidden, inputs, masks)
        if found.scores is not None:
            self.scores.append(found.scores)
        return found.states


def _not_yet_run(policy: DraftPolicy, selected: Tensor, ran: Tensor, static: bool) -> Int[Tensor, "rows late"]:
    """Selected nodes that have not run."""
    if policy.linear:  # a chain's last one, or the whole of one that no pass drafted
        return selected[:, ran.shape[1] :].clamp(min=0)
    missing = (selected != INVALID) & ~(selected[:, :, None] == ran[:, None, :]).any(dim=2)
    count = selected.shape[1] - min(1, ran.shape[1]) if static else int(missing.sum(dim=1).max())
    end = torch.iinfo(selected.dtype).max
    late = selected.masked_fill(~missing, end).sort(dim=1).values[:, :count]
    return late.masked_fill(late == end, INVALID)


class OnHost(NamedTuple):
    """What the host reads of a step, once, of each row."""

    accepted: NDArray[np.int64]
    """Accepted nodes, the root included."""
    in_twig: NDArray[np.int64]
    """Accepted nodes that the twig has seen."""
    drafted: NDArray[np.int64]
    """Nodes of the draft besides the root."""
    tokens: NDArray[np.int64]
    """The base's choices along the path, undefined beyond the accepted nodes; [rows, steps]."""

    def new_tokens(self) -> list[list[int]]:
        """The tokens that the step adds to each answer."""
        return [tokens[:count].tolist() for tokens, count in zip(self.tokens, self.accepted, strict=True)]


class Committed(NamedTuple):
    """What of a draft the caches keep, of each row, where the caches need it: on the device and, after one read, on the host."""

    accepted: Accepted
    num_in_twig: Int[Tensor, " rows"]
    """Accepted nodes that the twig has seen."""
    cache_index: Int[Tensor, "rows steps"]
    """Which of the tokens that the trunk's cache got each accepted node is."""
    drafted: Int[Tensor, " rows"]
    """Nodes of the draft besides the root."""

    @classmethod
    def of(cls, draft: Draft, accepted: Accepted) -> "Committed":
        """After a walk through a draft."""
        path = accepted.path
        index = path if draft.cache_index is None else draft.cache_index.gather(1, path)
        on_path = torch.arange(path.shape[1], device=path.device) < accepted.counts[:, None]
        return cls(
            accepted, (on_path & (index < draft.num_in_twig)).sum(dim=1), index, draft.nodes.valid.sum(dim=1) - 1
        )

    def to_host(self) -> OnHost:
        """The step's one read from the device."""
        counts = torch.stack((self.accepted.counts, self.num_in_twig, self.drafted), dim=1)
        columns = torch.cat((counts, self.accepted.tokens), dim=1).cpu().numpy()
        return OnHost(columns[:, 0], columns[:, 1], columns[:, 2], columns[:, 3:])


def commit(batch: Batch, policy: DraftPolicy, draft: Draft, committed: Committed, on_host: OnHost) -> None:
    """Every cache keeps each row's accepted path (root included) and drops the rest of the draft."""
    kept = committed.accepted.path if _moves(policy, draft) else None
    layers = batch.twig.config.trunk_layers, batch.base.num_layers
    nodes, accepted = draft.nodes.tokens.shape[1], committed.accepted.counts
    batch.cache.commit(*layers, batch.rows, nodes, on_host.accepted, accepted, kept)
    commit_draft(batch, policy, draft, committed, on_host)


def commit_draft(batch: Batch, policy: DraftPolicy, draft: Draft, committed: Committed, on_host: OnHost) -> None:
    """The part of a commit that trunk and twig need."""
    cache, twig, accepted, rows = batch.cache, batch.twig, committed.accepted, batch.rows
    index = committed.cache_index if _moves(policy, draft) else None
    if twig.config.trunk_layers:
        cache.commit(0, twig.config.trunk_layers, rows, draft.num_in_trunk, on_host.accepted, accepted.counts, index)
    if draft.num_in_twig:
        cache.commit(*twig.cache_layers, rows, draft.num_in_twig, on_host.in_twig, committed.num_in_twig, index)
    if policy.uses_twig:
        late = accepted.counts - committed.num_in_twig  # the last node of a path at most
        newest = torch.take_along_dim(draft.hidden, accepted.path[:, -1:, None], dim=1)
        batch.pending = batch.pending.append(newest, late, on_host.accepted - on_host.in_twig)


def _moves(policy: DraftPolicy, draft: Draft) -> bool:
    """Whether an accepted path may be other nodes than the first ones."""
    return not policy.linear and draft.nodes.tokens.shape[1] > 1
