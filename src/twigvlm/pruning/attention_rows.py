"""Importance of visual tokens: rows of an attention map that is never materialised (§3.3, Eq. 3)."""

from collections.abc import Iterator
from math import log

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from twigvlm.base.packing import Lengths, valid_mask


def attention_chunks(
    queries: Float[Tensor, "batch heads queries head_dim"],
    keys: Float[Tensor, "batch kv_heads tokens head_dim"],
    scaling: float,
    query_positions: Int[Tensor, "batch queries"],
    window: int | None = None,
    chunk: int = 32,
    key_positions: Int[Tensor, "batch tokens"] | None = None,
    attends_until: Int[Tensor, "batch queries"] | None = None,
) -> Iterator[tuple[slice, Float[Tensor, "batch heads part tokens"]]]:
    """Rows of a decoder layer's attention map, a few queries at a time: which queries, and their softmax over *all* keys.

    Works beside any attention kernel, because it needs the rotated queries and keys only, and for grouped-query attention.

    Args:
        queries: rotated queries.
        keys: rotated keys of all tokens.
        scaling: factor of the dot product (1/sqrt(head_dim) as a rule).
        query_positions: position of each query; it sees keys up to itself.
        window: how many tokens a query looks back, itself included; None: all.
        chunk: queries per matrix product, so that many queries need little memory.
        key_positions: of all tokens, ascending: those of the unpruned sequence where there is a window; None: 0, 1, 2, …
        attends_until: position of the last key that each query sees, where that is after itself (tokens of an image); None: no
            query sees beyond itself.
    """
    batch, heads, count, _ = queries.shape
    groups, tokens = keys.shape[1], keys.shape[2]
    keys_at = torch.arange(tokens, device=keys.device) if key_positions is None else key_positions[:, None]
    for start in range(0, count, chunk):
        part = slice(start, min(start + chunk, count))
        grouped = queries[:, :, part].reshape(batch, groups, -1, queries.shape[-1])  # heads of a group share its keys
        logits = (grouped @ keys.transpose(-1, -2)).float() * scaling
        logits = logits.view(batch, heads, -1, tokens)
        positions = query_positions[:, part, None]
        last = positions if attends_until is None else attends_until[:, part, None].maximum(positions)
        masked = keys_at > last
        if window is not None:
            masked |= keys_at <= positions - window
        yield part, logits.masked_fill(masked[:, None], float("-inf")).softmax(dim=-1)


def attention_scores(
    queries: Float[Tensor, "batch heads queries head_dim"],
    keys: Float[Tensor, "batch kv_heads tokens head_dim"],
    scaling: float,
    query_positions: Int[Tensor, "batch queries"],
    counts: Lengths,
    visual_mask: Bool[Tensor, "batch tokens"],
    window: int | None = None,
    chunk: int = 32,
    key_positions: Int[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch tokens"]:
    """Attention that visual tokens get: softmax over *all* keys, mean over heads, sum over the queries (Eq. 3).

    With the last prompt token as the only query this is the row that the published code ranks by.

    Args:
        queries: rotated queries.
        keys: rotated keys of all tokens.
        scaling: factor of the dot product (1/sqrt(head_dim) as a rule).
        query_positions: position of each query; it sees keys up to itself.
        counts: how many of the queries of each row are summed, the first ones.
        visual_mask: True at visual tokens.
        window: how many tokens a query looks back, itself included; None: all.
        chunk: queries per matrix product, so that many queries need little memory.
        key_positions: of all tokens, ascending: those of the unpruned sequence where there is a window; None: 0, 1, 2, …

    Returns:
        Scores in float32; 0 at text tokens.
    """
    scores = torch.zeros(visual_mask.shape, dtype=torch.float32, device=keys.device)
    asks = valid_mask(counts, query_positions.shape[1], keys.device)
    for part, shares in attention_chunks(queries, keys, scaling, query_positions, window, chunk, key_positions):
        scores += (shares.mean(dim=1) * asks[:, part, None]).sum(dim=1)
    return scores.masked_fill(~visual_mask, 0.0)


def visual_attention(
    queries: Float[Tensor, "batch heads queries head_dim"],
    keys: Float[Tensor, "batch kv_heads visual head_dim"],
    scaling: float,
    visible: Bool[Tensor, "batch queries visual"],
) -> Float[Tensor, "batch queries visual"]:
    """Attention restricted to visual tokens: softmax over *them alone*, mean over heads (Eq. 7).

    Args:
        queries: rotated queries.
        keys: rotated keys of visual tokens.
        scaling: factor of the dot product.
        visible: which of them a query sees.

    Returns:
        Its logarithm in float32, finite however small a share is; -inf where nothing is visible.
    """
    batch, heads, count, width = queries.shape
    groups, visual = keys.shape[1:3]
    grouped = queries.reshape(batch, groups, heads // groups * count, width)  # heads of a group share its keys
    logits = (grouped @ keys.transpose(-1, -2)).float().view(batch, heads, count, visual) * scaling
    # A finite number, so that a query that sees nothing has no NaN in its gradient.
    logits = logits.masked_fill(~visible[:, None], torch.finfo(torch.float32).min / 2)
    shares = logits.log_softmax(dim=-1).logsumexp(dim=1) - log(heads)
    return shares.masked_fill(~visible, float("-inf"))
