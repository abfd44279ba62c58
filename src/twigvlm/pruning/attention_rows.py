"""Importance of visual tokens: rows of an attention map that is never materialised (§3.3, Eq. 3)."""

from collections.abc import Iterable, Iterator
from math import log
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from twigvlm.base.layers import project_queries, window_of
from twigvlm.base.packing import left_pack, valid_mask
from twigvlm.base.token_inputs import TokenInputs, select_tokens, slice_tokens
from twigvlm.pruning.select import gather_tokens

_CHUNK = 32  # queries whose attention is computed at a time, so that memory is linear in the tokens


class AttentionRows(NamedTuple):
    """Rows of a decoder layer's attention map, of a few queries."""

    shares: Float[Tensor, "batch heads queries tokens"]
    """Each query's softmax over *all* keys, in float32."""
    asks: Bool[Tensor, "batch queries"]
    """False where a row of the batch has fewer queries than others; what stands there means nothing."""
    inputs: TokenInputs
    """Per-token inputs of the queries."""


def attention_rows(
    layer: nn.Module,
    hidden: Float[Tensor, "batch tokens width"],
    keys: Float[Tensor, "batch kv_heads tokens head_dim"],
    inputs: TokenInputs,
    asking: Bool[Tensor, "batch tokens"],
) -> Iterator[AttentionRows]:
    """Rows of a decoder layer's attention map, a few queries at a time in the order of the tokens; none if nobody asks.

    They need the layer's rotated queries and keys only, so that any attention kernel may run beside them. Sliding windows and
    images whose tokens see each other count as in the layer itself, also after some tokens were cut.

    Args:
        layer: base or twig layer.
        hidden: its input.
        keys: its rotated keys.
        inputs: inputs of all tokens.
        asking: True at the tokens whose rows are wanted; False at padding.
    """
    positions, counts = left_pack(asking)
    asks = valid_mask(counts, positions.shape[1], asking.device)
    of_queries = select_tokens(inputs, positions)
    queries = project_queries(layer, gather_tokens(hidden, positions), of_queries)
    (batch, heads, count, width), groups, tokens = queries.shape, keys.shape[1], keys.shape[2]
    at = positions if of_queries.positions is None else of_queries.positions
    until = at if of_queries.attends_until is None else of_queries.attends_until.maximum(at)
    keys_at = torch.arange(tokens, device=keys.device) if inputs.positions is None else inputs.positions[:, None]
    scaling, window = cast(Any, layer).self_attn.scaling, window_of(layer)
    for start in range(0, count, _CHUNK):
        part = slice(start, min(start + _CHUNK, count))
        grouped = queries[:, :, part].reshape(batch, groups, -1, width)  # heads of a group share its keys
        logits = (grouped @ keys.transpose(-1, -2)).float() * scaling
        masked = keys_at > until[:, part, None]
        if window is not None:
            masked |= keys_at <= at[:, part, None] - window
        logits = logits.view(batch, heads, -1, tokens).masked_fill(masked[:, None], float("-inf"))
        yield AttentionRows(logits.softmax(dim=-1), asks[:, part], slice_tokens(of_queries, part.start, part.stop))


def attention_scores(
    rows: Iterable[AttentionRows], visual_mask: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, "batch tokens"]:
    """Attention that visual tokens get: softmax over *all* keys, mean over heads, sum over the queries (Eq. 3).

    With the last prompt token as the only query this is the row that the published code ranks by.

    Args:
        rows: from `attention_rows`.
        visual_mask: True at visual tokens.

    Returns:
        Scores in float32; 0 at text tokens.
    """
    scores = torch.zeros(visual_mask.shape, dtype=torch.float32, device=visual_mask.device)
    for shares, asks, _ in rows:
        scores += (shares.mean(dim=1) * asks[..., None]).sum(dim=1)
    return scores.masked_fill(~visual_mask, 0.0)


def visual_attention(
    queries: Float[Tensor, "batch heads queries head_dim"],
    keys: Float[Tensor, "batch kv_heads visual head_dim"],
    scaling: float,
    visible: Bool[Tensor, "batch queries visual"],
) -> Float[Tensor, "batch queries visual"]:
    """Logarithm of attention restricted to visual tokens: softmax over *them alone*, mean over heads (Eq. 7).

    A P-Head learns by it, so that it is a logarithm, and has a gradient also where a query sees nothing.

    Args:
        queries: rotated queries, gated where there is a P-Head.
        keys: rotated keys of the visual tokens, likewise.
        scaling: factor of the dot product, 1/sqrt(d_h) as a rule.
        visible: which of the visual tokens a query sees.

    Returns:
        The logarithm in float32, finite however small a share is; -inf where nothing is visible.
    """
    batch, heads, count, width = queries.shape
    groups, visual = keys.shape[1:3]
    grouped = queries.reshape(batch, groups, heads // groups * count, width)  # heads of a group share its keys
    logits = (grouped @ keys.transpose(-1, -2)).float().view(batch, heads, count, visual) * scaling
    # A finite number, so that a query that sees nothing has no NaN in its gradient.
    logits = logits.masked_fill(~visible[:, None], torch.finfo(torch.float32).min / 2)
    shares = logits.log_softmax(dim=-1).logsumexp(dim=1) - log(heads)
    return shares.masked_fill(~visible, float("-inf"))
