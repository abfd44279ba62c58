"""The key-value cache: a pool of rows; layers between two cuts hold equally many tokens of a row and share their lengths."""

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from twigvlm.kv.segments import Held, Segments


class KVCache(Segments):
    """Keys and values of L base layers and T twig layers (layers L..L+T-1) for the rows that are being decoded.

    Every layer has one buffer [rows, kv_heads, capacity, head_dim], written in place. A segment is a range of layers without
    a cut inside; its layers share their lengths, which are kept as in `Segments`. Claimed rows are always the first ones of
    the pool, so that a pass over all of them, or over rows that have just joined, works on views.

    Args:
        layers: number of layers, L + T.
        boundaries: layers at which a segment begins, besides 0; cuts add further ones.
        reserve: tokens that a buffer has room for beyond what first filled it.
        device: of the lengths.
    """

    def __init__(self, layers: int, boundaries: Iterable[int], reserve: int, device: torch.device) -> None:
        super().__init__(layers, boundaries, device)
        self.reserve = max(reserve, 1)
        self.keys: list[Tensor | None] = [None] * layers
        self.values: list[Tensor | None] = [None] * layers
        self.rows = 0
        """Claimed rows."""
        self._capacity = 0

    def claim(self, count: int) -> slice:
        """Take up that many rows; returns their range, which follows the rows that were claimed before. They hold no tokens.

        Where memory runs out, the error is raised and the cache stays as it was.
        """
        claimed = slice(self.rows, self.rows + count)
        if claimed.stop > self._capacity:
            self._widen(self.capacity_for(claimed.stop))
        self.rows = claimed.stop
        for states in (*self.keys, *self.values):
            if states is not None:
                states[claimed] = 0  # a released row may have left NaN, which a mask does not hide: 0 × NaN is NaN
        self._host[:, claimed] = 0
        self._device[:, claimed] = 0
        return claimed

    def capacity_for(self, rows: int) -> int:
        """Number of rows that the buffers have room for once that many are claimed: a quarter more, so that they grow seldom."""
        return self._capacity if rows <= self._capacity else max(rows, self._capacity * 5 // 4)

    def _widen(self, capacity: int) -> None:
        # Layer by layer, so that no more than one layer's buffers exist twice.
        more, everything = capacity - self._capacity, (self.keys, self.values, self._positions)
        try:
            for buffers in everything:
                for index, buffer in enumerate(buffers):
                    if buffer is not None:
                        buffers[index] = torch.cat((buffer, buffer.new_zeros(more, *buffer.shape[1:])))
            self._device = torch.nn.functional.pad(self._device, (0, more))
        except BaseException:
            for buffers in everything:
                buffers[:] = [None if buffer is None else buffer[: self._capacity] for buffer in buffers]
            raise
        self._host = np.pad(self._host, ((0, 0), (0, more)))
        self._capacity = capacity

    def release(self, row: int) -> None:
        """Give up a row; the last claimed row takes its place, the others are not touched. An empty cache holds no memory."""
        last = self.rows - 1
        if row != last:
            for buffer in (*self.keys, *self.values, *self._positions):
                if buffer is not None:
                    buffer[row] = buffer[last]
            self._host[:, row] = self._host[:, last]
            self._device[:, row] = self._device[:, last]
        self.rows -= 1
        if self.rows:
            self._shorten()
        else:
            self.keys, self.values = [None] * self.layers, [None] * self.layers
            self._positions = [None] * len(self.starts)
            self._host, self._device = self._host[:, :0], self._device[:, :0]
            self._capacity = 0

    def _shorten(self) -> None:
        """Give up what a long row left behind: buffers more than twice as long as the rows that remain need. Where there is no
        memory to copy into, they stay."""
        with suppress(torch.OutOfMemoryError, MemoryError, RuntimeError):
            for layer, keys in enumerate(self.keys):
                values, needed = self.values[layer], self.held(layer, slice(0, self.rows)).longest + self.reserve
                if keys is not None and values is not None and keys.shape[2] > 2 * needed:
                    self.keys[layer], self.values[layer] = keys[:, :, :needed].clone(), values[:, :, :needed].clone()

    def commit(
        self,
        start: int,
        stop: int,
        rows: slice,
        appended: int,
        counts: NDArray[np.int64],
        on_device: Int[Tensor, " rows"],
        kept: Int[Tensor, "rows kept"] | None = None,
    ) -> None:
        """Let layers start..stop-1 keep some of the last `appended` tokens of some rows, and drop the others.

        Args:
            start: first layer.
            stop: layer after the last one.
            rows: whose tokens are kept or dropped.
            appended: tokens that every row got.
            counts: how many of them each row keeps.
            on_device: the same numbers on the device.
            kept: which ones, from 0, in the order in which they are kept; None: the first ones, which copies nothing.
        """
        segments = self._segments(start, stop)
        if kept is not None:
            # Rows keep no more than they got; what stands behind a row's own count has no meaning, and may point anywhere.
            kept = kept[:, :appended].clamp(max=max(appended - 1, 0))
            step = torch.arange(kept.shape[1], device=self.device)
            for segment in range(segments.start, segments.stop):
                before = self._device[segment, rows, None] - appended
                self._move(segment, rows, before + kept, before + step)
        self.advance(start, stop, rows, counts - appended, on_device - appended)

    def _move(self, segment: int, rows: slice, old: Tensor, new: Tensor) -> None:
        first, stop = [*self.starts, self.layers][segment : segment + 2]
        positions = self._positions[segment]
        if positions is not None and positions.shape[1] < self._host[segment, rows].max():
            positions = None  # noted before a split, for layers that are in another segment now
        layers = (buffer for layer in range(first, stop) for buffer in (self.keys[layer], self.values[layer]))
        for buffer in (*layers, None if positions is None else positions[:, None]):
            if buffer is not None:
                row = torch.arange(rows.start, rows.stop, device=buffer.device)[:, None]
                buffer[row, :, new.to(buffer.device)] = buffer[row, :, old.to(buffer.device)]

    def view(self, rows: slice) -> "CacheView":
        """Some claimed rows, neighbours in the pool, as the cache that layers take."""
        return CacheView(self, rows)

    def contents(self, layer: int, rows: slice) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, [rows, kv_heads, longest row, head_dim], as views; shorter rows end with other numbers.

        Raises:
            IndexError: nothing has been written into the layer.
        """
        keys, values = self.keys[layer], self.values[layer]
        if keys is None or values is None:
            raise IndexError(f"layer {layer} of the cache is empty")
        longest = self.held(layer, rows).longest
        return keys[rows, :, :longest], values[rows, :, :longest]

    def bytes_of_a_row(self) -> NDArray[np.int64]:
        """Bytes that each layer's buffers have for one row, its reserve included, [layers]."""
        pairs = zip(self.keys, self.values, strict=True)
        sizes = [sum(part.nbytes // len(part) for part in pair if part is not None) for pair in pairs]
        return np.array(sizes, np.int64)

    def allocated(self) -> int:
        """Bytes of all keys' and values' buffers."""
        return sum(buffer.nbytes for buffer in (*self.keys, *self.values) if buffer is not None)

    def positions(self, layer: int, rows: slice, held: Held, new: Int[Tensor, "rows new"]) -> Int[Tensor, "rows total"]:
        """Note the positions, in the unpruned sequence, of a pass's new tokens behind those that rows held before it, for all
        layers of a segment; returns the positions of all tokens."""
        segment = self.segment(layer)
        buffer = self._positions[segment]
        if buffer is None or buffer.shape[1] < held.longest + new.shape[1]:
            buffer = self._positions[segment] = self._grown(buffer, new, 1, held.longest)
        part = buffer[rows]
        index = held.lengths[:, None] + torch.arange(new.shape[1], device=new.device)
        part.scatter_(1, index, new)
        return part[:, : held.longest + new.shape[1]]

    def _grown(self, old: Tensor | None, new: Tensor, axis: int, held: int) -> Tensor:
        """A buffer with the contents of the old one and room for new tokens along an axis, behind those that are held.

        Zero-filled: even masked slots must be finite, since 0 × NaN is NaN.
        """
        length = held + new.shape[axis] + self.reserve
        # By half for answers, to copy them seldom; prompts are admitted by their size.
        if old is not None and new.shape[axis] <= self.reserve:
            length = max(length, old.shape[axis] * 3 // 2)
        buffer = new.new_zeros(self._capacity, *new.shape[1:axis], length, *new.shape[axis + 1 :])
        if old is not None:
            buffer.narrow(axis, 0, old.shape[axis]).copy_(old)
        return buffer


class CacheView:
    """Implements the `Cache` interface that Hugging Face decoder layers call, for some rows during one pass.

    Write indices are computed once per segment.

    Args:
        cache: the cache.
        rows: rows of the pass.
    """

    def __init__(self, cache: KVCache, rows: slice) -> None:
        self.cache, self.rows = cache, rows
        self._held: dict[int, Held] = {}
        self._positions: dict[int, Tensor] = {}
        self._spots: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor]] = {}

    def held(self, layer: int) -> Held:
        """What the rows held in a layer before this pass."""
        segment = self.cache.segment(layer)
        if segment not in self._held:
            self._held[segment] = self.cache.held(layer, self.rows)
        return self._held[segment]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of a layer's longest row, by the name that transformers' modules use."""
        return self.held(layer_idx).longest

    def update(
        self,
        key_states: Float[Tensor, "rows kv_heads new head_dim"],
        value_states: Float[Tensor, "rows kv_heads new value_dim"],
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[Float[Tensor, "rows kv_heads total head_dim"], Float[Tensor, "rows kv_heads total value_dim"]]:
        """Write new tokens behind those that each row holds; returns all as views. The pass ends with `advance`."""
        keys = self._written(self.cache.keys, layer_idx, key_states)
        return keys, self._written(self.cache.values, layer_idx, value_states)

    def positions(self, layer: int, new: Int[Tensor, "rows new"]) -> Int[Tensor, "rows total"]:
        """Positions in the unpruned sequence of all tokens of a layer, those of this pass included."""
        segment = self.cache.segment(layer)
        if segment not in self._positions:
            self._positions[segment] = self.cache.positions(layer, self.rows, self.held(layer), new)
        return self._positions[segment]

    def advance(self, start: int, stop: int, tokens: int) -> None:
        """The pass has written that many tokens into layers start..stop-1."""
        self.cache.advance(start, stop, self.rows, tokens)
        self._held.clear()
        self._positions.clear()
        self._spots.clear()

    def _written(self, buffers: list[Tensor | None], layer: int, new: Tensor) -> Tensor:
        held, count, cache = self.held(layer), new.shape[2], self.cache
        buffer = buffers[layer]
        total = held.longest + count
        if buffer is None or total > buffer.shape[2]:
            buffer = buffers[layer] = cache._grown(buffer, new, 2, held.longest)
        # Slicing costs microseconds in each layer of each step, and most passes are over all rows.
        part = buffer if self.rows == slice(0, buffer.shape[0]) else buffer[self.rows]
        if held.equal:
            part[:, :, held.longest : total] = new
        else:
            key = cache.segment(layer), count, buffer.device
            if key not in self._spots:
                rows = torch.arange(part.shape[0], device=buffer.device)[:, None]
                spots = held.lengths.to(buffer.device)[:, None] + torch.arange(count, device=buffer.device)
                self._spots[key] = rows, spots
            rows, spots = self._spots[key]
            part[rows, :, spots] = new.transpose(1, 2)
        return part[:, :, :total]


class ReplacingView(CacheView):
    """One row during a pass whose tokens take the places of others, instead of standing behind them.

    Args:
        cache: the cache.
        row: its row.
        slots: of the tokens that give way, in the order of the new ones.
        count: tokens that the pass sees, the first ones of the row.
    """

    def __init__(self, cache: KVCache, row: int, slots: Int[Tensor, " new"], count: int) -> None:
        super().__init__(cache, slice(row, row + 1))
        self.slots, self.count = slots, count

    def positions(self, layer: int, new: Int[Tensor, "1 new"]) -> Int[Tensor, "1 count"]:
        """Positions in the unpruned sequence of the tokens that the pass sees."""
        known = self.cache._positions[self.cache.segment(layer)]
        assert known is not None, "the prompt has been noted"
        known[self.rows, self.slots] = new
        return known[self.rows, : self.count]

    def advance(self, start: int, stop: int, tokens: int) -> None:
        """No-op: the row holds as many tokens as before."""

    def _written(self, buffers: list[Tensor | None], layer: int, new: Tensor) -> Tensor:
        buffer = buffers[layer]
        assert buffer is not None, "it holds the prompt"
        buffer[self.rows.start, :, self.slots.to(buffer.device)] = new[0].to(buffer.dtype)
        return buffer[self.rows, :, : self.count]
