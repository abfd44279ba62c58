"""Drafting without a model: what followed the newest tokens where they stood before (prompt lookup, n-gram speculation)."""

import torch
from jaxtyping import Int
from torch import Tensor

from twigvlm.config import SpeculationConfig
from twigvlm.speculation.batch import NO_TOKEN, RowState
from twigvlm.speculation.nodes import Nodes
from twigvlm.speculation.policies import DraftPolicy


class Lookup(DraftPolicy):
    """Chains of up to δ tokens, looked up in the row's own prompt and answer.

    Args:
        options: δ and n, the most tokens that are looked up.
        static: whether the shapes of passes do not depend on what was drafted, which saves reads from the device.
    """

    reads_ids = True

    def __init__(self, options: SpeculationConfig, static: bool) -> None:
        self.depth, self.ngram, self.static = options.draft_length, options.lookup_ngram, static

    def start(self, state: RowState) -> Nodes:
        """The whole draft: no pass through the trunk is needed to find it."""
        found = continuations(state.ids, state.prompt_length + state.count, self.ngram, self.depth)
        tokens = torch.cat((state.newest[:, None], found), dim=1)
        depths = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        ends = (tokens[..., None] == state.eos_token_ids[:, None]).any(dim=-1).long()
        ended = ends.cumsum(dim=1) > ends
        # One token more than the deepest draft comes from the base.
        drafted = (tokens != NO_TOKEN) & ~ended & (depths < (state.limit - state.count)[:, None])
        scores = torch.zeros(tokens.shape, device=tokens.device).masked_fill(~drafted, float("-inf"))
        nodes = Nodes(tokens.clamp(min=0), (depths - 1).clamp(min=0), depths, scores)
        if self.static:
            return nodes
        longest = int(drafted.sum(dim=1).max())
        return Nodes(*(part[:, :longest] for part in nodes))


def continuations(
    ids: Int[Tensor, "rows width"], lengths: Int[Tensor, " rows"], ngram: int, count: int
) -> Int[Tensor, "rows count"]:
    """What followed each row's last tokens where they stood before; NO_TOKEN where nothing did, or an image.

    Of the last n tokens, then of fewer, the newest earlier occurrence counts. A continuation that reaches the end of the row
    goes on with its own beginning, as a text that repeats itself does.

    Args:
        ids: ids of the rows; NO_TOKEN at visual tokens, anything after the rows' ends.
        lengths: lengths of the rows.
        ngram: n.
        count: most tokens of a continuation.
    """
    width, end = ids.shape[1], lengths - 1
    index = torch.arange(width, device=ids.device)
    matches = index < end[:, None]
    start = torch.zeros_like(lengths)
    for back in range(ngram):
        token = ids.gather(1, (end - back).clamp(min=0)[:, None])
        earlier = torch.nn.functional.pad(ids, (back, 0), value=NO_TOKEN)[:, :width]
        matches = matches & (earlier == token) & (token != NO_TOKEN)
        newest = torch.where(matches, index, -1).amax(dim=1)
        start = torch.where(newest >= 0, newest + 1, start)
    offsets = torch.arange(count, device=ids.device) % (lengths - start)[:, None]
    found = ids.gather(1, (start[:, None] + offsets).clamp(max=width - 1))
    text = (found != NO_TOKEN) & (start > 0)[:, None]
    return found.masked_fill(text.cumprod(dim=1) == 0, NO_TOKEN)
