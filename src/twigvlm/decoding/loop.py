"""One request from prompt to answer: prefill -> (draft -> verify -> accept -> commit)* -> stop (Algorithm 1)."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from twigvlm.base.cache import LayeredCache
from twigvlm.base.positions import slice_rope
from twigvlm.base.vlm import BaseVLM
from twigvlm.config import SpeculationConfig
from twigvlm.decoding.draft import Context, draft_chain
from twigvlm.decoding.prefill import Plan, prefill
from twigvlm.decoding.sampling import Processors, greedy_choices
from twigvlm.decoding.verify import accept
from twigvlm.twig.block import Twig


@dataclass(frozen=True)
class Stops:
    """When an answer ends."""

    max_new_tokens: int
    ends: frozenset[int]
    """End-of-sequence ids."""
    criteria: Callable[[Tensor, Any], Tensor] | None
    """Further stopping criteria on (ids [1, n], None) -> bool [1]; asked after every token."""


@dataclass
class Timings:
    """Wall-clock seconds of one request."""

    prefill: float = 0.0
    """Vision, prompt, pruning and the first token."""
    draft: float = 0.0
    """Trunk and twig; without speculation the trunk alone."""
    verify: float = 0.0
    """Layers K+1..L, the head, and the choice."""
    total: float = 0.0

    @property
    def decode(self) -> float:
        """All after the first token."""
        return self.total - self.prefill


@dataclass(frozen=True)
class Answer:
    """What one request produced."""

    tokens: list[int]
    kept: Int[Tensor, "batch kept"] | None
    drafted_lengths: list[int]
    accepted_lengths: list[int]
    timings: Timings


def decode(
    base: BaseVLM,
    twig: Twig,
    inputs: dict[str, Any],
    plan_of: Callable[[int], Plan],
    speculation: SpeculationConfig,
    stops: Stops,
    processors: Processors | None,
    emit: Callable[[int], None],
    began: float,
) -> Answer:
    """Answer one prompt (batch 1).

    Args:
        inputs: arguments of the base's forward, `input_ids` [1, tokens] among them.
        plan_of: makes the plan of pruning from the prompt's number of visual tokens.
        processors: act on the base's scores at every position.
        emit: called with each token as it is accepted.
        began: when the request began, by the clock of `clock_of`; vision may have run since.
    """
    clock = clock_of(inputs["input_ids"].device)
    timings = Timings()
    chain = speculation.speculate == "chain"
    most = speculation.draft_length if chain else 0
    limit = stops.max_new_tokens
    layers, trunk = base.num_layers, twig.config.trunk_layers
    slots = twig.last_slot + 1

    prompt = base.prompt(**inputs)
    cache = LayeredCache(slots, reserve=min(limit, 512) + most + 1)
    masks = base.masks(prompt, rows=most + 2, new_tokens=limit)
    first = prefill(base, twig, prompt, plan_of(int(prompt.visual_mask.sum())), masks, cache)
    rope = base.rope_after(prompt, limit)
    context = Context(base, twig, masks, cache, rope)

    tokens = _Tokens(prompt.input_ids, stops, processors is not None, emit)
    tokens.commit(greedy_choices(first.logits, [], processors, tokens.ids()))
    timings.prefill = clock() - began
    drafted_lengths: list[int] = []
    accepted_lengths: list[int] = []
    while not tokens.finished:
        start = clock()
        index = len(tokens.new) - 1
        draft_limit = min(most, limit - len(tokens.new) - 1)
        draft = draft_chain(context, tokens.new[-1], index, draft_limit, speculation.draft_threshold, stops.ends)
        drafted = len(draft.tokens)
        middle = clock()
        hidden = torch.cat(draft.hidden, dim=1) if drafted else draft.hidden[0]
        step = slice_rope(rope, index, index + drafted + 1)
        hidden = base.run_layers(hidden, trunk, layers, step, masks, cache)
        choices = greedy_choices(base.logits(hidden)[0], draft.tokens, processors, tokens.ids())
        accepted = accept(draft.tokens, choices)
        committed = tokens.commit(choices[: accepted + 1])
        cache.drop(0, layers, drafted - accepted)
        if drafted and accepted == drafted:
            context.pending = [draft.hidden[-1]]
        elif drafted:
            cache.drop(layers, slots, drafted - 1 - accepted)
        stop = clock()
        timings.draft += middle - start
        timings.verify += stop - middle
        drafted_lengths.append(drafted)
        accepted_lengths.append(min(accepted, committed))
    timings.total = clock() - began
    return Answer(tokens.new, first.kept, drafted_lengths, accepted_lengths, timings)


class _Tokens:
    """Generated tokens, and whether the answer has ended."""

    def __init__(self, prompt_ids: Tensor, stops: Stops, processed: bool, emit: Callable[[int], None]) -> None:
        self.new: list[int] = []
        self.finished = False
        self.stops, self.emit = stops, emit
        self.prompt_length = prompt_ids.shape[1]
        self.buffer: Tensor | None = None
        if processed or stops.criteria is not None:  # only those need the ids as a tensor at each step
            self.buffer = torch.cat((prompt_ids, prompt_ids.new_zeros(1, stops.max_new_tokens)), dim=1)

    def ids(self) -> Tensor | None:
        """Prompt and generated ids, [1, n]."""
        return None if self.buffer is None else self.buffer[:, : self.prompt_length + len(self.new)]

    def commit(self, tokens: Sequence[int]) -> int:
        """Append tokens up to and including the one that ends the answer; how many were appended."""
        for count, token in enumerate(tokens, start=1):
            if self.buffer is not None:
                self.buffer[0, self.prompt_length + len(self.new)] = token
            self.new.append(token)
            self.emit(token)
            ended = token in self.stops.ends or len(self.new) >= self.stops.max_new_tokens
            if self.stops.criteria is not None:
                ended = bool(self.stops.criteria(self.ids(), None)[0]) or ended  # type: ignore[arg-type]
            if ended:
                self.finished = True
                return count
        return len(tokens)


def clock_of(device: torch.device) -> Callable[[], float]:
    """A clock in seconds that waits for the device's work."""
    if device.type != "cuda":
        return time.perf_counter

    def synchronised() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronised
