"""Drafting with trunk and twig, chains and trees alike (Algorithms 1 and 2, first half), or with less than that."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from twigvlm.base.masks import Masks, TreeMasks
from twigvlm.base.token_inputs import TokenInputs
from twigvlm.speculation.batch import Batch, InTwig
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
    """Of the deepest node."""
    hidden: Float[Tensor, "rows nodes width"]
    """Layer-K states: the base verifies from these, without the trunk."""
    inputs: TokenInputs
    masks: Masks
    slots: Int[Tensor, "rows nodes"] | None
    """Which of the tokens that the trunk's cache got each node is; None: the i-th."""
    in_trunk: int
    """Tokens that the trunk's cache got."""
    in_twig: int
    """Tokens that the twig's cache got: the first ones of the trunk's."""
    scores: Float[Tensor, "rows nodes visual"] | None
    """Shares of the visual tokens at each node; None where no row looks again."""


def draft(batch: Batch, policy: DraftPolicy, rescore: Rescore, furthest: int, exact: bool) -> Draft:
    """Draft after each row's newest token.

    Nodes that the policy chooses run through the trunk, and the twig if it drafts, in one pass and get E children each, until
    it chooses no more. Of the whole it selects what is verified; those of them that no pass ran then run through the trunk, in
    one.

    Args:
        batch: the rows.
        policy: of their drafts.
        rescore: turns logits into log-probabilities.
        furthest: upper bound of the positions of the drafted tokens.
        exact: whether to read how many nodes have not run, instead of padding to the most that there can be.
    """
    state = batch.state
    assert state is not None, "there are rows"
    nodes = policy.start(state)
    ran = nodes.tokens[:, :0]
    states: list[Tensor] = []
    scores: list[Tensor] = []
    expandable = torch.zeros_like(nodes.tokens, dtype=torch.bool)
    room = (state.limit - state.count)[:, None]
    level = 0
    while True:
        open_ended = ~(nodes.tokens[..., None] == state.eos_token_ids[:, None]).any(dim=-1)
        unexpanded = ~(ran[:, None, :] == torch.arange(nodes.tokens.shape[1], device=ran.device)[:, None]).any(dim=-1)
        # One token more than the deepest draft comes from the base.
        expandable = policy.grows(nodes) & open_ended & unexpanded & (nodes.depths + 1 < room)
        chosen = policy.expand(nodes, expandable, level)
        if chosen is None:
            break
        ran = torch.cat((ran, chosen), dim=1)
        hidden, inputs, masks = _run(batch, policy, nodes, ran, chosen, level, furthest)
        states.append(hidden)
        logits, shares = _predict(batch, policy, hidden, inputs, masks, level, furthest)
        if shares is not None:
            scores.append(shares)
        known = chosen.clamp(min=0)
        log_probabilities = rescore(logits.float(), nodes.depths.gather(1, known), level)
        best = log_probabilities.topk(min(policy.width, log_probabilities.shape[-1]))
        ids = batch.twig.draft_token_ids if policy.uses_twig else None
        parents = chosen.masked_fill(~expandable.gather(1, known), INVALID)
        nodes = nodes.add(parents, best.indices if ids is None else ids[best.indices], best.values)
        level += 1
    return _selected(batch, policy, nodes, ran, states, scores, level, furthest, exact)


def _selected(
    batch: Batch,
    policy: DraftPolicy,
    nodes: Nodes,
    ran: Int[Tensor, "rows ran"],
    states: list[Tensor],
    scores: list[Tensor],
    level: int,
    furthest: int,
    exact: bool,
) -> Draft:
    """What the policy selects of drafted nodes, of which `ran` have these layer-K states; the others run through the trunk.

    Where rows look again, they run through the twig too: whether to look is asked of each node.
    """
    in_twig = ran.shape[1] if policy.uses_twig else 0
    selected = policy.select(nodes)
    late = _late(policy, selected, ran, exact)
    if late.shape[1]:
        ran = torch.cat((ran, late), dim=1)
        more, late_inputs, late_masks = _run(batch, policy, nodes, ran, late, level, furthest)
        states.append(more)
        if batch.refocus is not None:
            in_twig = ran.shape[1]
            last = _in_twig(batch, policy, more, late_inputs, late_masks, level, furthest)
            assert last.scores is not None, "rows look again"
            scores.append(last.scores)
    hidden = states[0] if len(states) == 1 else torch.cat(states, dim=1)
    shares = torch.cat(scores, dim=1) if scores else None
    chosen = nodes.take(selected)
    assert batch.state is not None, "there are rows"
    inputs = batch.inputs(batch.state, chosen.depths, furthest)
    if policy.linear:
        deepest = chosen.tokens.shape[1] - 1
        return Draft(chosen, deepest, hidden, inputs, batch.masks, None, ran.shape[1], in_twig, shares)
    equal = selected[:, :, None] == ran[:, None, :]
    slots = equal.int().argmax(dim=2)
    order = torch.arange(selected.shape[1], device=selected.device).expand_as(selected)
    order = order.masked_fill(selected == INVALID, INVALID)
    masks: Masks = batch.masks
    if selected.shape[1] > 1:
        seen = ancestor_mask(chosen.parents, order, order, level)
        masks = TreeMasks(batch.base.attention, seen, hidden.dtype)
    gathered = torch.take_along_dim(hidden, slots[..., None], dim=1)
    shares = None if shares is None else torch.take_along_dim(shares, slots[..., None], dim=1)
    return Draft(chosen, level, gathered, inputs, masks, slots, ran.shape[1], in_twig, shares)


def _late(policy: DraftPolicy, selected: Tensor, ran: Tensor, exact: bool) -> Int[Tensor, "rows late"]:
    """Selected nodes that have not run."""
    if policy.linear:  # a chain's last one, or the whole of one that no pass drafted
        return selected[:, ran.shape[1] :].clamp(min=0)
    missing = (selected != INVALID) & ~(selected[:, :, None] == ran[:, None, :]).any(dim=2)
    count = int(missing.sum(dim=1).max()) if exact else selected.shape[1] - min(1, ran.shape[1])
    end = torch.iinfo(selected.dtype).max
    late = selected.masked_fill(~missing, end).sort(dim=1).values[:, :count]
    return late.masked_fill(late == end, INVALID)


def _predict(
    batch: Batch,
    policy: DraftPolicy,
    hidden: Float[Tensor, "rows nodes width"],
    inputs: TokenInputs,
    masks: Masks,
    level: int,
    furthest: int,
) -> tuple[Float[Tensor, "rows nodes draft_vocabulary"], Float[Tensor, "rows nodes visual"] | None]:
    """Logits after nodes, by the twig or by the base's own head, and the nodes' shares of the visual tokens."""
    if not policy.uses_twig and batch.refocus is None:
        return batch.base.logits(hidden), None
    in_twig = _in_twig(batch, policy, hidden, inputs, masks, level, furthest)
    logits = batch.twig.logits(in_twig.states) if policy.uses_twig else batch.base.logits(hidden)
    return logits, in_twig.scores


def _in_twig(
    batch: Batch,
    policy: DraftPolicy,
    hidden: Float[Tensor, "rows nodes width"],
    inputs: TokenInputs,
    masks: Masks,
    level: int,
    furthest: int,
) -> InTwig:
    """Run the twig on nodes; where it drafts, it first sees with the roots what it has not seen yet."""
    if level == 0 and policy.uses_twig:
        return batch.roots_in_twig(hidden, inputs, furthest)
    return batch.in_twig(hidden, inputs, masks)


def _run(
    batch: Batch, policy: DraftPolicy, nodes: Nodes, ran: Tensor, new: Tensor, level: int, furthest: int
) -> tuple[Tensor, TokenInputs, Masks]:
    """Run nodes through the trunk, whose cache holds those that ran before: states, inputs and masks."""
    assert batch.state is not None, "there are rows"
    known = new.clamp(min=0)
    masks: Masks = batch.masks
    if not policy.linear and ran.shape[1] > 1:
        masks = TreeMasks(batch.base.attention, ancestor_mask(nodes.parents, new, ran, level), batch.base.dtype)
    inputs = batch.inputs(batch.state, nodes.depths.gather(1, known), furthest)
    return batch.trunk(nodes.tokens.gather(1, known), inputs, masks), inputs, masks


class Committed(NamedTuple):
    """What of a draft the caches keep, of each row, where the caches need it: on the device and, after one read, on the host."""

    accepted: Accepted
    in_twig: Int[Tensor, " rows"]
    """Accepted nodes that the twig has seen."""
    slots: Int[Tensor, "rows steps"]
    """Of the accepted nodes in the trunk's cache."""
    drafted: Int[Tensor, " rows"]
    """Nodes of the draft besides the root."""

    @classmethod
    def of(cls, draft: Draft, accepted: Accepted) -> "Committed":
        """After a walk through a draft."""
        path = accepted.path
        slots = path if draft.slots is None else draft.slots.gather(1, path)
        on_path = torch.arange(path.shape[1], device=path.device) < accepted.counts[:, None]
        return cls(accepted, (on_path & (slots < draft.in_twig)).sum(dim=1), slots, draft.nodes.valid.sum(dim=1) - 1)

    def to_host(self) -> Int[np.ndarray, "rows numbers"]:
        """The step's one read.

        Of each row: accepted nodes with the root, those of them in the twig, drafted nodes, the base's choices along the path.
        """
        numbers = torch.stack((self.accepted.counts, self.in_twig, self.drafted), dim=1)
        return torch.cat((numbers, self.accepted.tokens), dim=1).cpu().numpy()


def commit(
    batch: Batch, policy: DraftPolicy, draft: Draft, committed: Committed, on_host: Int[np.ndarray, "rows numbers"]
) -> None:
    """Every cache keeps each row's accepted path (root included) and drops the rest of the draft."""
    kept = committed.accepted.path if _moves(policy, draft) else None
    layers = batch.twig.config.trunk_layers, batch.base.num_layers
    nodes, accepted = draft.nodes.tokens.shape[1], committed.accepted.counts
    batch.cache.commit(*layers, batch.rows, nodes, on_host[:, 0], accepted, kept)
    commit_draft(batch, policy, draft, committed, on_host)


def commit_draft(
    batch: Batch, policy: DraftPolicy, draft: Draft, committed: Committed, on_host: Int[np.ndarray, "rows numbers"]
) -> None:
    """The part of a commit that trunk and twig need."""
    cache, twig, accepted, rows = batch.cache, batch.twig, committed.accepted, batch.rows
    counts, in_twig = on_host[:, 0], on_host[:, 1]
    slots = committed.slots if _moves(policy, draft) else None
    if twig.config.trunk_layers:
        cache.commit(0, twig.config.trunk_layers, rows, draft.in_trunk, counts, accepted.counts, slots)
    if draft.in_twig:
        layers = twig.first_slot, twig.last_slot + 1
        cache.commit(*layers, rows, draft.in_twig, in_twig, committed.in_twig, slots)
    if policy.uses_twig:
        assert batch.pending is not None, "there are rows"
        late = accepted.counts - committed.in_twig  # the last node of a path at most
        newest = torch.take_along_dim(draft.hidden, accepted.path[:, -1:, None], dim=1)
        batch.pending = batch.pending.append(newest, late, counts - in_twig)


def _moves(policy: DraftPolicy, draft: Draft) -> bool:
    """Whether an accepted path may be other nodes than the first ones."""
    return not policy.linear and draft.nodes.tokens.shape[1] > 1
