"""A key-value cache with one length per layer and row: pruning makes layers differ, and speculation makes rows differ."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from twigvlm.base.packing import Lengths


class KVCache:
    """Keys and values of L base layers and T twig layers (slots L..L+T-1), each in a buffer that grows in place.

    Decoder layers call `update` as they would call a transformers `Cache`. Buffers are longer than what they hold, so
    that a decoding step writes its tokens and copies nothing else; what the layers get are views. A row's tokens are the
    first ones of its buffer; what stands behind them, where other rows hold more, is for the masks to hide.

    Args:
        slots: number of layers, L + T.
        reserve: tokens that a buffer has room for beyond what first filled it.
    """

    def __init__(self, slots: int, reserve: int) -> None:
        self.reserve = max(reserve, 1)
        self.keys: list[Tensor | None] = [None] * slots
        self.values: list[Tensor | None] = [None] * slots
        self.places: list[Tensor | None] = [None] * slots
        self.lengths: list[Lengths] = [()] * slots
        """Of each slot: tokens that each row holds; () as long as nothing was put there."""
        self._spots: tuple[tuple[Lengths, int, torch.device], tuple[Tensor, Tensor]] | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of a layer's longest row, by the name that transformers' modules use."""
        return max(self.lengths[layer_idx], default=0)

    def update(
        self,
        key_states: Float[Tensor, "batch kv_heads new head_dim"],
        value_states: Float[Tensor, "batch kv_heads new value_dim"],
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[Float[Tensor, "batch kv_heads total head_dim"], Float[Tensor, "batch kv_heads total value_dim"]]:
        """Append new tokens to each row of a layer and return all that it holds."""
        batch, _heads, new, _width = key_states.shape
        held = self.lengths[layer_idx] or (0,) * batch
        keys = self.keys[layer_idx] = self._written(self.keys[layer_idx], key_states, held)
        values = self.values[layer_idx] = self._written(self.values[layer_idx], value_states, held)
        self.lengths[layer_idx] = tuple(length + new for length in held)
        total = max(held) + new
        return keys[:, :, :total], values[:, :, :total]

    def place(self, layer: int, places: Int[Tensor, "batch new"]) -> Int[Tensor, "batch total"]:
        """Note where in the unpruned sequence the tokens of the next update stand; the places of all, those included."""
        held = self.lengths[layer] or (0,) * len(places)
        known = self.places[layer] = self._written(self.places[layer], places[:, None, :, None], held)
        return known[:, 0, : max(held) + places.shape[1], 0]

    def held(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, [batch, kv_heads, most of any row, head_dim], as views."""
        keys, values = self.keys[layer], self.values[layer]
        if keys is None or values is None:
            raise IndexError(f"layer {layer} of the cache is empty")
        most = max(self.lengths[layer])
        return keys[:, :, :most], values[:, :, :most]

    def borrow(self, other: "KVCache", layer: int, batch: int) -> None:
        """Fill an empty layer with what another cache's one row holds of it, for a batch of rows."""
        keys, values = other.held(layer)
        places = other.places[layer]
        if places is not None:
            self.place(layer, places[:, 0, : keys.shape[2], 0].expand(batch, -1))
        self.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), layer)

    def truncate(self, start: int, stop: int, lengths: Sequence[int]) -> None:
        """Layers start..stop-1 forget all but the first so many tokens of each row."""
        for layer in range(start, stop):
            self.lengths[layer] = tuple(min(pair) for pair in zip(self.lengths[layer], lengths, strict=False))

    def keep(self, start: int, stop: int, added: int, kept: Sequence[Sequence[int]]) -> None:
        """Of each row's last `added` tokens, layers start..stop-1 keep those at `kept[row]` (from 0), in that order.

        Where each row keeps its first few, nothing is copied.
        """
        most = max(map(len, kept))
        order = [[*row, *range(len(row), most)] for row in kept]
        in_place = all(row == list(range(most)) for row in order)
        moves: dict[tuple[Lengths, torch.device], tuple[Tensor, Tensor, Tensor]] = {}
        for layer in range(start, stop):
            lengths = self.lengths[layer]
            if not lengths:
                continue
            for buffer in () if in_place else (self.keys[layer], self.values[layer], self.places[layer]):
                if buffer is None:
                    continue
                if (lengths, buffer.device) not in moves:
                    first = [length - added for length in lengths]
                    rows, old = _rows_and(order, first, buffer.device)
                    moves[lengths, buffer.device] = (
                        rows,
                        old,
                        _rows_and([list(range(most))] * len(order), first, buffer.device)[1],
                    )
                rows, old, new = moves[lengths, buffer.device]
                buffer[rows, :, new] = buffer[rows, :, old]
            self.lengths[layer] = tuple(length - added + len(row) for length, row in zip(lengths, kept, strict=True))

    def select(self, rows: Sequence[int]) -> None:
        """Forget all rows but these."""
        for layer, lengths in enumerate(self.lengths):
            if lengths:
                for buffers in (self.keys, self.values, self.places):
                    buffer = buffers[layer]
                    if buffer is not None:
                        buffers[layer] = buffer.index_select(0, torch.tensor(rows, device=buffer.device))
                self.lengths[layer] = tuple(lengths[row] for row in rows)

    def _written(self, buffer: Tensor | None, new: Tensor, held: Lengths) -> Tensor:
        """The buffer, or a larger one, with new tokens behind those that its rows hold."""
        longest, count = max(held), new.shape[2]
        if buffer is None or longest + count > buffer.shape[2]:
            buffer = _grown(buffer, new, longest, longest + count + self.reserve)
        if min(held) == longest:
            buffer[:, :, longest : longest + count] = new
        else:
            key = held, count, buffer.device
            if self._spots is None or self._spots[0] != key:
                self._spots = key, _rows_and([list(range(count))] * len(held), held, buffer.device)
            rows, spots = self._spots[1]
            buffer[rows, :, spots] = new.transpose(1, 2)
        return buffer


def _rows_and(
    order: list[list[int]], first: Sequence[int], device: torch.device
) -> tuple[Int[Tensor, "batch 1"], Int[Tensor, "batch tokens"]]:
    """Indices of rows and of tokens counted from each row's first one, as they go into one indexing operation."""
    spots = [[start + place for place in row] for start, row in zip(first, order, strict=True)]
    return torch.arange(len(order), device=device)[:, None], torch.tensor(spots, device=device)


def _grown(old: Tensor | None, like: Tensor, held: int, capacity: int) -> Tensor:
    batch, heads, _, width = like.shape
    if old is not None:
        capacity = max(capacity, old.shape[2] * 3 // 2)
    # of what no row has written yet, masked or not, a NaN would go through
    new = like.new_zeros(batch, heads, capacity, width)
    if old is not None:
        new[:, :, :held] = old[:, :, :held]
    return new
