"""The method's own ranking: the attention of the last twig layer (§3.3)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from twigvlm.base.layers import project_queries, window_of
from twigvlm.base.positions import Rope, select_rope
from twigvlm.pruning.scores import attention_scores

if TYPE_CHECKING:
    from twigvlm.decoding.prefill import Trunk

Queries = Literal["last", "text"]
"""Whose attention ranks: the last prompt token's (as the published code), or the sum over all text tokens (Eq. 3)."""


@dataclass(frozen=True)
class TwigAttention:
    """Scores by the last twig layer; leaves the prompt in the twig's cache."""

    queries: Queries = "last"

    def __call__(self, trunk: "Trunk") -> Tensor:
        """Scores [batch, tokens]."""
        hidden = trunk.grow()
        keys, _ = trunk.cache.held(trunk.twig.last_slot)
        return layer_scores(trunk.twig.layers[-1], hidden, trunk.rope, keys, trunk.prompt.visual_mask, self.queries)


def layer_scores(
    layer: nn.Module, hidden: Tensor, rope: Rope, keys: Tensor, visual_mask: Tensor, queries: Queries
) -> Tensor:
    """Scores [batch, tokens] by the attention of any decoder layer, base or twig.

    Args:
        layer: the decoder layer.
        hidden: its input, [batch, tokens, width].
        rope: of all tokens.
        keys: its rotated keys of all tokens, [batch, kv_heads, tokens, head_dim].
        visual_mask: True at visual tokens, [batch, tokens].
        queries: whose attention is summed.
    """
    rows = torch.arange(hidden.shape[1], device=hidden.device)
    rows = rows[-1:] if queries == "last" else rows[~visual_mask[0]]
    index = rows.expand(len(hidden), -1)
    row_queries = project_queries(layer, hidden[:, rows], select_rope(rope, index))
    scaling = cast(Any, layer).self_attn.scaling
    return attention_scores(row_queries, keys, scaling, rows, visual_mask, window_of(layer))
