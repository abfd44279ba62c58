"""A key-value cache with one length per layer, because pruning leaves three of them."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


class LayeredCache:
    """Keys and values of L base layers and T twig layers (slots L..L+T-1), each in a buffer that grows in place.

    Decoder layers call `update` as they would call a transformers `Cache`. Buffers are longer than what they hold, so
    that a decoding step writes its tokens and copies nothing else; what the layers get are views.

    Args:
        slots: number of layers, L + T.
        reserve: tokens that a buffer has room for beyond what first filled it.
    """

    def __init__(self, slots: int, reserve: int) -> None:
        self.reserve = max(reserve, 1)
        self.keys: list[Tensor | None] = [None] * slots
        self.values: list[Tensor | None] = [None] * slots
        self.lengths: list[int] = [0] * slots
        self.places: list[Tensor | None] = [None] * slots

    def length(self, layer: int) -> int:
        """Tokens that a layer holds."""
        return self.lengths[layer]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """`length`, by the name that transformers' modules use."""
        return self.lengths[layer_idx]

    def update(
        self,
        key_states: Float[Tensor, "batch kv_heads new head_dim"],
        value_states: Float[Tensor, "batch kv_heads new value_dim"],
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[Float[Tensor, "batch kv_heads total head_dim"], Float[Tensor, "batch kv_heads total value_dim"]]:
        """Append new tokens to a layer and return all that it holds."""
        start = self.lengths[layer_idx]
        stop = start + key_states.shape[-2]
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        if keys is None or values is None or stop > keys.shape[-2]:
            keys = self.keys[layer_idx] = _grown(keys, key_states, start, stop + self.reserve)
            values = self.values[layer_idx] = _grown(values, value_states, start, stop + self.reserve)
        keys[:, :, start:stop] = key_states
        values[:, :, start:stop] = value_states
        self.lengths[layer_idx] = stop
        return keys[:, :, :stop], values[:, :, :stop]

    def place(self, layer: int, places: Int[Tensor, "batch new"]) -> Int[Tensor, "batch total"]:
        """Note where in the unpruned sequence the tokens of the next update stand; the places of all, those included."""
        known = self.places[layer]
        if known is not None:
            places = torch.cat((known[:, : self.lengths[layer]], places), dim=1)
        self.places[layer] = places
        return places

    def held(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, [batch, kv_heads, length, head_dim], as views."""
        keys, values = self.keys[layer], self.values[layer]
        if keys is None or values is None:
            raise IndexError(f"layer {layer} of the cache is empty")
        return keys[:, :, : self.lengths[layer]], values[:, :, : self.lengths[layer]]

    def borrow(self, other: "LayeredCache", layer: int, batch: int) -> None:
        """Fill an empty layer with what another cache's one row holds of it, for a batch of rows."""
        keys, values = other.held(layer)
        places = other.places[layer]
        if places is not None:
            self.place(layer, places[:, : other.lengths[layer]].expand(batch, -1))
        self.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), layer)

    def truncate(self, start: int, stop: int, length: int) -> None:
        """Layers start..stop-1 forget all but their first `length` tokens."""
        for layer in range(start, stop):
            self.lengths[layer] = min(self.lengths[layer], length)

    def keep(self, start: int, stop: int, added: int, kept: Sequence[int]) -> None:
        """Of their last `added` tokens, layers start..stop-1 keep those at `kept` (from 0, ascending), in that order.

        Tokens that are in their place already are not touched: keeping the first few copies nothing.
        """
        in_place = next((place for place, token in enumerate(kept) if place != token), len(kept))
        moved: Tensor | None = None
        for layer in range(start, stop):
            first = self.lengths[layer] - added
            for buffer in (self.keys[layer], self.values[layer]):
                if buffer is None or in_place == len(kept):
                    continue
                if moved is None:
                    moved = torch.tensor(kept[in_place:], device=buffer.device)
                tail = buffer[:, :, first : first + added]
                tail[:, :, in_place : len(kept)] = tail.index_select(2, moved.to(buffer.device))
            places = self.places[layer]
            if places is not None and moved is not None:
                tail = places[:, first : first + added].index_select(1, moved.to(places.device))
                self.places[layer] = torch.cat((places[:, : first + in_place], tail), dim=1)
            self.lengths[layer] = first + len(kept)


def _grown(old: Tensor | None, like: Tensor, held: int, capacity: int) -> Tensor:
    batch, heads, _, width = like.shape
    if old is not None:
        capacity = max(capacity, old.shape[-2] * 3 // 2)
    new = like.new_empty(batch, heads, capacity, width)
    if old is not None:
        new[:, :, :held] = old[:, :, :held]
    return new
