"""The method's own ranking: the attention of the last twig layer (§3.3)."""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from twigvlm.pruning.attention_rows import attention_rows, attention_scores
from twigvlm.pruning.view import Tokens, TrunkOutput, last_mask

Queries = Literal["last", "text"]
"""Whose attention ranks: the last prompt token's (as the published code), or the sum over all text tokens (Eq. 3)."""


@dataclass(frozen=True)
class TwigAttention:
    """Scores by the attention of the last twig layer (§3.3, Eq. 3); leaves the prompt in the twig's cache."""

    queries: Queries = "last"
    """Whose attention is summed."""

    def __call__(self, trunk: TrunkOutput) -> Float[Tensor, "batch tokens"]:
        """Scores in float32; 0 at text tokens.

        Raises:
            TwigVLMError: the model has no twig.
        """
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
    """Scores by the attention of any decoder layer, base or twig: float32, and 0 at text tokens.

    Args:
        layer: the decoder layer.
        hidden: its input.
        keys: its rotated keys of all tokens.
        tokens: which of them are visual, and their per-token inputs.
        queries: whose attention is summed.
    """
    asking = tokens.text if queries == "text" else last_mask(tokens.lengths, hidden.shape[1], hidden.device)
    return attention_scores(attention_rows(layer, hidden, keys, tokens.inputs, asking), tokens.visual)
