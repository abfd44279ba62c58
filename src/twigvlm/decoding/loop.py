"""One request from prompt to answer: prefill -> (draft -> verify -> accept -> commit)* -> stop (Algorithms 1 and 2)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from twigvlm.base.cache import LayeredCache
from twigvlm.base.vlm import BaseVLM
from twigvlm.config import SpeculationConfig
from twigvlm.decoding.costs import StepCosts
from twigvlm.decoding.draft import Context, draft_chain, draft_tree
from twigvlm.decoding.policy import CostAware, Policy, Published
from twigvlm.decoding.prefill import Plan, prefill
from twigvlm.decoding.sampling import Processors, greedy
from twigvlm.decoding.timing import Timings, clock_of
from twigvlm.decoding.tree import walk
from twigvlm.twig.block import Twig


@dataclass(frozen=True)
class Stops:
    """When an answer ends."""

    max_new_tokens: int
    ends: frozenset[int]
    """End-of-sequence ids."""
    criteria: Callable[[Tensor, Any], Tensor] | None
    """Further stopping criteria on (ids [1, n], None) -> bool [1]; asked after every token."""


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
    costs: StepCosts | None = None,
) -> Answer:
    """Answer one prompt (batch 1).

    Args:
        inputs: arguments of the base's forward, `input_ids` [1, tokens] among them.
        plan_of: makes the plan of pruning from the prompt's number of visual tokens.
        processors: act on the base's scores at every position.
        emit: called with each token as it is accepted.
        began: when the request began, by the clock of `clock_of`; vision may have run since.
        costs: of this machine, which `auto` needs.
    """
    clock = clock_of(inputs["input_ids"].device)
    timings = Timings()
    draft_after = draft_tree if speculation.speculate in ("tree", "auto") else draft_chain
    limit = stops.max_new_tokens

    prompt = base.prompt(**inputs)
    cache = LayeredCache(twig.last_slot + 1, reserve=min(limit, 512) + speculation.step_tokens)
    masks = base.masks(prompt, rows=speculation.step_tokens + 1, new_tokens=limit)
    first = prefill(base, twig, prompt, plan_of(int(prompt.visual_mask.sum())), masks, cache)
    rope = base.rope_after(prompt, limit)
    policy: Policy = Published(speculation)
    if costs is not None:
        policy = CostAware(costs, fill=0.0 if first.unseen is None else costs.fill * prompt.hidden.shape[1])
    context = Context(base, twig, speculation, policy, stops.ends, masks, cache, rope, first.unseen)

    tokens = _Tokens(prompt.input_ids, stops, processors is not None, emit)
    tokens.commit([greedy(first.logits, processors, tokens.ids())(0, [])])
    timings.prefill = clock() - began
    drafted_lengths: list[int] = []
    accepted_lengths: list[int] = []
    while not tokens.finished:
        start = clock()
        index = len(tokens.new) - 1
        room = limit - len(tokens.new) - 1 if speculation.active else 0
        draft = draft_after(context, tokens.new[-1], index, room)
        middle = clock()
        hidden = base.run_layers(
            draft.hidden, twig.config.trunk_layers, base.num_layers, draft.rope, draft.masks, cache
        )
        path, choices = walk(draft.tree, greedy(base.logits(hidden)[0], processors, tokens.ids()))
        committed = tokens.commit(choices)
        draft.keep(context, path)
        policy.learn(draft.tree, len(path) - 1)
        stop = clock()
        timings.draft += middle - start
        timings.verify += stop - middle
        drafted_lengths.append(len(draft.tree) - 1)
        accepted_lengths.append(min(len(path) - 1, committed))
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
