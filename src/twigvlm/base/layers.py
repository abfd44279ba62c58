"""Running decoder layers, whole or in part; the same code runs the base's layers and the twig's."""

from collections.abc import Iterable
from typing import Any, cast

from jaxtyping import Float
from torch import Tensor, nn

from twigvlm.base.cache import LayeredCache
from twigvlm.base.masks import Masks
from twigvlm.base.positions import Rope, rotate


def run(
    layers: Iterable[nn.Module],
    hidden: Float[Tensor, "batch tokens width"],
    rope: Rope,
    masks: Masks,
    cache: LayeredCache | None = None,
    slot: int = 0,
) -> Float[Tensor, "batch tokens width"]:
    """Run decoder layers in order; layer i reads and extends slot `slot + i` of the cache."""
    tokens = hidden.shape[1]
    keys, mask = -1, None
    for offset, layer in enumerate(layers):
        total = tokens + (0 if cache is None else cache.lengths[slot + offset])
        if total != keys:
            keys, mask = total, masks(tokens, total)
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rope, past_key_values=cache)
    return hidden


def project_queries(
    layer: nn.Module, hidden: Float[Tensor, "batch tokens width"], rope: Rope
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """The rotated queries that a decoder layer would make of its input."""
    attention = cast(Any, layer).self_attn
    return _heads(attention, "q", cast(Any, layer).input_layernorm(hidden), rope)


def project_keys(
    layer: nn.Module, hidden: Float[Tensor, "batch tokens width"], rope: Rope
) -> Float[Tensor, "batch kv_heads tokens head_dim"]:
    """The rotated keys that a decoder layer would make of its input."""
    attention = cast(Any, layer).self_attn
    return _heads(attention, "k", cast(Any, layer).input_layernorm(hidden), rope)


def project_keys_values(
    layer: nn.Module, hidden: Float[Tensor, "batch tokens width"], rope: Rope
) -> tuple[Float[Tensor, "batch kv_heads tokens head_dim"], Float[Tensor, "batch kv_heads tokens head_dim"]]:
    """The rotated keys, and the values, that a decoder layer would make of its input."""
    attention = cast(Any, layer).self_attn
    normed = cast(Any, layer).input_layernorm(hidden)
    values = attention.v_proj(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    return _heads(attention, "k", normed, rope), values


def _heads(attention: Any, which: str, normed: Tensor, rope: Rope) -> Tensor:
    states = getattr(attention, f"{which}_proj")(normed).unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{which}_norm", None)  # families that normalise queries and keys per head
    return rotate((states if norm is None else norm(states)).transpose(1, 2), *rope)
