"""Progress decoder layers, whole or in part; the same code runs the base's layers and the twig's."""

from collections.abc import Iterable
from typing import Any, cast

from jaxtyping import Float
from torch import Tensor, nn

from twigvlm.base.cpu_linear import cpu_linear
from twigvlm.base.masks import Masks, placed
from twigvlm.base.packing import Lengths
from twigvlm.base.token_inputs import TokenInputs, rotate
from twigvlm.kv.cache import KVCache


def run(
    layers: Iterable[nn.Module],
    hidden: Float[Tensor, "batch tokens width"],
    rope: TokenInputs,
    masks: Masks,
    cache: KVCache | None = None,
    slot: int = 0,
) -> Float[Tensor, "batch tokens width"]:
    """Run decoder layers in order; layer i reads and extends slot `slot + i` of the cache.

    Layers may lie on several devices, each of which moves its input to its own; the result returns to where `hidden` was.
    """
    (batch, tokens), device = hidden.shape[:2], hidden.device
    made: dict[tuple[Lengths, int | None], Tensor | None] = {}
    for index, layer in enumerate(layers, start=slot):
        attention = cast(Any, layer).self_attn
        held = (0,) * batch if cache is None else cache.lengths[index] or (0,) * batch
        window = window_of(layer)
        keys = rope.places
        if window is not None and cache is not None:
            keys = cache.place(index, _known(keys))
        if (held, window) not in made:
            mask = masks(tokens, held)
            if window is not None or rope.attends_until is not None:
                implementation = attention.config._attn_implementation
                places = _known(rope.places)
                mask = placed(mask, implementation, hidden.dtype, places, _known(keys), rope.attends_until, window)
            made[held, window] = mask
        with cpu_linear(hidden):
            hidden = layer(
                hidden,
                attention_mask=made[held, window],
                position_embeddings=rope.of(_kind(attention)),
                past_key_values=cache,
            )
        if index < len(rope.deepstack):
            hidden = hidden + rope.deepstack[index].to(hidden)
    return hidden.to(device)


def window_of(layer: nn.Module) -> int | None:
    """How many tokens a decoder layer looks back, itself included; None: all."""
    # a module's getattr of what is not there is slow, and this is asked at each step
    own = vars(cast(Any, layer).self_attn)
    if "sliding_window" in own:
        return cast("int | None", own["sliding_window"])
    return cast("int | None", vars(own["config"]).get("sliding_window"))  # of all its layers, as in Mistral


def project_queries(
    layer: nn.Module, hidden: Float[Tensor, "batch tokens width"], rope: TokenInputs
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """The rotated queries that a decoder layer would make of its input."""
    attention = cast(Any, layer).self_attn
    return _heads(attention, "q", cast(Any, layer).input_layernorm(hidden), rope)


def project_keys(
    layer: nn.Module, hidden: Float[Tensor, "batch tokens width"], rope: TokenInputs
) -> Float[Tensor, "batch kv_heads tokens head_dim"]:
    """The rotated keys that a decoder layer would make of its input."""
    attention = cast(Any, layer).self_attn
    return _heads(attention, "k", cast(Any, layer).input_layernorm(hidden), rope)


def project_keys_values(
    layer: nn.Module, hidden: Float[Tensor, "batch tokens width"], rope: TokenInputs
) -> tuple[Float[Tensor, "batch kv_heads tokens head_dim"], Float[Tensor, "batch kv_heads tokens head_dim"]]:
    """The rotated keys, and the values, that a decoder layer would make of its input."""
    attention = cast(Any, layer).self_attn
    normed = cast(Any, layer).input_layernorm(hidden)
    values = attention.v_proj(normed).to(hidden.device).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    return _heads(attention, "k", normed, rope), values


def fill(
    layer: nn.Module, hidden: Float[Tensor, "batch tokens width"], rope: TokenInputs, cache: KVCache, slot: int
) -> None:
    """Put a decoder layer's keys and values into the cache without running it."""
    keys, values = project_keys_values(layer, hidden, rope)
    if window_of(layer) is not None:
        cache.place(slot, _known(rope.places))
    cache.update(keys, values, slot)


def _heads(attention: Any, which: str, normed: Tensor, rope: TokenInputs) -> Tensor:
    states = getattr(attention, f"{which}_proj")(normed).unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{which}_norm", None)  # families that normalise queries and keys per head
    states = (states if norm is None else norm(states)).to(rope.cos.device)
    return rotate(states.transpose(1, 2), *rope.of(_kind(attention)))


def _kind(attention: Any) -> str | None:
    return cast("str | None", vars(attention).get("layer_type"))


def _known(places: Tensor | None) -> Tensor:
    if places is None:
        raise ValueError(
            "layers with a sliding window need the places of tokens: take the rope from BaseVLM.token_inputs"
        )
    return places
