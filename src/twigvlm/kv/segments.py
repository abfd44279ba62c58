"""How many tokens rows hold in each layer: layers between two cuts share their lengths."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor


class Held(NamedTuple):
    """How many tokens some rows hold in the layers of one segment."""

    longest: int
    equal: bool
    """Whether all rows hold equally many."""
    lengths: Int[Tensor, " rows"]
    """Number of tokens that each row holds, on the device."""


class Segments:
    """Lengths of rows, for each range of layers without a cut inside.

    Lengths are known twice: on the host, which sizes views and decides which masks are needed, and on the device, where writes
    of rows of different lengths and masks are computed.

    Args:
        layers: number of layers.
        boundaries: layers at which a segment begins, besides 0; cuts add further ones.
        device: of the lengths.
    """

    def __init__(self, layers: int, boundaries: Iterable[int], device: torch.device) -> None:
        self.layers, self.device = layers, device
        self.starts = sorted({0, *boundaries} - {layers})
        # Of each segment, [rows, tokens], as `KVCache.positions` notes them: here because they are split with their segment.
        self._positions: list[Tensor | None] = [None] * len(self.starts)
        self._host: NDArray[np.int64] = np.zeros((len(self.starts), 0), np.int64)
        self._device = torch.zeros(len(self.starts), 0, dtype=torch.long, device=device)

    def segment(self, layer: int) -> int:
        """Index of the segment that a layer is in."""
        return bisect_right(self.starts, layer) - 1

    def split(self, layer: int) -> None:
        """Let a segment begin at this layer, as a cut after that many layers needs it; nothing that is held changes."""
        segment = self.segment(layer)
        if layer >= self.layers or self.starts[segment] == layer:
            return
        self.starts.insert(segment + 1, layer)
        self._host = np.insert(self._host, segment + 1, self._host[segment], axis=0)
        self._device = torch.cat((self._device[: segment + 1], self._device[segment:]))
        positions = self._positions[segment]
        self._positions.insert(segment + 1, None if positions is None else positions.clone())

    def set_lengths(self, start: int, stop: int, rows: slice, lengths: Sequence[int]) -> None:
        """Let rows of layers start..stop-1 hold only this many of their first tokens.

        Args:
            start: first layer.
            stop: layer after the last one.
            rows: whose lengths change.
            lengths: of each row.
        """
        segments = self._segments(start, stop)
        self._host[segments, rows] = lengths
        self._device[segments, rows] = torch.tensor(lengths, device=self.device)

    def advance(
        self,
        start: int,
        stop: int,
        rows: slice,
        tokens: int | NDArray[np.int64],
        on_device: int | Int[Tensor, " rows"] | None = None,
    ) -> None:
        """Rows of layers start..stop-1 hold that many more tokens, which a pass has written, or fewer where it is negative.

        Args:
            start: first layer.
            stop: layer after the last one.
            rows: whose lengths change.
            tokens: of all rows, or of each.
            on_device: the same numbers on the device; None: it is one number.
        """
        segments = self._segments(start, stop)
        self._host[segments, rows] += tokens
        self._device[segments, rows] += int(tokens) if on_device is None else on_device

    def held(self, layer: int, rows: slice) -> Held:
        """How many tokens the rows, at least one, hold in a layer."""
        segment = self.segment(layer)
        host = self._host[segment, rows]
        longest = int(host.max())
        return Held(longest, int(host.min()) == longest, self._device[segment, rows])

    def _segments(self, start: int, stop: int) -> slice:
        self.split(start)
        self.split(stop)
        return slice(self.segment(start), self.segment(stop - 1) + 1)
