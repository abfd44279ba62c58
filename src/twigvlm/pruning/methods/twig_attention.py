"""The method's own ranking: the attention of the last twig layer (§3.3)."""

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from twigvlm.base.layers import project_queries, window_of
from twigvlm.base.packing import Lengths, left_pack
from twigvlm.base.token_inputs import select_tokens
from twigvlm.pruning.attention_rows import attention_scores
from twigvlm.pruning.select import gather_tokens
from twigvlm.pruning.view import Tokens, TrunkOutput

Queries = Literal["last", "text"]
"""Whose attention ranks: the last prompt token's (as the published code), or the sum over all text tokens (Eq. 3)."""


@dataclass(frozen=True)
class TwigAttention:
    """Scores by the last twig layer; leaves the prompt in the twig's cache."""

    queries: Queries = "last"

    def __call__(self, trunk: TrunkOutput) -> Tensor:
        """Scores [batch, tokens]."""
        hidden = trunk.fill_twig()
        keys, _ = trunk.view.cache.contents(trunk.twig.last_layer_idx, trunk.view.rows)
        return layer_scores(trunk.twig.layers[-1], hidden, keys, trunk.tokens, self.queries)


def layer_scores(
    layer: nn.Module,
    hidden: Float[Tensor, "batch tokens width"],
    keys: Float[Tensor, "batch kv_heads tokens head_dim"],
    tokens: Tokens,
    queries: Queries,
) -> Float[Tensor, "batch tokens"]:
    """Scores by the attention of any decoder layer, base or twig.

    Args:
        layer: the decoder layer.
        hidden: its input.
        keys: its rotated keys of all tokens.
        tokens: which of them are visual, and their per-token inputs.
        queries: whose attention is summed.
    """
    if queries == "last":
        counts: Lengths = (1,) * len(hidden)
        rows = torch.tensor(tokens.lengths, device=hidden.device)[:, None] - 1
    else:
        rows, counts = left_pack(tokens.text)
    inputs = select_tokens(tokens.inputs, rows)
    row_queries = project_queries(layer, gather_tokens(hidden, rows), inputs)
    scaling, window, at = cast(Any, layer).self_attn.scaling, window_of(layer), tokens.inputs.positions
    query_positions = rows if inputs.positions is None else inputs.positions
    return attention_scores(
        row_queries, keys, scaling, query_positions, counts, tokens.visual, window, key_positions=at
    )
