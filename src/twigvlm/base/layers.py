"""Run decoder layers, whole or in part; the same code runs the base's layers and the twig's."""

from collections.abc import Iterable
from typing import Any, cast

from jaxtyping import Float
from torch import Tensor, nn

from twigvlm import compat
from twigvlm.base.cpu_linear import cpu_linear
from twigvlm.base.masks import Masks, restrict
from twigvlm.base.token_inputs import TokenInputs, rotate
from twigvlm.kv.cache import CacheView


def run(
    layers: Iterable[nn.Module],
    hidden: Float[Tensor, "batch tokens width"],
    inputs: TokenInputs,
    masks: Masks,
    view: CacheView | None = None,
    layer_idx: int = 0,
) -> Float[Tensor, "batch tokens width"]:
    """Run decoder layers in order; layer i writes layer `layer_idx + i` of the cache, after what its rows hold.

    Layers may lie on several devices, each of which moves its input to its own; the result returns to where `hidden` was.
    The pass ends with the view's `advance`, which is the caller's to do.

    Args:
        layers: the layers.
        hidden: input of the first one.
        inputs: inputs of the same tokens.
        masks: who sees whom by order in the cache; sliding windows and bidirectional images are added to it.
        view: rows of the cache; None: there is no cache.
        layer_idx: layer of the cache that the first one writes.
    """
    tokens, device = hidden.shape[1], hidden.device
    made: dict[tuple[int, int | None], Tensor | None] = {}
    for index, layer in enumerate(layers, start=layer_idx):
        attention = cast(Any, layer).self_attn
        window = window_of(layer)
        key = -1 if view is None else view.cache.segment(index), window
        if key not in made:
            mask = masks(tokens, None if view is None else view.held(index))
            if window is not None or inputs.attends_until is not None:
                queries = _known(inputs.positions)
                keys = queries if view is None or window is None else view.positions(index, queries)
                implementation = compat.attention_implementation(attention.config)
                mask = restrict(mask, implementation, hidden.dtype, queries, keys, inputs.attends_until, window)
            made[key] = mask
        with cpu_linear(layer, hidden):
            hidden = layer(
                hidden,
                attention_mask=made[key],
                position_embeddings=inputs.rotary(_kind(attention)),
                **{compat.CACHE: view},
            )
        if index < len(inputs.deepstack):
            hidden = hidden + inputs.deepstack[index].to(hidden)
    return hidden.to(device)


def window_of(layer: nn.Module) -> int | None:
    """How many tokens a decoder layer looks back, itself included; None: all."""
    # Missing-attribute lookup on nn.Module is slow, and this is asked at each step.
    attributes = vars(compat.uncompiled(cast(Any, layer).self_attn))
    if "sliding_window" in attributes:
        return cast("int | None", attributes["sliding_window"])
    return cast("int | None", vars(attributes["config"]).get("sliding_window"))  # of all its layers, as in Mistral


def rotary_of(layer: nn.Module, inputs: TokenInputs) -> tuple[Tensor, Tensor]:
    """(cos, sin) by which a decoder layer rotates tokens."""
    return inputs.rotary(_kind(cast(Any, layer).self_attn))


def project_queries(
    layer: nn.Module, hidden: Float[Tensor, "batch tokens width"], inputs: TokenInputs
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """The rotated queries that a decoder layer would make of its input."""
    attention = cast(Any, layer).self_attn
    return _heads(attention, "q", cast(Any, layer).input_layernorm(hidden), inputs)


def project_keys(
    layer: nn.Module, hidden: Float[Tensor, "batch tokens width"], inputs: TokenInputs
) -> Float[Tensor, "batch kv_heads tokens head_dim"]:
    """The rotated keys that a decoder layer would make of its input."""
    attention = cast(Any, layer).self_attn
    return _heads(attention, "k", cast(Any, layer).input_layernorm(hidden), inputs)


def project_keys_values(
    layer: nn.Module, hidden: Float[Tensor, "batch tokens width"], inputs: TokenInputs
) -> tuple[Float[Tensor, "batch kv_heads tokens head_dim"], Float[Tensor, "batch kv_heads tokens head_dim"]]:
    """The rotated keys, and the values, that a decoder layer would make of its input."""
    attention = cast(Any, layer).self_attn
    normed = cast(Any, layer).input_layernorm(hidden)
    values = attention.v_proj(normed).to(hidden.device).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    return _heads(attention, "k", normed, inputs), values


def fill(
    layer: nn.Module, hidden: Float[Tensor, "batch tokens width"], inputs: TokenInputs, view: CacheView, layer_idx: int
) -> None:
    """Put a decoder layer's keys and values into the cache without running it."""
    keys, values = project_keys_values(layer, hidden, inputs)
    if window_of(layer) is not None:
        view.positions(layer_idx, _known(inputs.positions))
    view.update(keys, values, layer_idx)


def _heads(attention: Any, which: str, normed: Tensor, inputs: TokenInputs) -> Tensor:
    states = getattr(attention, f"{which}_proj")(normed).unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{which}_norm", None)  # families that normalise queries and keys per head
    states = (states if norm is None else norm(states)).to(inputs.cos.device)
    return rotate(states.transpose(1, 2), *inputs.rotary(_kind(attention)))


def _kind(attention: Any) -> str | None:
    return cast("str | None", vars(compat.uncompiled(attention)).get("layer_type"))


def _known(positions: Tensor | None) -> Tensor:
    if positions is None:
        raise ValueError(
            "layers with a sliding window need the positions of tokens: take them from BaseVLM.token_inputs"
        )
    return positions
