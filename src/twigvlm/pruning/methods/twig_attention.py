"""The method's own ranking: the attention of the last twig layer (§3.3)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from twigvlm.base.layers import project_queries, window_of
from twigvlm.base.packing import Lengths, left_pack, valid_mask
from twigvlm.base.prompt import Prompt
from twigvlm.base.token_inputs import TokenInputs, select_tokens
from twigvlm.pruning.attention_rows import attention_scores
from twigvlm.pruning.select import gather_tokens

if TYPE_CHECKING:
    from twigvlm.engine.prefill import TrunkOutput

Queries = Literal["last", "text"]
"""Whose attention ranks: the last prompt token's (as the published code), or the sum over all text tokens (Eq. 3)."""


@dataclass(frozen=True)
class TwigAttention:
    """Scores by the last twig layer; leaves the prompt in the twig's cache."""

    queries: Queries = "last"

    def __call__(self, trunk: "TrunkOutput") -> Tensor:
        """Scores [batch, tokens]."""
        hidden = trunk.grow()
        keys, _ = trunk.cache.held(trunk.twig.last_slot)
        return layer_scores(trunk.twig.layers[-1], hidden, trunk.rope, keys, trunk.prompt, self.queries)


def layer_scores(
    layer: nn.Module, hidden: Tensor, rope: TokenInputs, keys: Tensor, prompt: Prompt, queries: Queries
) -> Tensor:
    """Scores [batch, tokens] by the attention of any decoder layer, base or twig.

    Args:
        layer: the decoder layer.
        hidden: its input, [batch, tokens, width].
        rope: of all tokens.
        keys: its rotated keys of all tokens, [batch, kv_heads, tokens, head_dim].
        prompt: what it is scored for.
        queries: whose attention is summed.
    """
    if queries == "last":
        counts: Lengths = (1,) * len(hidden)
        rows = torch.tensor(prompt.lengths, device=hidden.device)[:, None] - 1
    else:
        rows, counts = left_pack(valid_mask(prompt.lengths, hidden.shape[1], hidden.device) & ~prompt.visual_mask)
    row_queries = project_queries(layer, gather_tokens(hidden, rows), select_tokens(rope, rows))
    scaling = cast(Any, layer).self_attn.scaling
    return attention_scores(row_queries, keys, scaling, rows, counts, prompt.visual_mask, window_of(layer))
