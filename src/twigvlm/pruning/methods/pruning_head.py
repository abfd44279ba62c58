"""The method's ranking with a P-Head (Eq. 7 and 8)."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from twigvlm.base.layers import project_keys, project_queries, window_of
from twigvlm.base.packing import left_pack, valid_mask
from twigvlm.base.token_inputs import TokenInputs, select_tokens
from twigvlm.pruning.attention_rows import visual_attention
from twigvlm.pruning.methods.twig_attention import TwigAttention
from twigvlm.pruning.select import gather_tokens
from twigvlm.pruning.view import Scorer, TrunkOutput, last_mask
from twigvlm.twig.block import Twig
from twigvlm.twig.pruning_head import PruningHead


@dataclass(frozen=True)
class VisualQuery:
    """Query and visual positions, and which pairs may attend; padded pairs are invisible."""

    queries: Int[Tensor, "batch queries"]
    """Positions of the tokens that ask."""
    visual: Int[Tensor, "batch visual"]
    """Positions of the visual tokens, ascending."""
    visible: Bool[Tensor, "batch queries visual"]
    """True where neither of the two is padding and the visual token comes before the query."""

    @classmethod
    def at(cls, asking: Bool[Tensor, "batch tokens"], visual_mask: Bool[Tensor, "batch tokens"]) -> "VisualQuery":
        """The pairs of the tokens that ask and the visual tokens.

        Args:
            asking: True at the tokens that ask.
            visual_mask: True at visual tokens.
        """
        (queries, asks), (visual, shown) = left_pack(asking), left_pack(visual_mask)
        before = visual[:, None, :] < queries[:, :, None]
        device = asking.device
        both = (
            valid_mask(asks, queries.shape[1], device)[:, :, None]
            & valid_mask(shown, visual.shape[1], device)[:, None, :]
        )
        return cls(queries, visual, both & before)


def ranking_queries(
    layer: nn.Module, head: PruningHead | None, hidden: Float[Tensor, "batch queries width"], inputs: TokenInputs
) -> Float[Tensor, "batch heads queries head_dim"]:
    """A decoder layer's rotated queries, gated where there is a P-Head (Eq. 7).

    Args:
        layer: base or twig layer.
        head: P-Head on it; None: there is none.
        hidden: its input at the tokens that ask.
        inputs: inputs of the same tokens.
    """
    queries = project_queries(layer, hidden, inputs)
    return queries if head is None else head.gate_queries(cast(Any, layer).input_layernorm(hidden), queries)


def ranking_keys(
    layer: nn.Module,
    head: PruningHead | None,
    hidden: Float[Tensor, "batch visual width"],
    inputs: TokenInputs,
    rotated: Float[Tensor, "batch kv_heads visual head_dim"] | None = None,
) -> Float[Tensor, "batch key_heads visual head_dim"]:
    """A decoder layer's rotated keys, in kv_heads; gated where there is a P-Head, then in all H heads (Eq. 7).

    Args:
        layer: base or twig layer.
        head: P-Head on it; None: there is none.
        hidden: its input at the visual tokens.
        inputs: inputs of the same tokens.
        rotated: the layer's rotated keys, where they are known.
    """
    keys = project_keys(layer, hidden, inputs) if rotated is None else rotated
    return keys if head is None else head.gate_keys(cast(Any, layer).input_layernorm(hidden), keys)


def log_visual_attention(
    layer: nn.Module,
    hidden: Float[Tensor, "batch tokens width"],
    inputs: TokenInputs,
    query: VisualQuery,
    head: PruningHead | None = None,
    keys: Float[Tensor, "batch kv_heads tokens head_dim"] | None = None,
) -> Float[Tensor, "batch queries visual"]:
    """Logarithm of a decoder layer's attention restricted to visual tokens, or of a P-Head's scores s on that layer (Eq. 7).

    Args:
        layer: base or twig layer.
        hidden: its input.
        inputs: inputs of all tokens.
        query: which tokens attend to which visual tokens.
        head: P-Head; None: the layer's own attention.
        keys: the layer's rotated keys of all tokens, where they are known.

    Returns:
        The logarithm in float32, entry [b, i, j] for the queries and visual tokens of `query`; -inf where they may not attend.
    """
    asking, seen = gather_tokens(hidden, query.queries), gather_tokens(hidden, query.visual)
    queries = ranking_queries(layer, head, asking, select_tokens(inputs, query.queries))
    if keys is not None:
        keys = torch.take_along_dim(keys, query.visual[:, None, :, None], dim=2)
    keys = ranking_keys(layer, head, seen, select_tokens(inputs, query.visual), keys)
    visible, window = query.visible, window_of(layer)
    if head is None and window is not None:  # a P-Head looks at all visual tokens
        visible = visible & (query.visual[:, None, :] > query.queries[:, :, None] - window)
    return visual_attention(queries, keys, cast(Any, layer).self_attn.scaling, visible)


@dataclass(frozen=True)
class HeadScores:
    """Scores by the twig's P-Head at the last prompt token (Eq. 8); leaves the prompt in the twig's cache."""

    def __call__(self, trunk: TrunkOutput) -> Float[Tensor, "batch tokens"]:
        """Scores in float32, which sum up to 1 in each prompt; 0 at text tokens.

        Raises:
            TwigVLMError: the model has no twig.
        """
        twig, tokens = trunk.twig, trunk.tokens
        mask = tokens.visual
        hidden = trunk.fill_twig()
        keys, _ = trunk.view.cache.contents(twig.last_layer_idx, trunk.view.rows)
        query = VisualQuery.at(last_mask(tokens.lengths, mask.shape[1], mask.device), mask)
        shares = log_visual_attention(twig.layers[-1], hidden, tokens.inputs, query, twig.pruning_head, keys)[
            :, 0
        ].exp()
        return torch.zeros(mask.shape, device=mask.device).scatter_add(1, query.visual, shares)


def default_scorer(twig: Twig) -> Scorer:
    """The twig's own ranking: its P-Head's, or without one its last layer's attention."""
    return TwigAttention() if twig.pruning_head is None else HeadScores()
