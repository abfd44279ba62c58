"""The rows that are being decoded, as tensors: what drafting and verifying share."""

from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from twigvlm.base.masks import Masks
from twigvlm.base.token_inputs import TokenInputs
from twigvlm.base.vlm import BaseVLM
from twigvlm.kv.cache import KVCache
from twigvlm.pruning.refocus import Refocus
from twigvlm.pruning.view import TrunkOutput
from twigvlm.speculation.walk import Accepted
from twigvlm.twig.block import Twig

NO_TOKEN = -1
"""Stands for no token, and in a row's ids for a visual one."""
_STEP = 1024  # positions by which the table of rotary embeddings grows


@dataclass
class RowState:
    """What the device knows of each row; entry i of every tensor is row i of the cache."""

    newest: Int[Tensor, " rows"]
    """The last accepted token."""
    count: Int[Tensor, " rows"]
    """New tokens so far, the newest included."""
    limit: Int[Tensor, " rows"]
    """Maximum number of new tokens."""
    first_position: Int[Tensor, " rows"]
    """Position, for rotary embeddings, of the first new token."""
    prompt_length: Int[Tensor, " rows"]
    """Position of the first new token in the unpruned sequence."""
    eos_token_ids: Int[Tensor, "rows ids"]
    """Nothing is drafted after them; NO_TOKEN: none."""
    ids: Int[Tensor, "rows width"]
    """Ids of prompt and answer, NO_TOKEN at visual tokens; entries behind the newest token are undefined. Zero columns unless
    prompt lookup is used."""

    @classmethod
    def none(cls, device: torch.device) -> "RowState":
        """The state of no rows."""
        numbers, table = (torch.zeros(*shape, dtype=torch.long, device=device) for shape in ((0,), (0, 0)))
        return cls(numbers, numbers, numbers, numbers, numbers, table, table)

    def advance(self, accepted: Accepted, longest: int) -> None:
        """Take up accepted tokens.

        Args:
            accepted: of the rows.
            longest: upper bound of the lengths of prompts and answers, these tokens included.
        """
        tokens = accepted.tokens
        if self.ids.shape[1]:
            more = longest - self.ids.shape[1]
            if more > 0:
                self.ids = torch.nn.functional.pad(self.ids, (0, max(more, _STEP)), value=NO_TOKEN)
            # What is not accepted is overwritten by the next step's tokens.
            index = (self.prompt_length + self.count)[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
            self.ids = self.ids.scatter(1, index, tokens)
        self.newest = tokens.gather(1, accepted.counts[:, None] - 1)[:, 0]
        self.count = self.count + accepted.counts

    def join(self, other: "RowState") -> "RowState":
        """Further rows after these."""

        def parts(name: str) -> list[Tensor]:
            both = [getattr(self, name), getattr(other, name)]
            if both[0].ndim == 1:
                return both
            width = max(ids.shape[1] for ids in both)
            return [torch.nn.functional.pad(ids, (0, width - ids.shape[1]), value=NO_TOKEN) for ids in both]

        return RowState(**{name: torch.cat(parts(name)) for name in vars(self)})

    def leave(self, row: int) -> "RowState":
        """Without a row, whose place the last one takes."""
        return RowState(**{name: without(tensor, row) for name, tensor in vars(self).items()})


@dataclass
class Pending:
    """Layer-K states of each row's newest accepted tokens that the twig has not seen yet."""

    states: Float[Tensor, "rows pending width"]
    counts: Int[Tensor, " rows"]
    on_host: NDArray[np.int64]
    """The counts."""

    @classmethod
    def none(cls, rows: int, like: Tensor) -> "Pending":
        """The pending tokens of rows that have none."""
        empty = like.new_zeros(rows, 0, like.shape[-1])
        return cls(empty, torch.zeros(rows, dtype=torch.long, device=like.device), np.zeros(rows, np.int64))

    def join(self, other: "Pending") -> "Pending":
        """Further rows after these."""
        width = max(self.states.shape[1], other.states.shape[1])
        padded = (
            torch.nn.functional.pad(part.states, (0, 0, 0, width - part.states.shape[1])) for part in (self, other)
        )
        counts = torch.cat((self.counts, other.counts))
        return Pending(torch.cat(tuple(padded)), counts, np.concatenate((self.on_host, other.on_host)))

    def leave(self, row: int) -> "Pending":
        """Without a row, whose place the last one takes."""
        on_host = self.on_host.copy()
        on_host[row] = on_host[-1]
        on_host = on_host[:-1]
        return Pending(without(self.states, row)[:, : int(on_host.max())], without(self.counts, row), on_host)

    def append(self, states: Float[Tensor, "rows new width"], counts: Tensor, on_host: NDArray[np.int64]) -> "Pending":
        """With the first `counts` of new states after those of each row."""
        total = self.on_host + on_host
        if not total.any():
            return Pending(self.states[:, :0], counts, on_host)
        relative = torch.arange(int(total.max()), device=states.device) - self.counts[:, None]
        both = torch.cat((self.states, states), dim=1)
        old = torch.arange(relative.shape[1], device=states.device).expand_as(relative)
        index = torch.where(relative < 0, old, self.states.shape[1] + relative).clamp(max=both.shape[1] - 1)
        return Pending(torch.take_along_dim(both, index[..., None], dim=1), self.counts + counts, total)


class TwigStates(NamedTuple):
    """What the twig makes of tokens."""

    states: Float[Tensor, "rows tokens width"]
    """After its last layer."""
    scores: Float[Tensor, "rows tokens visual"] | None
    """Shares of the visual tokens; None where no row looks again."""


class Batch:
    """Rows that draft and verify together. Row i of every part is row i of the cache.

    Args:
        base: the base.
        twig: its twig.
        reserve: tokens that the cache has room for beyond what first filled it.
    """

    def __init__(self, base: BaseVLM, twig: Twig, reserve: int) -> None:
        self.base, self.twig = base, twig
        boundaries = (twig.config.trunk_layers, twig.first_layer_idx)
        self.cache = KVCache(twig.last_layer_idx + 1, boundaries, reserve, base.device)
        self.masks: Masks = base.masks()
        self.state = RowState.none(base.device)
        no_states = torch.empty(0, 0, base.config.hidden_size, dtype=base.dtype, device=base.device)
        self.pending = Pending.none(0, no_states)
        self.deferred: TrunkOutput | None = None
        """The prompt of the only row, until the twig has seen it."""
        self.refocus: Refocus | None = None
        """What the rows can look at again; None: no row does."""
        self._table: TokenInputs | None = None
        self._axes: tuple[int, ...] = ()
        self._first = 0

    @property
    def rows(self) -> slice:
        """All of them."""
        return slice(self._first, self.cache.rows)

    def newcomers(self, first: int, state: RowState, trunk: TrunkOutput, refocus: Refocus | None) -> "Batch":
        """The rows from `first` on, whose prompts the cache holds, as a batch of their own until they join."""
        self._axes = (3,) if trunk.prompt.position_ids.ndim == 3 else ()
        part = copy(self)
        part._first, part.state, part.refocus, part.deferred = first, state, refocus, None
        part.pending = Pending.none(len(state.newest), trunk.tokens.hidden)
        return part

    def join(self, part: "Batch", deferred: TrunkOutput | None, refocus: Refocus | None) -> None:
        """Take up newcomers.

        Args:
            part: from `newcomers`.
            deferred: their prompt, if the twig shall see it with the first draft only.
            refocus: what all rows can look at again.
        """
        self._show_deferred()
        state, pending = self.state.join(part.state), self.pending.join(part.pending)
        self.state, self.pending, self.refocus, self.deferred = state, pending, refocus, deferred

    def leave(self, row: int, refocus: Refocus | None) -> None:
        """Drop a row; the last one takes its place. Where memory runs out, nothing has changed.

        Args:
            row: which one.
            refocus: what the other rows can look at again.
        """
        if self.cache.rows > 1:
            state, pending = self.state.leave(row), self.pending.leave(row)
        else:
            state, pending = RowState.none(self.base.device), Pending.none(0, self.pending.states)
        self.state, self.pending, self.refocus, self.deferred = state, pending, refocus, None
        self.cache.release(row)

    def _show_deferred(self) -> None:
        if self.deferred is not None:
            self.deferred.fill_twig()
            self.deferred = None

    def inputs(self, offsets: Int[Tensor, "rows tokens"], furthest: int) -> TokenInputs:
        """Per-token inputs of new tokens.

        Args:
            offsets: offset of each token from the newest one, which is at 0.
            furthest: upper bound of their positions.
        """
        state = self.state
        in_answer = state.count[:, None] - 1 + offsets
        if self._table is None or self._table.cos.shape[1] <= furthest:
            self._table = self._rotary_table((furthest // _STEP + 1) * _STEP)
        table = self._table
        index = (state.first_position[:, None] + in_answer).clamp(max=table.cos.shape[1] - 1)
        positions = state.prompt_length[:, None] + in_answer if self.base.windowed else None
        cos, sin = (torch.nn.functional.embedding(index, part[0]) for part in (table.cos, table.sin))
        return TokenInputs(cos, sin, table.kinds, positions)

    def _rotary_table(self, size: int) -> TokenInputs:
        positions = torch.arange(size, device=self.base.device)
        axes = positions.expand(*self._axes, 1, -1)
        like = torch.empty(1, 1, 1, dtype=self.base.dtype, device=self.base.device)
        return self.base.rotary(like, axes)

    def run_trunk(
        self, tokens: Int[Tensor, "rows nodes"], inputs: TokenInputs, masks: Masks
    ) -> Float[Tensor, "rows nodes width"]:
        """States after layer K."""
        layers = self.twig.config.trunk_layers
        return self.base.run_layers(self.base.embed(tokens), 0, layers, inputs, masks, self.cache.view(self.rows))

    def run_twig(self, hidden: Float[Tensor, "rows nodes width"], inputs: TokenInputs, masks: Masks) -> TwigStates:
        """Run the twig on states of layer K."""
        view = self.cache.view(self.rows)
        if self.refocus is None:
            return TwigStates(self.twig(hidden, inputs, masks, view), None)
        before_last, states = self.twig.forward_with_last_input(hidden, inputs, masks, view)
        return TwigStates(states, self.refocus.scores(before_last, inputs))

    def run_twig_on_roots(self, roots: Float[Tensor, "rows 1 width"], inputs: TokenInputs, furthest: int) -> TwigStates:
        """Run the twig on the newest tokens; it first sees what it has not seen yet, in the same pass."""
        self._show_deferred()
        pending = self.pending
        if not pending.on_host.any():
            return self.run_twig(roots, inputs, self.masks)
        size = int(pending.on_host.max()) + 1
        at = pending.counts[:, None]
        states = torch.cat((pending.states, roots), dim=1)
        states = states.scatter(1, at[..., None].expand_as(roots), roots)
        offsets = torch.arange(size, device=at.device) - at
        all_new = self.run_twig(states, self.inputs(offsets, furthest), self.masks)
        self.cache.commit(*self.twig.cache_layers, self.rows, size, pending.on_host + 1, pending.counts + 1)
        self.pending = Pending.none(len(states), states)
        states = torch.take_along_dim(all_new.states, at[..., None], dim=1)
        if all_new.scores is None:
            return TwigStates(states, None)
        return TwigStates(states, torch.take_along_dim(all_new.scores, at[..., None], dim=1))


def without(tensor: Tensor, row: int) -> Tensor:
    """Without a row, whose place the last one takes."""
    if row == len(tensor) - 1:
        return tensor[:-1]
    return torch.cat((tensor[:row], tensor[-1:], tensor[row + 1 : -1]))


def eos_table(ids: Sequence[Iterable[int]], device: torch.device) -> Int[Tensor, "rows ids"]:
    """End-of-sequence ids of rows as one tensor."""
    rows = [sorted(row) for row in ids]
    width = max(1, *map(len, rows))
    return torch.tensor([[*row, *[NO_TOKEN] * (width - len(row))] for row in rows], device=device)
