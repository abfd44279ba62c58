"""A row: one answer while it is generated. A request: the rows that were asked for in one call."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from twigvlm.base.prompt import Prompt
from twigvlm.engine.noise import Noise
from twigvlm.kv.prefix_cache import PrefixCache
from twigvlm.pruning.cut import Cut, Pruner
from twigvlm.pruning.refocus import Look, RefocusState


@runtime_checkable
class Processors(Protocol):
    """Logits processors of a request. They may have a state, so they are called once for each decoded position, in order."""

    @property
    def needs_ids(self) -> bool:
        """Whether they look at more than scores; `on_scores` is for requests without."""

    @property
    def needs_lockstep(self) -> bool:
        """Whether one of them sees all rows at once, by `on_batch`."""

    @property
    def has_state(self) -> bool:
        """Whether one of them may remember what it was asked, so that another request must have its own."""

    def on_scores(self, scores: Float[Tensor, "n vocabulary"]) -> Float[Tensor, "n vocabulary"]:
        """Processed scores of any rows."""

    def on_row(
        self, row: int, ids: Int[Tensor, "1 tokens"], scores: Float[Tensor, "1 vocabulary"]
    ) -> Float[Tensor, "1 vocabulary"]:
        """Processed scores of one row, by its index in the request and its ids without padding."""

    def on_batch(
        self, ids: Int[Tensor, "batch tokens"], scores: Float[Tensor, "batch vocabulary"], unfinished: Sequence[int]
    ) -> Float[Tensor, "batch vocabulary"]:
        """Processed scores of all rows, which stand at the same position.

        Args:
            ids: padded prompts and new tokens; a finished row goes on with the padding token.
            scores: scores of the next tokens; those of finished rows mean nothing.
            unfinished: rows whose answers go on.
        """


@runtime_checkable
class Criteria(Protocol):
    """What ends answers besides their length and EOS tokens; called once after each token."""

    @property
    def has_state(self) -> bool:
        """Whether one of them may remember what it was asked, so that another request must have its own."""

    @property
    def needs_lockstep(self) -> bool:
        """Whether one of them sees all rows at once, by `on_batch`."""

    def on_row(self, row: int, ids: Int[Tensor, "1 tokens"]) -> bool:
        """Whether a row ends, by its index in the request and its ids without padding."""

    def on_batch(self, ids: Int[Tensor, "batch tokens"], unfinished: Sequence[int]) -> Bool[Tensor, " batch"]:
        """Which rows end; arguments as for `Processors.on_batch`."""


@dataclass(eq=False)
class Request:
    """The rows created by one call.

    Args:
        input_ids: the prompts as they were given, padded on the left.
        padding: tokens of padding of each.
        processors: from logits to scores; None: none.
        criteria: that end answers; None: none.
        pad_token_id: stands behind the end of a shorter answer.
    """

    input_ids: Int[Tensor, "batch tokens"]
    padding: Sequence[int]
    processors: Processors | None = None
    criteria: Criteria | None = None
    pad_token_id: int = 0
    rows: list["Row"] = field(default_factory=list)
    _ended_at: dict[int, Bool[Tensor, " batch"]] = field(default_factory=dict, init=False)

    @property
    def lockstep(self) -> bool:
        """Whether the rows advance together, because an object of the caller sees them all at once."""
        both = (self.processors, self.criteria)
        return len(self.rows) > 1 and any(each is not None and each.needs_lockstep for each in both)

    def ended(self, walked: dict[int, Sequence[int]]) -> Bool[Tensor, " batch"]:
        """Which rows the criteria end after tokens beyond the accepted ones; criteria are asked once for each position.

        Args:
            walked: of the rows that go on, by their index; they all stand at the same position.
        """
        if self.criteria is None:
            return torch.zeros(len(self.rows), dtype=torch.bool)
        count = max(len(row.tokens) + len(walked.get(row.index, ())) for row in self.rows)
        if count not in self._ended_at:
            self._ended_at[count] = self.criteria.on_batch(self.padded_ids(walked), [*walked])
        return self._ended_at[count]

    def padded_ids(self, walked: dict[int, Sequence[int]]) -> Int[Tensor, "batch length"]:
        """Prompts and answers of all rows, as Hugging Face's `generate` would show them; ended rows go on with padding.

        Args:
            walked: of rows by their index in the request, tokens beyond the accepted ones.
        """
        new = [[*row.tokens, *walked.get(row.index, ())] for row in self.rows]
        longest = max(map(len, new))
        filled = [[*row, *[self.pad_token_id] * (longest - len(row))] for row in new]
        return torch.cat((self.input_ids, self.input_ids.new_tensor(filled).view(len(new), longest)), dim=1)


@dataclass(eq=False)
class Row:
    """One answer while it is generated.

    Args:
        request: the request this row belongs to.
        prompt: the prompts of the request.
        index: index of the row in the request, and of its prompt in `prompt`.
        pruner: chooses the visual tokens that are kept; None: all are.
        cuts: where this prompt is cut, and how many visual tokens each cut keeps.
        max_new_tokens: maximum length of the answer.
        eos_token_ids: ids of tokens that end the answer.
        noise: random numbers that the answer is sampled with; None: greedy decoding.
        prefix: cached states of the prompt's beginning; updated by the prefill.
        emit: called with each token as it is accepted.
        refocus: τ, below which the kept visual tokens are chosen again; None: they stay the same.
    """

    request: Request
    prompt: Prompt
    index: int
    pruner: Pruner | None
    cuts: tuple[Cut, ...]
    max_new_tokens: int
    eos_token_ids: frozenset[int]
    noise: Noise | None = None
    prefix: PrefixCache | None = None
    emit: Callable[[int], None] | None = None
    refocus: float | None = None
    id: int = -1
    cache_bytes: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """Bytes of keys and values in each layer, which the row is admitted by."""
    refocus_bytes: int = 0
    """Bytes of what it needs to choose its visual tokens again."""
    cached: int = 0
    """Tokens of the prompt that the trunk did not run on, since the prefix cache knew them."""
    next_position: int = 0
    """Position, for rotary embeddings, of the first new token."""
    tokens: list[int] = field(default_factory=list)
    """New ids."""
    drafted: list[int] = field(default_factory=list)
    """Tokens drafted in each step."""
    accepted: list[int] = field(default_factory=list)
    """Drafted tokens accepted in each step."""
    kept: Bool[Tensor, " tokens"] | None = None
    """True at the visual tokens of the prompt that passed the first cut; None without pruning."""
    refocus_state: RefocusState | None = None
    """What it can look at again; None: nothing, or the prefill has not run."""
    looks: list[Look] = field(default_factory=list)
    """Later choices of the kept visual tokens."""
    finished: bool = False
    _ended_at: dict[int, bool] = field(default_factory=dict, init=False)

    @cached_property
    def visual(self) -> int:
        """Number of visual tokens in the prompt."""
        return int(self.prompt.visual_mask[self.index].sum())

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return self.prompt.lengths[self.index]

    def ids(self, walked: Sequence[int] = ()) -> Int[Tensor, "1 length"]:
        """Ids of prompt and answer, and of the tokens that were walked beyond, without padding."""
        index, request = self.index, self.request
        prompt = request.input_ids[index : index + 1, request.padding[index] :]
        return torch.cat((prompt, prompt.new_tensor([[*self.tokens, *walked]], dtype=prompt.dtype)), dim=1)

    def ends_with(self, walked: Sequence[int]) -> bool:
        """Whether tokens beyond the accepted ones end the answer. Criteria are asked once for each position.

        Those of rows in lockstep are not asked here: they see all rows.
        """
        count = len(self.tokens) + len(walked)
        newest = walked[-1] if walked else self.tokens[-1]
        criteria = self.request.criteria if not self.request.lockstep else None
        if criteria is not None and count not in self._ended_at:
            self._ended_at[count] = criteria.on_row(self.index, self.ids(walked))
        return newest in self.eos_token_ids or count >= self.max_new_tokens or self._ended_at.get(count, False)

    def end(self) -> None:
        """Note that the answer is complete, or given up, and free what it held."""
        if not self.finished and self.noise is not None:
            self.noise.close(len(self.tokens))
        self.finished = True
        self.refocus_state = None
        self.drop_states()

    def drop_states(self) -> None:
        """Give up the states of the prompt, once they have run or never will: they are large, and a row may be kept for long."""
        hidden = self.prompt.hidden
        self.prompt = replace(
            self.prompt, hidden=hidden.new_empty(hidden.shape, device="meta"), deepstack=(), vision=None
        )

    def extend(self, tokens: Sequence[int]) -> list[int]:
        """Append tokens up to and including the one that ends the answer; returns those that were appended."""
        taken: list[int] = []
        for token in tokens:
            self.tokens.append(token)
            taken.append(token)
            if self.emit is not None:
                self.emit(token)
            if self.ends_with(()):
                self.end()
                break
        if self.noise is not None and not self.finished:
            self.noise.forget(len(self.tokens))
        return taken


def extend_all(rows: Sequence[Row], tokens: Sequence[list[int]]) -> list[list[int]]:
    """Give rows their new tokens, those of a request in lockstep position by position; returns what each took of them."""
    taken: list[list[int]] = [[] for _ in rows]
    together: dict[int, tuple[Request, list[int]]] = {}
    for index, row in enumerate(rows):
        if row.request.lockstep:
            together.setdefault(id(row.request), (row.request, []))[1].append(index)
        else:
            taken[index] = row.extend(tokens[index])
    for request, indices in together.values():
        for position in range(max(len(tokens[index]) for index in indices)):
            going = [index for index in indices if not rows[index].finished]
            for index in going:
                taken[index] += rows[index].extend(tokens[index][position : position + 1])
            if going:
                ended = request.ended({rows[index].index: () for index in going})
                for index in going:
                    if bool(ended[rows[index].index]):
                        rows[index].end()
    return taken
