"""A row: one answer while it is generated. A request: the rows that were asked for in one call."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from twigvlm.base.prompt import Prompt
from twigvlm.engine.noise import Noise
from twigvlm.kv.prefix_cache import PrefixCache
from twigvlm.pruning.cut import Cut, Pruner


@runtime_checkable
class Stage(Protocol):
    """A logits processor, or several, as one step from logits to scores."""

    @property
    def reads_ids(self) -> bool:
        """Whether it looks at ids; if not, it may be given rows in any order and number."""

    def __call__(self, scores: Float[Tensor, "rows vocabulary"], walk: "Walk") -> Float[Tensor, "rows vocabulary"]:
        """The processed scores of some rows of a request."""


@dataclass(eq=False)
class Request:
    """Rows that were asked for in one call. A row by itself is a request of one.

    Args:
        input_ids: the prompts as they were given, padded on the left.
        padding: tokens of padding of each.
        stages: from logits to scores, the same objects for all rows.
        criteria: called with (ids of all rows padded on the left, None) after each position -> True where a row ends.
        row_criteria: of each row, called with (its ids without padding, None).
        lockstep: whether the rows advance together, because an object of the caller sees them all at once.
        pad_token_id: stands behind the end of a shorter answer.
    """

    input_ids: Int[Tensor, "batch tokens"]
    padding: Sequence[int]
    stages: tuple[Stage, ...] = ()
    criteria: Callable[[Tensor, Any], Tensor] | None = None
    row_criteria: Sequence[Callable[[Tensor, Any], Tensor] | None] = ()
    lockstep: bool = False
    pad_token_id: int = 0
    rows: list["Row"] = field(default_factory=list)

    @property
    def reads_ids(self) -> bool:
        """Whether processors look at ids."""
        return any(stage.reads_ids for stage in self.stages)

    def padded_ids(self, walked: dict[int, Sequence[int]]) -> Int[Tensor, "batch length"]:
        """Prompts and answers of all rows, as Hugging Face's `generate` would show them; ended rows go on with padding.

        Args:
            walked: of rows by their place in the request, tokens beyond the accepted ones.
        """
        new = [[*row.tokens, *walked.get(row.place, ())] for row in self.rows]
        longest = max(map(len, new))
        filled = [[*row, *[self.pad_token_id] * (longest - len(row))] for row in new]
        return torch.cat((self.input_ids, self.input_ids.new_tensor(filled).view(len(new), longest)), dim=1)


@dataclass(eq=False)
class Row:
    """One answer while it is generated.

    Args:
        request: that it belongs to.
        place: in the request.
        prompt: prompts of which this row's is one.
        index: of this row's prompt.
        pruner: chooses the visual tokens that go on; None: all do.
        cuts: its schedule for this prompt.
        max_new_tokens: longest answer.
        eos_token_ids: end it.
        noise: that the base chooses with; None: greedy.
        prefix: what is known of the prompt from an earlier turn or a forked row, and learns of it.
        emit: called with each token as it is accepted.
    """

    request: Request
    place: int
    prompt: Prompt
    index: int
    pruner: Pruner | None
    cuts: tuple[Cut, ...]
    max_new_tokens: int
    eos_token_ids: frozenset[int]
    noise: Noise | None = None
    prefix: PrefixCache | None = None
    emit: Callable[[int], None] | None = None
    id: int = -1
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
    finished: bool = False

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return self.prompt.lengths[self.index]

    def ids(self, walked: Sequence[int] = ()) -> Int[Tensor, "1 length"]:
        """Ids of prompt and answer, and of tokens beyond, without padding."""
        prompt = self.request.input_ids[self.place : self.place + 1, self.request.padding[self.place] :]
        return torch.cat((prompt, prompt.new_tensor([[*self.tokens, *walked]], dtype=prompt.dtype)), dim=1)

    def end(self) -> None:
        """The answer is complete, or given up."""
        if not self.finished and self.noise is not None:
            self.noise.close(len(self.tokens))
        self.finished = True

    def extend(self, tokens: Sequence[int]) -> list[int]:
        """Append tokens up to and including the one that ends the answer; those that were appended."""
        criterion = self.request.row_criteria[self.place] if self.request.row_criteria else None
        taken: list[int] = []
        for token in tokens:
            self.tokens.append(token)
            taken.append(token)
            if self.emit is not None:
                self.emit(token)
            ended = token in self.eos_token_ids or len(self.tokens) >= self.max_new_tokens
            if criterion is not None:
                ended = bool(criterion(self.ids(), None)[0]) or ended
            if ended:
                self.end()
                break
        if self.noise is not None and not self.finished:
            self.noise.forget(len(self.tokens))
        return taken


@dataclass(frozen=True)
class Walk:
    """Rows of a request at one step of a walk along drafts, as processors that look at ids may ask."""

    request: Request
    rows: Sequence[Row]
    walked: Sequence[Sequence[int]]
    """Tokens that each row has walked beyond its accepted ones."""
    walking: Sequence[bool]
    """Rows whose choice counts."""


@dataclass(frozen=True)
class ScoreStage:
    """Processors that look at scores alone."""

    process: Callable[[Tensor], Tensor]
    reads_ids: bool = False

    def __call__(self, scores: Float[Tensor, "rows vocabulary"], walk: Walk) -> Float[Tensor, "rows vocabulary"]:
        """All rows at once."""
        return self.process(scores)


@dataclass(frozen=True)
class RowStage:
    """Processors made for each row, which see its ids without padding."""

    processors: Sequence[Callable[[Tensor, Tensor], Tensor]]
    """By the row's place in the request."""
    reads_ids: bool = True

    def __call__(self, scores: Float[Tensor, "rows vocabulary"], walk: Walk) -> Float[Tensor, "rows vocabulary"]:
        """One row after another."""
        parts = [
            self.processors[row.place](row.ids(walked), part) if walking else part
            for row, walked, walking, part in zip(walk.rows, walk.walked, walk.walking, scores.split(1), strict=True)
        ]
        return torch.cat(parts)


@dataclass(frozen=True)
class BatchStage:
    """A processor of the caller, which sees the whole padded batch once per position, as Hugging Face's `generate` shows it."""

    processor: Callable[[Tensor, Tensor], Tensor]
    reads_ids: bool = True

    def __call__(self, scores: Float[Tensor, "rows vocabulary"], walk: Walk) -> Float[Tensor, "rows vocabulary"]:
        """The whole batch; rows that have ended have scores of 0."""
        request = walk.request
        if not any(walk.walking):
            return scores
        places = [row.place for row in walk.rows]
        everyone = scores.new_zeros(len(request.rows), scores.shape[1])
        everyone[places] = scores
        ids = request.padded_ids(dict(zip(places, walk.walked, strict=True)))
        return self.processor(ids, everyone)[places]
